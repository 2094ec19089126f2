"""The figures of a latent space: names, formulas, and what a small or a large one means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from efae_jax.report.comparing import words
from efae_jax.report.figures import MISSING, number
from efae_jax.report.records import Record, figure

_VELOCITY = "velocity_irreducible_variance"


class LatentFigure(NamedTuple):
    """A figure of the latents.

    key: in `latent` of a record and in its protocol; label: in print; meaning: a formula and
    what small and large say, as HTML; text: the figure in print; note: what it is taken of.
    """

    key: str
    label: str
    meaning: Markup
    text: Callable[[Record], str]
    note: Callable[[Record], str]


def latent_figures(records: Sequence[Record]) -> list[LatentFigure]:
    """The figures that any of the records has, or gives a reason for not having."""
    asked = [
        LatentFigure("std", "standard deviation", _STD, _spread("std"), _range("std")),
        LatentFigure("excess_kurtosis", "excess kurtosis", _KURTOSIS, _spread("excess_kurtosis"),
                     _range("excess_kurtosis")),
        LatentFigure("mean_abs_correlation", "channels' correlation", _CORRELATION,
                     _plain("mean_abs_correlation", 3), lambda r: ""),
        LatentFigure("high_frequency", "high-frequency energy", _HIGH,
                     _plain("high_frequency", 3), _images),
        LatentFigure("intrinsic_dimension", "intrinsic dimension", _DIMENSION,
                     _plain("intrinsic_dimension", 1), _of_numbers),
        LatentFigure(_VELOCITY, "velocity irreducible variance", _VARIANCE,
                     lambda r: number(figure(r, "latent", _VELOCITY, "value"), 1), _per_dimension),
    ]  # fmt: skip
    return [
        f
        for f in asked
        if any(r["latent"].get(f.key) is not None or f.key in r["missing"] for r in records)
    ]


_STD = Markup(
    "σ<sub>c</sub> of every channel over images and positions, and its mean over channels. A "
    "channel far below the others carries little; diffusion models are trained on latents scaled "
    "to about 1."
)
_KURTOSIS = Markup(
    "E[(z − μ)<sup>4</sup>] / σ<sup>4</sup> − 3 of every channel, and its mean over channels. 0: "
    "tails as of a normal distribution; large: rare values far out."
)
_CORRELATION = Markup(
    "mean |corr(z<sub>i</sub>, z<sub>j</sub>)| over pairs of channels i ≠ j. 0: none follows "
    "linearly from another; 1: all say the same."
)
_HIGH = Markup(
    "share of the energy of the discrete cosine transform, without the constant, at or above half "
    "the highest frequency along either axis: what halving the resolution loses. Photographs: some "
    "per cent; white noise: 3/4. A latent far above its images is harder to generate by diffusion "
    "(arXiv 2502.14831)."
)
_DIMENSION = Markup(
    "TwoNN: d for which the ratios r<sub>2</sub>/r<sub>1</sub> of the distances to the second and "
    "the first nearest latent exceed μ with probability μ<sup>−d</sup>. Small: latents lie near a "
    "surface of few dimensions. It depends on the number of images, and is too low where the "
    "dimension is high."
)
_VARIANCE = Markup(
    "I = (π/2) Σ<sub>i</sub> √λ<sub>i</sub>, λ<sub>i</sub> the eigenvalues of the covariance of a "
    "class, positions × channels, averaged over classes (arXiv 2606.03578): the part of the "
    "velocity, on straight paths from noise, that no model can know. Small: easier to generate. "
    "At channels of standard deviation 1 it is at most π/2 per dimension."
)


def _plain(key: str, digits: int) -> Callable[[Record], str]:
    return lambda record: number(figure(record, "latent", key), digits)


def _spread(key: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        values = record["latent"].get(key)
        return number(float(np.mean(values)), 2) if values else MISSING

    return text


def _range(key: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        values = record["latent"].get(key)
        return f"channels {number(min(values), 2)} to {number(max(values), 2)}" if values else ""

    return text


def _images(record: Record) -> str:
    value = figure(record, "latent", "high_frequency_image")
    return "" if value is None else f"the images: {number(value, 3)}"


def _of_numbers(record: Record) -> str:
    count = figure(record, "latent", "intrinsic_dimension_images")
    shape = record["model"].get("latent_shape")
    said = [f"of {math.prod(shape):,} numbers"] if shape else []
    return ", ".join([*said, *([f"{words(count)} images"] if count else [])])


def _per_dimension(record: Record) -> str:
    each = figure(record, "latent", _VELOCITY, "per_dimension")
    classes = figure(record, "latent", _VELOCITY, "classes")
    said = [f"per dimension {number(each, 3)}"] if each is not None else []
    if classes:
        said.append(f"{words(classes)} classes")
    if (record["latent"].get(_VELOCITY) or {}).get("determined") is False:
        said.append("too low, for want of images of a class")
    return ", ".join(said)
