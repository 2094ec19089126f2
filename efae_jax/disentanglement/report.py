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


class Line(NamedTuple):
    """One row: its name, its part ("semantic", ...), how many channels, draws [N] by figure."""

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
    return figures_table(title, ["channels", "", *heads], rows)


def words(record: dict[str, Any]) -> list[str]:
    """What the basis costs, and how near to normal the channels are before it and in it."""
    trained = record.get("trained_orthogonality_error", record["orthogonality_error"])
    there = record["reconstruction"]
    decoded = there.get("missing") or (
        f"decode(QᵀQ z) against decode(z): {there['psnr']:.0f} dB, {there['images']} images"
    )
    back = record["latent"]["reconstruction_error"]
    return [
        f"max |QᵀQ - 1|: {record['orthogonality_error']:.1e} (of the matrix as trained "
        f"{trained:.1e}); |QᵀQ z - z| / |z|: {back:.1e}; {decoded}",
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
    """R^2 of captions and of styles from every part of the channels, as a picture."""
    rows = lines(record)
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 0.36 * len(rows) + 1.15), sharey=True)
    heights = [-(i + 0.5 * (i >= 3)) for i in range(len(rows))]
    for axis, (target, label) in zip(axes, TARGETS.items(), strict=True):
        for line, y in zip(rows, heights, strict=True):
            values = line.values[target, "r2"]
            colour = COLOURS[line.part]
            axis.plot(values, [y] * len(values), "o", ms=6, color=colour, mec="white", mew=0.6)
            shown = f"{values.mean():.3f}"
            axis.annotate(
                shown, (values.max(), y), (7, 0), textcoords="offset points", va="center",
                fontsize=8.5, color=colour if line.part in ("semantic", "style") else PALE,
            )  # fmt: skip
        axis.set_title(f"R² of the {label}", fontsize=10, color=INK, loc="left")
        axis.set_yticks(heights, [f"{line.name}  {line.channels}" for line in rows], fontsize=9)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.tick_params(axis="x", labelsize=8, color=GREY, labelcolor=PALE)
        axis.grid(axis="x", color="#ececf0", lw=0.8)
        axis.set_axisbelow(True)
        axis.margins(x=0.18)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(GREY)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
