"""`python -m efae_jax evaluate`: one pass over the images, then figures, pictures and a page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax

from efae_jax import groups, report
from efae_jax.api import load
from efae_jax.convert import feature_statistics
from efae_jax.data.chosen import choose_images
from efae_jax.data.left_out import account_lines
from efae_jax.errors import UserError
from efae_jax.evaluation.networks import Networks
from efae_jax.evaluation.protocols import DEFAULT, find_protocol
from efae_jax.evaluation.run import UNFINISHED, Run, Settings
from efae_jax.evaluation.tally import PLAIN
from efae_jax.logs import console, say, waiting
from efae_jax.metrics.principal import to_rgb
from efae_jax.panels import picture
from efae_jax.pictures import to_pixels
from efae_jax.report.gallery import FOLDER as PICTURES


def evaluate(
    source: str | Path,
    out: str | Path,
    *,
    settings: Settings | None = None,
    step: int | None = None,
    dtype: str | None = None,
    name: str | None = None,
    devices: Any = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Evaluates a model: `evaluation.json`, `evaluation.csv`, `index.html` and `pictures/`.

    The figures depend neither on the batch size nor on the number of devices, up to the rounding
    of the model. The same call goes on where it was stopped.

    Args:
      source, step, dtype, scaling_factor, shift_factor: for `efae_jax.load`.
      out: a folder that holds no finished evaluation, the same for all processes.
      settings: how; as their defaults say unless given.
      name: of the model in tables; `source` unless given.
      devices: all of them unless told otherwise.
      where: as for `data.chosen.choose_images`; the model's held-out images unless given.

    Returns:
      what `evaluation.json` holds; on processes other than the first, which writes, nothing.

    Raises:
      UserError: for what is not there or does not fit.
      RunError: when the model gives numbers that are not finite, or no image could be read.
    """
    start, out, settings = time.monotonic(), Path(out), settings or Settings()
    _check(settings, out)
    with waiting("reading the weights") as note:
        networks = Networks(settings.frechet, settings.inception, settings.perceptual_weights)
        reference = _reference(settings, networks)
        note(f"reading {source}")
        units = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        model = load(source, step, dtype, **units)
    model.require("evaluate")
    chosen = choose_images(model.config.data, default_split="test", **where)
    run = Run(model, networks, chosen, settings, out, devices)
    if reference is not None and reference.about.get("size", list(run.size)) != list(run.size):
        raise UserError(
            f"--reference {settings.reference}: of images of {reference.about['size']}, not "
            f"{list(run.size)}"
        )
    prepared = {"prepared": run.protocol.images}
    if reference is not None and reference.about:
        # Statistics of before there were protocols are of images as the default prepares them.
        there = reference.about.get("prepared", find_protocol(DEFAULT).images)
        if there != run.protocol.images:
            raise UserError(
                f"--reference {settings.reference}: of images prepared otherwise ({there}) than "
                f"--protocol {settings.protocol} does"
            )
    run.go(start)
    if jax.process_index() != 0:
        return {}
    found = run.record(name or str(source), reference)
    _write(out, found, run)
    if settings.save_reference:
        feature_statistics.save_statistics(
            settings.save_reference,
            run.tally.features[PLAIN]["target"],
            networks.frechet,
            found["data"] | prepared,
        )
    for table in report.report_tables([found]):
        console.print(table)
    for line in account_lines(found["data"]["read"]):
        say(line)
    say(f"page, figures and pictures: {out}/index.html, {report.FILE}, evaluation.csv, pictures/")
    return found


def _write(out: Path, found: dict[str, Any], run: Run) -> None:
    for n, z in enumerate(run.tally.shown):
        if z.ndim == 3:
            colours = to_rgb(z, run.tally.moments.mean, run.tally.moments.covariance)
            image = to_pixels(2 * colours - 1)
            picture(image).save(out / PICTURES / f"pca-{n}.png")
    report.write_csv([found], out / "evaluation.csv")
    report.write_page([(found, out)], out / "index.html")
    temporary = out / f".{report.FILE}.partial"
    temporary.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    temporary.replace(out / report.FILE)
    (out / UNFINISHED).unlink(missing_ok=True)


def _reference(settings: Settings, networks: Networks) -> Any:
    if (settings.reference or settings.save_reference) and networks.frechet is None:
        raise UserError(f"no features to compare are computed: {networks.missing['frechet']}")
    if settings.save_reference and Path(settings.save_reference).exists():
        raise UserError(f"--save-reference {settings.save_reference}: is there already")
    if not settings.reference:
        return None
    return feature_statistics.read_statistics(settings.reference, networks.frechet, networks.size)


def _check(settings: Settings, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if (out / report.FILE).exists():
        raise UserError(f"--out {out} holds a finished evaluation; give another folder")
    find_protocol(settings.protocol).choose_latent(settings.protocol, settings.latent)
    if settings.latent not in (None, "sample", "mean"):
        raise UserError(f"--latent {settings.latent}: allowed are sample, mean")
    if settings.resampling not in groups.RESAMPLINGS:
        raise UserError(
            f"--resampling {settings.resampling}: allowed are {', '.join(groups.RESAMPLINGS)}"
        )
    for option, least in (("num_images", 0), ("pictures", 1), ("max_bad", 0), ("seed", 0)):
        if getattr(settings, option) < least:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} {getattr(settings, option)} must be at least {least}")
