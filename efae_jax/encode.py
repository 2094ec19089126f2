"""`python -m efae_jax encode`: latents of a data source, and what the command prints of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from efae_jax.api import Model, load
from efae_jax.checkpoint import save_model
from efae_jax.data import make_transform
from efae_jax.data.chosen import choose_images
from efae_jax.data.latents import SUMMARY
from efae_jax.data.left_out import account_lines
from efae_jax.data.splits import Source
from efae_jax.data.transforms import Transform
from efae_jax.errors import UserError
from efae_jax.extract import Extractor, Settings
from efae_jax.logs import console, figures_table, say


def make_source(
    model: Model, data: str | None = None, *, size: int | None = None, **where: Any
) -> tuple[Source, Transform, dict[str, Any]]:
    """The images to encode, the way of each into a batch, and a description of both.

    Args:
      model: for what is not given, its config's.
      data, where: as for `data.chosen.choose_images`; of the config's source, "train" unless given.
      size: of the square that the encoder takes (shorter side resized, centre crop).

    Raises:
      UserError: for what is not there or does not fit.
    """
    source, config, described = choose_images(
        model.config.data, data, size=size, default_split="train", **where
    )
    if size is None:
        # An encoder that sees shrunken images gets them read at that size.
        shrink = model.config.model.get("shrink", 1)
        with config.unlocked():
            config.size = tuple(n // shrink for n in config.size)
    height, width = config.size
    if model.factor is not None and any(n < 1 or n % model.factor for n in config.size):
        raise UserError(
            f"images of {height}x{width} cannot be encoded: both sides must be positive "
            f"multiples of {model.factor}; see --size"
        )
    described["size"] = list(config.size)
    return source, make_transform(config, train=False), described


def encode_source(
    model_source: str | Path,
    out: Path,
    *,
    settings: Settings,
    batch_size: int | None = None,
    max_bad: int = 100,
    dtype: str | None = None,
    store: Path | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    **where: Any,
) -> dict[str, Any]:
    """The command: encodes, prints the statistics, returns what `latents.json` holds.

    Args:
      model_source, dtype, scaling_factor, shift_factor: for `efae_jax.load`.
      out, settings, batch_size, max_bad: as for `Extractor`.
      store: a new work directory for the model with the mean and std per channel that were
        found as its normalisation (scaling 1, no shift).
      where: as for `make_source`.
    """
    if store is not None:
        _check_store(store, settings)
    model = load(
        model_source, dtype=dtype, scaling_factor=scaling_factor, shift_factor=shift_factor
    )
    model.require("encode", ["encoder"])
    source, transform, described = make_source(model, **where)
    extractor = Extractor(
        model,
        source,
        transform,
        described,
        out,
        settings,
        batch_size=batch_size,
        max_bad=max_bad,
    )
    height, width = transform.size
    say(f"encoding {len(source):,} images, resized and cropped to {height}x{width} (see --size)")
    extractor.run(jax.process_index(), jax.process_count())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("latents")  # until every process has its shards
    summary = extractor.finish()
    if jax.process_index() == 0:
        _report(summary, out)
        if store is not None:
            store_statistics(model, summary, store)
            say(f"model with this mean and std: {store}")
    return summary


def _check_store(store: Path, settings: Settings) -> None:
    why = ""
    if store.exists():
        why = "is there already; give a new directory"
    elif settings.normalised:
        why = "the mean and std of normalised latents are not those of the model's own"
    elif jax.process_count() > 1:
        why = "give the command again in one process once the latents are there, with this option"
    if why:
        raise UserError(f"--store {store}: {why}")


def store_statistics(model: Model, summary: dict[str, Any], workdir: Path) -> None:
    """Saves a model whose `normalise` uses the mean and std of a summary, as a work directory.

    Raises:
      UserError: when the directory is there already.
    """
    if workdir.exists():
        raise UserError(f"{workdir} is there already; give a new directory")
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.latent.scaling, config.latent.shift = 1.0, 0.0
        config.latent.mean, config.latent.std = tuple(summary["mean"]), tuple(summary["std"])
        config.latent.stated = True
        # These take the place of FLUX.2's.
        for packed in {"patch", "variance", "eps"} & set(config.latent):
            del config.latent[packed]
    params = {"autoencoder": jax.device_get(model.params)}
    save_model(workdir, params, json.loads(config.to_json_best_effort()))


def _report(summary: dict[str, Any], out: Path) -> None:
    shown = ("0.001", "0.05", "0.5", "0.95", "0.999")
    per_channel = zip(
        summary["mean"],
        summary["std"],
        *(summary["quantiles"][name] for name in shown),
        strict=True,
    )
    rows = [[str(i), *(f"{value:.4f}" for value in row)] for i, row in enumerate(per_channel)]
    title = f"{summary['images']:,} latents of {'x'.join(map(str, summary['shape']))}"
    if len(rows) <= 32:
        names = [f"{100 * float(name):g}%" for name in shown]
        console.print(figures_table(title, ["channel", "mean", "std", *names], rows))
    else:
        say(title)
    if not summary["normalised"]:
        say("as the units of a diffusion model (--store WORKDIR keeps them with the model):")
        for name in ("mean", "std"):
            values = ", ".join(f"{value:.6g}" for value in summary[name])
            say(f"--config.latent.{name}='({values},)'")
    for line in account_lines(summary["read"]):
        say(line)
    say(f"latents, and their statistics in {SUMMARY}: {out}")
