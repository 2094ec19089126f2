"""TAESD's pairs of files, `*_encoder` and `*_decoder`: names are places in a plain sequence.

Either may come alone: then the model encodes or decodes, and `config.model.missing` says which
half is not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, layout, model
from efae_jax.convert.model import Imported, Options, Source
from efae_jax.convert.sources import DESCRIPTION
from efae_jax.convert.weight_names import SIDES
from efae_jax.errors import UserError
from efae_jax.models.taesd import (
    IMAGE_CHANNELS,
    VARIANTS,
    Conv,
    Layer,
    Residual,
    Variant,
    decoder_layers,
    encoder_layers,
)

FORMAT = "taesd"
KINDS = ("taesd",)
OPTIONS = ("padding", "variant")
FOLDER = True


def matches(source: Source) -> bool:
    """Whether the names are places in encoder and decoder."""
    return any(re.match(r"(encoder|decoder)\.\d+\.", name) for name in source.tensors)


def read(source: Source, options: Options) -> Imported:
    """Reads a model of kind "taesd".

    Raises:
      UserError: names or shapes that do not fit (all listed).
    """
    here = [side for side in SIDES if any(n.startswith(f"{side}.") for n in source.tensors)]
    variant, notes = choose_variant(_found(source.tensors, here[0]), source, options)
    config = new_config(variant, source)
    if len(here) == 1:
        (missing,) = set(SIDES) - set(here)
        with config.unlocked():
            config.model.missing = missing
        can = "encodes" if missing == "decoder" else "decodes"
        notes = [*notes, f"the {here[0]} alone, which only {can}: no file *_{missing} is beside it"]
    state(config, source, FORMAT, options)
    params = model.convert(config, _table_of(config), source, FORMAT, [])
    return Imported(config, params, FORMAT, {}, notes)


def _found(tensors: Mapping[str, np.ndarray], side: str) -> Variant:
    """What the shapes of one half tell."""
    branch = any(".pool." in name for name in tensors)
    if side == "encoder":
        last = max((int(n) for n in _numbers(tensors, side)), default=0)
        weight, axis = tensors.get(f"encoder.{last}.weight"), 0
        deep = any(n.startswith("encoder.17.") for n in tensors)
    else:
        weight, axis = tensors.get("decoder.1.weight"), 1
        deep = any(n.startswith("decoder.28.") for n in tensors)
    fits = weight is not None and weight.ndim > axis
    return Variant(weight.shape[axis] if fits else 0, deep=deep, branch=branch)


def _table_of(config: Any) -> list[layout.Entry]:
    """The names of the arrays that a model has."""
    missing = config.model.get("missing", "")
    entries = table(config.model.variant)
    return [e for e in entries if not missing or not e.ours.startswith(f"{missing}/")]


def new_config(variant: str, source: Source) -> Any:
    """A config of that variant."""
    config = model.new_config("taesd", source, {"variant": variant})
    with config.unlocked():
        config.data.channels = IMAGE_CHANNELS
        config.latent.stated = True  # TAESD gives what the diffusion models see
    return config


def state(
    config: Any,
    source: Source,
    format_name: str,
    options: Options,
    without: Sequence[str] = (),
) -> None:
    """As `model.state`; a stated variant must have the shapes that were found.

    Raises:
      UserError: it has others.
    """
    found = config.model.variant
    model.state(config, source, format_name, options, without)
    stated = config.model.variant
    if VARIANTS.get(stated) != VARIANTS[found]:
        raise UserError(
            f"{source.description_path}: variant is stated as {stated!r}, but the weights have "
            f"the shapes of {found}"
        )
    with config.unlocked():
        config.model.variant = options.variant or stated


def write(config: Any, params: Mapping[str, Any], out: Path, dtype: str | None = None) -> list[str]:
    """Writes a folder with the two safetensors files, or with the half that is there, and a JSON.

    Raises:
      UserError: a folder that cannot be written, or is there already.
    """
    variant = config.model.variant
    tensors = model.tensors_of(config, _table_of(config), params, dtype)
    contents: dict[str, Any] = {DESCRIPTION: files.json_text(model.describe(config, FORMAT))}
    for side in (side for side in SIDES if side != config.model.get("missing", "")):
        part = {
            name.removeprefix(f"{side}."): a
            for name, a in tensors.items()
            if name.startswith(f"{side}.")
        }
        contents[f"{variant}_{side}.safetensors"] = files.safetensors_bytes(part)
    files.write_folder(out, contents)
    return []


def choose_variant(found: Variant, source: Source, options: Options) -> tuple[str, list[str]]:
    """The variant of that shape: as stated, else as the path is called, else the first.

    Raises:
      UserError: no variant has the shape, or not the one that is stated.
    """
    same = [name for name, variant in VARIANTS.items() if variant == found]
    if not same:
        raise UserError(
            f"{source.path}: {found.latent_channels} latent channels, "
            f"{'with' if found.branch else 'without'} the branch of taef2, factor {found.factor}: "
            f"none of the variants {', '.join(VARIANTS)}"
        )
    if options.variant is not None:
        if options.variant not in same:
            raise UserError(
                f"--variant {options.variant}: the weights have the shapes of {' or '.join(same)}"
            )
        return options.variant, []
    stated = (source.description or {}).get("variant")
    # Of a hub id, what stands further right says more: owner/name/file.
    parts = source.name.lower().split("/")[::-1]
    named = next((found for p in parts if (found := [n for n in same if n in p])), [])
    if len(same) == 1 or stated in same or named:
        return (stated if stated in same else max(named or same, key=len)), []
    return same[0], [
        f"{' and '.join(same)} have the same shapes; taken as {same[0]} (--variant names another)"
    ]


def table(variant: str, style: str = FORMAT) -> list[layout.Entry]:
    """The names of all arrays, of TAESD's files or, style "diffusers", of AutoencoderTiny."""
    tiny = style != FORMAT
    entries = []
    for side, layers in (
        ("encoder", encoder_layers(variant)),
        ("decoder", decoder_layers(variant)),
    ):
        # AutoencoderTiny's sequence begins behind the decoder's bound.
        shift = 1 if tiny and layers[0] == "bound" else 0
        for i, layer in enumerate(layers):
            theirs = f"{side}.{'layers.' if tiny else ''}{i - shift}"
            entries += _layer(layer, theirs, f"{side}/layers/{i}")
    return entries


def _layer(layer: Layer, theirs: str, ours: str) -> list[layout.Entry]:
    if isinstance(layer, Conv):
        return layout.conv(theirs, ours, bias=layer.bias)
    if not isinstance(layer, Residual):
        return []
    entries = []
    for i in range(3):
        entries += layout.conv(f"{theirs}.conv.{2 * i}", f"{ours}/convs/{i}")
    if layer.branch:
        entries += layout.conv(f"{theirs}.pool.0", f"{ours}/branch/expand", bias=False)
        entries += layout.norm(f"{theirs}.pool.1", f"{ours}/branch/norm")
        entries += layout.conv(f"{theirs}.pool.3", f"{ours}/branch/reduce", bias=False)
    return entries


def _numbers(tensors: Mapping[str, np.ndarray], side: str) -> list[str]:
    found = (re.match(rf"{side}\.(\d{{1,6}})\.", name) for name in tensors)
    return [m[1] for m in found if m]
