"""The figures of a basis as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from rich.table import Table

from efae_jax.logs import figures_table

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

INK, PALE, GREY = "#1b1b1f", "#6b6b76", "#b9b9c3"
COLOURS = {"semantic": "#2f6fde", "style": "#d9722e", "random": GREY, "raw": "#5b5b66"}
FIGURES = {"r2": "R²", "recall_1": "R@1", "recall_5": "R@5"}
SPACES = {"raw": "raw channels", "basis": "channels of the basis"}
TARGETS = {"caption": "caption embedding", "style": "style embedding"}
TOLD = {"semantic": "caption", "style": "style"}  # what a part should tell
SPAN = 0.05  # of R^2, that a picture shows at least


class Line(NamedTuple):
    """One row: its name, part ("semantic", ...), number of channels, draws [N] of each figure."""

    name: str
    part: str
    channels: int
    values: dict[tuple[str, str], np.ndarray]


def lines(record: dict[str, Any]) -> list[Line]:
    """The rows: each part of the basis, then as many random channels and the best raw ones."""
    found = []
    for part in ("semantic", "style"):
        raw = f"raw {part}"
        channels = ", ".join(map(str, record["raw"][raw]))
        best = f"best raw ({channels})" if len(record["raw"][raw]) <= 4 else "best raw"
        found += [
            _line(record, part, part, [part]),
            _line(record, "random", "random", _draws(record, part)),
            _line(record, best, "raw", [raw]),
        ]
    return found


def _draws(record: dict[str, Any], part: str) -> list[str]:
    return [name for name in record["parts"] if name.startswith(f"random {part} ")]


def _line(record: dict[str, Any], name: str, part: str, names: list[str]) -> Line:
    rows = [record["parts"][n] for n in names]
    values = {
        (target, figure): np.array([row[target][figure] for row in rows])
        for target in TARGETS
        for figure in FIGURES
    }
    return Line(name, part, rows[0]["channels"], values)


def table(record: dict[str, Any]) -> Table:
    """R^2 and recall of captions and styles from every part; mean and std (N - 1) of draws."""

    def cell(values: np.ndarray) -> str:
        spread = f" ±{values.std(ddof=1):.3f}" if len(values) > 1 else ""
        return f"{values.mean():.3f}{spread}"

    rows = [
        [line.name, str(line.channels), *(cell(values) for values in line.values.values())]
        for line in lines(record)
    ]
    heads = [f"{target} {label}" for target in TARGETS for label in FIGURES.values()]
    images = record["images"]["held_out"]
    title = f"what channels tell of {images:,} held-out images (R@k: recall among the k nearest)"
    return figures_table(title, ["channels", "#", *heads], rows)


def words(record: dict[str, Any]) -> list[str]:
    """What the basis costs, and how near to normal the channels are before it and in it."""
    trained = record.get("trained_orthogonality_error")
    before = "" if trained is None else f" (of the matrix as trained {trained:.1e})"
    there = record["reconstruction"]
    decoded = there.get("missing") or (
        f"decode(QᵀQ z) against decode(z): {there['psnr']:.0f} dB, {there['images']} images"
    )
    back = record["latent"]["reconstruction_error"]
    return [
        f"max |QᵀQ - 1|: {record['orthogonality_error']:.1e}{before}; "
        f"|QᵀQ z - z| / |z|: {back:.1e}; {decoded}",
        *(f"{label}: {_moments(record['latent'][name])}" for name, label in SPACES.items()),
    ]


def _moments(figures: dict[str, Any]) -> str:
    shown = [
        f"{label} {min(figures[name]):.2f} to {max(figures[name]):.2f}"
        for name, label in (
            ("mean", "mean"),
            ("std", "std"),
            ("excess_kurtosis", "excess kurtosis"),
        )
    ]
    return f"{', '.join(shown)}, mean |correlation| {figures['mean_abs_correlation']:.2f}"


def draw(record: dict[str, Any], path: Path) -> None:
    """R^2 of captions and of styles from every part of the channels, as a picture.

    A line is a mean, dots are draws. The axes hold 0, what the mean of the training pairs tells, so
    that small differences look small.
    """
    rows = lines(record)
    heights = [-(i + 0.5 * (i >= len(rows) // 2)) for i in range(len(rows))]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 0.34 * len(rows) + 1.1), sharey=True)
    for axis, (target, label) in zip(axes, TARGETS.items(), strict=True):
        drawn = [line.values[target, "r2"] for line in rows]
        low, high = (f(0, *(f(values) for values in drawn)) for f in (min, max))
        span = max(high - low, SPAN)
        axis.set_xlim(low - 0.04 * span, low + 1.36 * span)  # the figures want their place
        axis.axvline(0, color=GREY, lw=0.8, zorder=1)
        for line, values, y in zip(rows, drawn, heights, strict=True):
            colour, mean = COLOURS[line.part], values.mean()
            if len(values) > 1:
                axis.plot([mean] * 2, [y - 0.26, y + 0.26], color=PALE, lw=1.6, zorder=3)
            size = 5 if len(values) > 1 else 7
            axis.plot(values, [y] * len(values), "o", ms=size, color=colour, mec="white", mew=0.6,
                      zorder=4)  # fmt: skip
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            axis.annotate(
                f"{mean:.3f}{spread}".replace("-", "\u2212"), (values.max(), y), (7, 0),
                textcoords="offset points", va="center", fontsize=8.5,
                color=colour if line.part in TOLD else PALE,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                fontweight="bold" if TOLD.get(line.part) == target else "normal",
            )  # fmt: skip
        axis.set_title(f"R² of the {label}", fontsize=10, color=INK, loc="left")
        axis.set_yticks(heights, [f"{line.channels} {line.name}" for line in rows], fontsize=9)
        axis.set_ylim(min(heights) - 0.6, 0.6)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.tick_params(axis="x", labelsize=8, color=GREY, labelcolor=PALE)
        axis.locator_params(axis="x", nbins=6)
        left, right = axis.get_xlim()
        axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= min(right, 1)])
        axis.grid(axis="x", color="#ececf0", lw=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(GREY)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
