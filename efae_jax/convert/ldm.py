"""Latent-diffusion's AutoencoderKL: checkpoints (.ckpt) and single safetensors files.

The autoencoder may be a part of a larger model, under a prefix such as `first_stage_model.`;
what lies outside is counted, and so are the autoencoder's own loss and averaged copy. How the
latent is scaled is not in the file.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, kl_table, model
from efae_jax.convert.model import Imported, Options, Source
from efae_jax.errors import UserError

FORMAT = "ldm"
KINDS = ("kl",)
OPTIONS = ("scaling_factor", "padding")
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
    outside = [n for n in source.tensors if not n.startswith(prefix)]
    outside += [prefix + n for n in inside if n.startswith(_NOT_THE_MODEL)]
    ignored = collections.Counter(_top(name, prefix) for name in outside)

    source = dataclasses.replace(source, tensors=kept)
    fields, image, problems = kl_table.infer(kept)
    config = model.new_config("kl", source, fields)
    with config.unlocked():
        config.data.channels = image
    model.state(config, source, FORMAT, options)
    params = model.convert(
        config, kl_table.table(kl_table.LDM, config.model), source, FORMAT, problems
    )
    notes = []
    if options.scaling_factor is None and source.description is None:
        notes.append(
            "the file does not say how its latent is scaled; taken as 1, which only matters to "
            "diffusion models: --scaling-factor gives another (Stable Diffusion 1 and 2: 0.18215)"
        )
    return Imported(config, params, FORMAT, dict(ignored), notes)


def write(config: Any, params: Mapping[str, Any], out: Path, dtype: str | None = None) -> list[str]:
    """Writes a safetensors file without a prefix, and the JSON beside it.

    Raises:
      UserError: a model that LDM cannot hold, or a file that cannot be written.
    """
    if tuple(config.model.decoder_widths) not in ((), tuple(config.model.widths)):
        raise UserError("format ldm has the same widths in encoder and decoder; this model has not")
    tensors = model.tensors_of(config, kl_table.table(kl_table.LDM, config.model), params, dtype)
    files.write_model(out, tensors, model.describe(config, FORMAT))
    return []


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
