"""`python -m efae_jax probe`: measures any basis on pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from efae_jax.basis import Basis
from efae_jax.data.pairs import Pairs
from efae_jax.disentanglement import probes
from efae_jax.disentanglement.judge import measure, write
from efae_jax.errors import UserError
from efae_jax.logs import make_output_folder
from efae_jax.sharding import fitting_devices, make_mesh


class Settings(NamedTuple):
    """How a basis is measured; see `measure.Measurement` and `probes.Settings`."""

    batch_size: int = 64
    num_images: int = 0
    draws: int = 5
    limit: float = 3.0
    steps: int = 2_000
    lr: float = 3e-3
    width: int = 16
    seed: int = 0


def probe(basis: Basis, folder: str | Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Measures a basis on the pairs of a folder; prints the table, writes figures and a picture.

    Args:
      basis: of the channels of those latents.
      folder: that `embed` has completed.
      out: a folder.
      settings: of the measurement.

    Returns:
      what `figures.json` holds.

    Raises:
      UserError: for what is not there or does not fit.
    """
    for name, least in (("steps", 1), ("draws", 2), ("width", 1), ("num_images", 0), ("limit", 0)):
        if not getattr(settings, name) >= least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(settings, name)}: it must be at least {least}")
    if not settings.lr > 0:
        raise UserError(f"--lr {settings.lr}: it must be positive")
    pairs = Pairs(folder)
    channels = pairs.summary["latents"]["shape"][-1]
    if basis.channels != channels:
        raise UserError(
            f"--basis {basis.source} is of {basis.channels} channels, the latents in {folder} have "
            f"{channels}"
        )
    devices = fitting_devices(jax.devices(), settings.batch_size)
    if settings.batch_size < 1 or settings.batch_size % len(devices):
        raise UserError(
            f"--batch-size {settings.batch_size} must be a positive multiple of the "
            f"{len(devices)} devices"
        )
    make_output_folder(out)
    s = settings
    found = measure(
        pairs,
        basis.matrix,
        basis.semantic,
        make_mesh(devices=devices),
        probes.Settings(width=s.width, steps=s.steps, lr=s.lr, seed=s.seed),
        batch_size=s.batch_size,
        draws=s.draws,
        clip=s.limit,
        num_images=s.num_images,
    )
    found = {"basis": basis.source, **found}
    write(found, out)
    return found
