"""Latent-diffusion's AutoencoderKL: checkpoints (.ckpt) and single safetensors files.

The autoencoder may be a part of a larger model, under a prefix such as `first_stage_model.`;
what lies outside is counted, and so are the autoencoder's own loss and averaged copy. How the
latent is scaled is rarely in the file: FLUX.2's statistics are, and `scale_factor` where it was
measured; the whole checkpoint of a known diffusion model tells, too.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, kl_table, model, units
from efae_jax.convert.model import Imported, Options, Source
from efae_jax.errors import UserError

FORMAT = "ldm"
KINDS = ("kl",)
OPTIONS = ("padding",)
# What a model with packed units has a place for in the file itself.
IN_FILE = ("mean", "std")
FOLDER = False
_ANCHOR = re.compile(r"(.*\.|)(?:encoder\.down|decoder\.up|(?:en|de)coder\.mid)\.")
_NOT_THE_MODEL = ("loss.", "model_ema.")


def matches(source: Source) -> bool:
    """Whether the names are LDM's."""
    prefix = _prefix(source.tensors)
    return prefix is not None and not kl_table.is_fused(_inside(source.tensors, prefix))


def read(source: Source, options: Options) -> Imported:
    """Reads a model of kind "kl".

    Raises:
      UserError: names or shapes that do not fit (all listed).
    """
    prefix = _prefix(source.tensors) or ""
    inside = _inside(source.tensors, prefix)
    kept = {name: a for name, a in inside.items() if not name.startswith(_NOT_THE_MODEL)}
    outside = {n: a for n, a in source.tensors.items() if not n.startswith(prefix)}
    around, found = (units.split(part, source.path) for part in (outside, kept))
    found = found._replace(fields=around.fields | found.fields)
    others = [*around.tensors, *(prefix + n for n in inside if n.startswith(_NOT_THE_MODEL))]
    ignored = collections.Counter(_top(name, prefix) for name in others)

    kept = _outermost(found.tensors)
    source = dataclasses.replace(source, tensors=kept)
    fields, image, problems = kl_table.infer(kept)
    config = model.new_config("kl", source, fields)
    with config.unlocked():
        config.data.channels = image
    notes = units.set_known(config, found, outside)
    without = IN_FILE if "variance" in found.fields else ()
    model.state(config, source, FORMAT, options, without)
    table = kl_table.table(kl_table.LDM, config.model)
    params = model.convert(config, table, source, FORMAT, problems)
    return Imported(config, params, FORMAT, dict(ignored), notes)


def write(config: Any, params: Mapping[str, Any], out: Path, dtype: str | None = None) -> list[str]:
    """Writes a safetensors file without a prefix, and the JSON beside it.

    Raises:
      UserError: a model that LDM cannot hold, or a file that cannot be written.
    """
    if tuple(config.model.decoder_widths) not in ((), tuple(config.model.widths)):
        raise UserError("format ldm has the same widths in encoder and decoder; this model has not")
    if (eps := config.latent.get("eps", units.PATCH_EPS)) != units.PATCH_EPS:
        raise UserError(
            f"format ldm takes {units.PATCH_EPS:g} for granted beside the patches' variance; this "
            f"model has {eps:g}, which diffusers' folder holds"
        )
    tensors = model.tensors_of(config, kl_table.table(kl_table.LDM, config.model), params, dtype)
    packed = units.batch_statistics(config, dtype or config.model.stored)
    without = IN_FILE if packed else ()
    files.write_model(out, tensors | packed, model.describe(config, FORMAT, without))
    return []


def _outermost(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The convolutions around the latent, which FLUX.2's own file counts to the networks."""
    renamed = {}
    for name, tensor in tensors.items():
        plain = re.sub(r"^(?:encoder\.(?=quant_conv\.)|decoder\.(?=post_quant_conv\.))", "", name)
        renamed[name if plain != name and plain in tensors else plain] = tensor
    return renamed


def _prefix(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The one under which the autoencoder lies: first_stage_model's, or the commonest."""
    found = collections.Counter(m[1] for name in tensors if (m := _ANCHOR.match(name)))
    for prefix in found:
        if prefix.endswith("first_stage_model."):
            return prefix
    return found.most_common(1)[0][0] if found else None


def _inside(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}


def _top(name: str, prefix: str) -> str:
    start = prefix if name.startswith(prefix) else ""
    first, dot, _ = name.removeprefix(start).partition(".")
    return f"{start}{first}{dot}"
