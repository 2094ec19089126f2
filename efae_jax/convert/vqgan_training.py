"""Aura's VAE in the names of `vqgan-training` (https://github.com/cloneofsimo/vqgan-training).

AuraEquiVAE was released so. The flips' action on its channels and the clamp of its latent are
in the model card only; they are what a model gets that has enough channels and no JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efae_jax.convert import files, kl_table, model
from efae_jax.convert.model import Imported, Options, Source

FORMAT = "vqgan-training"
KINDS = ("aura",)
OPTIONS = ("padding",)
FOLDER = False
CLAMP = 8.0
SIGNED = 4  # the last channels: two change sign under h, two under v


def matches(source: Source) -> bool:
    """Whether the names are vqgan-training's."""
    return kl_table.is_fused(source.tensors)


def read(source: Source, options: Options) -> Imported:
    """Reads a model of kind "aura".

    Raises:
      UserError: names or shapes that do not fit (all listed).
    """
    fields, image, problems = kl_table.infer(source.tensors)
    levels = len(fields["widths"])
    more = max(len(fields["decoder_widths"] or fields["widths"]) - levels, 0)
    # A decoder with more levels returns images of the data's side, the encoder takes smaller ones.
    config = model.new_config("aura", source, fields | {"shrink": 2**more})
    with config.unlocked():
        config.data.channels = image
        config.group.name = "z2xz2"
        config.group.representation = card_representation(config.model.latent_channels)
        config.latent.clamp = CLAMP
        config.latent.stated = True  # its diffusion models see the latent as it is
    model.state(config, source, FORMAT, options)
    table = kl_table.table(kl_table.AURA, config.model)
    params = model.convert(config, table, source, FORMAT, problems)
    notes = []
    if source.description is None:
        notes.append(
            f"clamp {CLAMP:g} and the action of the flips, "
            f"{config.group.representation or 'trivial'}, are those of AuraEquiVAE's model card"
        )
    return Imported(config, params, FORMAT, {}, notes)


def write(config: Any, params: Mapping[str, Any], out: Path, dtype: str | None = None) -> list[str]:
    """Writes a safetensors file and the JSON beside it.

    Raises:
      UserError: a file that cannot be written.
    """
    table = kl_table.table(kl_table.AURA, config.model)
    tensors = model.tensors_of(config, table, params, dtype)
    files.write_model(out, tensors, model.describe(config, FORMAT))
    return []


def card_representation(channels: int) -> str:
    """Of Z2 x Z2: two channels negated by h, then two by v, at the end; trivial below four."""
    if channels < SIGNED:
        return ""
    trivial = f"{channels - SIGNED}*trivial + " if channels > SIGNED else ""
    return trivial + "2*sign_h + 2*sign_v"
