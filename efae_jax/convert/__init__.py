"""Exchange of weights with PyTorch programs: one module per format, and the table of formats.

imported = read_model("stabilityai/sd-vae-ft-ema")
write_model(imported.config, imported.params, "out", "diffusers")
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from efae_jax.convert import (
    diffusers,
    efae,
    layout,
    ldm,
    sketch,
    sources,
    taesd,
    units,
    vqgan_training,
)
from efae_jax.convert.hub import CONFIG
from efae_jax.convert.model import Imported, Options
from efae_jax.errors import UserError

# Autoencoders that are not read, by names that no other has.
_OTHERS = {
    "a model with a codebook (VQ)": re.compile(r"(?:^|\.)(?:quantize\.embedding|vquantizer)\."),
    "an asymmetric AutoencoderKL": re.compile(r"(?:^|\.)decoder\.condition_encoder\."),
    "a deep-compression autoencoder (DC-AE)": re.compile(
        r"(?:^|\.)(?:encoder\.project_in|(?:encoder\.down|decoder\.up)_blocks\.\d+\.\d+)\."
    ),
}
# Options that every format takes: the units of the latent.
UNITS = ("scaling_factor", "shift_factor")
# Of each: FORMAT, KINDS (of config.model.kind that it writes), OPTIONS, FOLDER (whether it writes
# one, or a file), matches, read, write.
# The first that matches reads; the first that writes a kind is its natural format.
FORMATS: dict[str, ModuleType] = {
    module.FORMAT: module for module in (taesd, diffusers, efae, vqgan_training, ldm)
}

_NONE_STATED = Options()

__all__ = [
    "FORMATS",
    "Imported",
    "Options",
    "formats_of",
    "get_format",
    "read_model",
    "write_model",
]


def read_model(
    source: str | os.PathLike[str], format: str | None = None, options: Options = _NONE_STATED
) -> Imported:
    """A model from PyTorch weights.

    Args:
      source: a file, a folder, or a hub id, such as "stabilityai/sd-vae-ft-ema"; of a file with
        several models, FILE::KEY (`sources.read_source`).
      format: a name of `FORMATS`; recognised from the content unless given.
      options: what the weights do not say.

    Raises:
      UserError: nothing there, a file that is damaged or would run code, no format that
        fits, or names and shapes that do not (all listed).
      sketch.DisentanglerError: a UserError, too: the weights are a disentangler's.
    """
    if format is not None:
        get_format(format)
    found = sources.read_source(source)
    if format is None:
        format = next((name for name, module in FORMATS.items() if module.matches(found)), None)
    _require_supported(found, source)
    if format is None:
        if sketch.matches(found.tensors):
            raise sketch.DisentanglerError(
                f"{source} is a disentangler's basis of the latent, which belongs to a model and "
                "is not one; efae_jax.convert.sketch.read gives its parameters, and "
                "efae_jax.read_basis the basis"
            )
        some = ", ".join(layout.printable(name) for name in [*found.tensors][:3])
        raise UserError(
            f"{source} is of no format of {', '.join(FORMATS)}; its {len(found.tensors)} names "
            f"begin with {some}"
        )
    module = FORMATS[format]
    for name, value in options._asdict().items():
        if value is not None and name not in UNITS + module.OPTIONS:
            allowed = " and ".join(_flag(option) for option in UNITS + module.OPTIONS)
            raise UserError(f"{_flag(name)}: format {format} takes only {allowed}")
    imported = module.read(found, options)
    with imported.config.unlocked():
        imported.config.model.source = str(source)
    notes = units.override(imported.config, options.scaling_factor, options.shift_factor)
    return imported._replace(
        ignored={**found.ignored, **imported.ignored},
        notes=[*found.notes, *imported.notes, *notes],
        asks=units.unstated_note(imported.config),
    )


def write_model(
    config: Any,
    params: Mapping[str, Any],
    out: str | os.PathLike[str],
    format: str | None = None,
    dtype: str | None = None,
) -> tuple[str, list[str]]:
    """Writes a model's weights for PyTorch, whole or not at all.

    Args:
      config, params: of the model.
      out: a .safetensors file (a JSON is written beside it), or, for diffusers and taesd, a
        folder. Nothing that is there already is replaced.
      format: a name of `formats_of(config)`; the first unless given.
      dtype: of the stored numbers; as they were imported, or float32, unless given.

    Returns:
      the format, and what is lost in it, one line each.

    Raises:
      UserError: a format that does not hold such a model, units of the latent that diffusers'
        folder must state and nobody has, or a place that cannot be written.
    """
    allowed = formats_of(config)
    format = allowed[0] if format is None else format
    module = get_format(format)
    if format not in allowed:
        raise UserError(
            f"--format {format} does not hold a model of kind {config.model.kind}; allowed: "
            f"{', '.join(allowed)}"
        )
    out = Path(out)
    if module.FOLDER and out.suffix == ".safetensors":
        one = [f"--format {name}" for name in allowed if not FORMATS[name].FOLDER]
        raise UserError(
            f"format {format} writes a folder, and {out} names a file; give a folder"
            + (f", or {' or '.join(one)}" if one else "")
        )
    if module is diffusers and not units.is_stated(config):
        raise UserError(
            f"diffusers' {CONFIG} must say how the latent is scaled, and nobody has stated it: "
            f"{units.ways_to_state(config)}; 1 is --scaling-factor 1; --format ldm leaves it open"
        )
    return format, module.write(config, params, out, dtype)


def formats_of(config: Any) -> list[str]:
    """The formats that hold models of this kind, the natural one first."""
    return [name for name, module in FORMATS.items() if config.model.kind in module.KINDS]


def get_format(name: str) -> ModuleType:
    """The module of a format.

    Raises:
      UserError: listing the names.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: no such format; allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


def _require_supported(found: sources.Source, source: str | os.PathLike[str]) -> None:
    """Refuses autoencoders of other kinds by name, instead of listing what they lack."""
    part = re.compile(r"(?:^|\.)(?:en|de)coder\.")
    for name, tensor in found.tensors.items():
        what = ""
        if tensor.ndim == 5 and part.search(name):
            what = "a model of videos, with 3D convolutions"
        elif found.config is None:  # which would name its class
            what = next((what for what, pattern in _OTHERS.items() if pattern.search(name)), "")
        if what:
            raise UserError(
                f"{source} is {what} ({layout.printable(name)}); not supported: KL autoencoders, "
                "Aura's, TAESD and the original EFAE are"
            )


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
