"""From sums to the record of an evaluation, every choice in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from efae_jax.convert.feature_statistics import SavedStatistics
from efae_jax.evaluation.protocols import Protocol, find_protocol
from efae_jax.evaluation.tally import PLAIN, Tally
from efae_jax.evaluation.transformations import Transformation
from efae_jax.metrics.frechet import frechet_distance
from efae_jax.metrics.intrinsic_dimension import two_nn
from efae_jax.metrics.spectrum import spectrum_figures
from efae_jax.models.frechet_features import PROTOCOLS

QUALITY = ("psnr", "ssim", "lpips")


def protocol(
    name: str,
    latent: str,
    *,
    resampling: str,
    frechet: str | None,
    reference: str | None,
    is_flow: bool,
) -> dict[str, str]:
    """What was computed, choice by choice."""
    chosen = find_protocol(name)
    words = {
        "name": name,
        "source": chosen.source,
        "images": chosen.images,
        "latent": "a sample of the posterior, drawn by the seed and the image's number"
        if latent == "sample"
        else "the posterior's mean",
        "pixels": "8 bits by clamp(127.5 x + 128, 0, 255), the fraction cut off",
        "psnr": "per image, of 8-bit pixels, mean over images; equal images count as 106 dB",
        "ssim": f"per image, of floats {_ssim(chosen)}, Gaussian window of 11 pixels, mean over "
        "all positions, images continued by reflection (torchmetrics from 1.4.2 on); mean over "
        "images",
        "lpips": "VGG16, of floats neither clipped nor rounded; mean over images",
    }
    if frechet is not None:
        seen = ", of floats neither clipped nor rounded" if frechet == "vgg16" else ", of 8 bits"
        against = f"; against the statistics in {reference}" if reference else ""
        words["frechet"] = PROTOCOLS[frechet] + seen + against
    words |= {
        "equivariance error": "|t E(x) - E(t x)|^2 / |E(t x)|^2 with E the posterior's mean; mean "
        "over images, and over the transformations of a kind",
        "transformed": "figures of decode(t E(x)) against t x; rotations, counter-clockwise, and "
        "flips are undone before they are compared, as LPIPS and the Frechet distance look through "
        "networks that know upright images (PSNR and SSIM do not change by it); "
        f"scalings resample images and latents, {resampling.replace('_', ', ')}"
        + ("" if "antialiased" in resampling or resampling == "bicubic" else ", not antialiased"),
        "latent space": "of the latents that are decoded, in the model's own units",
    }
    if is_flow:
        words["noise"] = "that the sampler starts from is turned along with the images"
    return words


def _ssim(chosen: Protocol) -> str:
    if chosen.ssim_range is None:
        return "neither clipped nor rounded, data range that of the pair's own values"
    low, high = chosen.ssim_range
    return f"clipped to [{low:g}, {high:g}], data range {high - low:g}"


def reconstruction(tally: Tally, reference: SavedStatistics | None) -> dict[str, float | None]:
    """Of decode(E(x)) against x."""
    found = {name: tally.mean(PLAIN, name) for name in QUALITY}
    return found | {"frechet": _frechet(tally, PLAIN, reference)}


def transformed(
    tally: Tally, t: Transformation, reference: SavedStatistics | None
) -> dict[str, Any]:
    """A row of the table of transformations."""
    row: dict[str, Any] = {"name": t.name, "kind": t.kind, "label": t.label}
    row |= {name: tally.mean(t.name, name) for name in ("error", *QUALITY)}
    # Statistics that were saved are those of images as they are, not scaled.
    against = reference if t.scale is None else None
    return row | {"frechet": _frechet(tally, t.name, against)}


def errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean equivariance error of each kind of transformations."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {k: float(np.mean([r["error"] for r in rows if r["kind"] == k])) for k in kinds}


def latent_space(tally: Tally, labelled: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of the latents, and what could not be had and why."""
    edges, density = tally.channels.density()
    found: dict[str, Any] = tally.moments.figures()
    found["histogram"] = {"edges": edges.tolist(), "density": density.tolist()}
    missing = {}
    if tally.spectra:
        found |= spectrum_figures(**tally.spectra)
    else:
        missing["spectrum"] = "the latent has no positions"
    found |= {"intrinsic_dimension": None, "velocity_irreducible_variance": None}
    try:
        nearest = two_nn(tally.points.points)
        found["intrinsic_dimension"] = nearest.dimension
        found["intrinsic_dimension_images"] = nearest.points
    except ValueError as error:  # too few images
        missing["intrinsic_dimension"] = str(error)
    try:
        if not labelled:
            raise ValueError("the data have no labels")
        variance = tally.classes.velocity_irreducible_variance(tally.moments.std)
        found["velocity_irreducible_variance"] = variance._asdict()
    except ValueError as error:
        missing["velocity_irreducible_variance"] = str(error)
    return found, missing


def _frechet(tally: Tally, name: str, reference: SavedStatistics | None) -> float | None:
    decoded = tally.features[name]["decoded"]
    if decoded.count < 2:
        return None
    if reference is None:  # what was turned back is compared with the images as they are
        reference = tally.features[name].get("target", tally.features[PLAIN]["target"])
    return frechet_distance(decoded, reference)
