"""Plots of the evaluation of one model or of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from efae_jax.report.comparing import letters
from efae_jax.report.records import Record, figure, label_of
from efae_jax.report.svg import FAINT, INK, PALE, WIDTH, colour, look, to_svg

SHOWN = 32  # channels that fit a plot
_MASS = 4e-3  # of the histograms' tails, left out of the plot


def spectra(records: Sequence[Record], name: str) -> Markup | None:
    """Energy of the latents and of the images over frequency, logarithmic.

    Args:
      records: of one model or of several; images that several share are drawn once.
      name: unique on the page.
    """
    latents = [_curve(record, "frequency", "latent") for record in records]
    images: list[Any] = []
    for curve in (_curve(record, "image_frequency", "image") for record in records):
        if curve and not any(all(map(np.array_equal, curve, other)) for other in images):
            images.append(curve)
    marks = letters(len(records)) if len(records) > 1 else ["latent"]
    lines = [(marks[i], colour(i), "-", curve) for i, curve in enumerate(latents) if curve]
    if not lines:
        return None
    lines += [("images", PALE, (0, (4, 2)), curve) for curve in images]
    with look():
        canvas = Figure(figsize=(WIDTH, 3.3))
        axis = canvas.add_axes((0.145, 0.145, 0.72, 0.825))
        axis.axhline(1, color=FAINT, lw=0.8, zorder=0)
        for _, tint, style, (frequency, energy) in lines:
            axis.plot(frequency, energy, color=tint, linestyle=style)
        axis.set(yscale="log", xlim=(0, 1), xlabel="frequency / highest", ylabel="energy / mean")
        _direct_labels(axis, [(mark, tint, c) for mark, tint, _, c in lines])
        return to_svg(canvas, name, "energy spectra of latents and images")


def histograms(record: Record, name: str, model: int = 0) -> Markup | None:
    """Every channel's distribution beside the normal one of the same mean and deviation.

    Args:
      record: of one model; its first `SHOWN` channels are drawn.
      name: unique on the page.
      model: its index, for the colour.
    """
    found = record["latent"].get("histogram")
    if not found:
        return None
    edges, density = np.asarray(found["edges"], float), np.asarray(found["density"], float)[:SHOWN]
    means, stds = (record["latent"].get(key) or [None] * len(density) for key in ("mean", "std"))
    columns = len(density) if len(density) < 3 else 2 if len(density) == 4 else 4
    rows = -(-len(density) // columns)
    low, high = _range(edges, density)
    ticks = _inner_ticks(low, high)
    with look():
        canvas = Figure(figsize=(WIDTH, rows * (0.92 if columns == 4 else 1.35) + 0.35))
        axes = canvas.subplots(rows, columns, squeeze=False)
        bottom = 0.33 / canvas.get_figheight()
        canvas.subplots_adjust(0.01, bottom, 0.99, 0.995, wspace=0.1, hspace=0.12)
        grid = np.linspace(low, high, 121)
        for c, axis in enumerate(axes.flat):
            if c >= len(density):
                axis.set_visible(False)
                continue
            peak = density[c].max() or 1
            axis.stairs(density[c] / peak, edges, fill=True, color=colour(model), alpha=0.25, lw=0)
            axis.stairs(density[c] / peak, edges, color=colour(model), lw=1)
            if means[c] is not None and stds[c]:
                z = (grid - means[c]) / stds[c]
                normal = np.exp(-z * z / 2) / (stds[c] * np.sqrt(2 * np.pi))
                axis.plot(grid, normal / peak, color=INK, lw=0.8, alpha=0.75)
            axis.set(xlim=(low, high), ylim=(0, 1.25), yticks=[], xticks=ticks)
            axis.spines["left"].set_visible(False)
            axis.text(0.03, 0.97, str(c), transform=axis.transAxes, va="top", color=PALE, size=9)
            axis.tick_params(length=2.5, labelbottom=c + columns >= len(density))
        return to_svg(canvas, name, "histograms of the latent's channels")


def correlations(record: Record, name: str) -> Markup | None:
    """The correlation matrix of the channels as a heat map, with numbers where they fit.

    Arguments as for `histograms`.
    """
    matrix = np.asarray(record["latent"].get("correlation") or [], float)
    if not len(matrix):
        return None
    with look():
        canvas = Figure(figsize=(WIDTH, 4.3))
        axis = canvas.add_axes((0.09, 0.1, 0.75, 0.87))
        heat = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
        if len(matrix) <= 8:
            for i, j in np.ndindex(*matrix.shape):
                tint = "white" if abs(matrix[i, j]) > 0.6 else INK
                text = f"{matrix[i, j]:.2f}".replace("-", "−")
                axis.text(j, i, text, ha="center", va="center", color=tint, size=9)
        for part in (axis.xaxis, axis.yaxis):
            _channel_ticks(part, len(matrix))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("channel")
        bar = canvas.colorbar(heat, cax=canvas.add_axes((0.87, 0.1, 0.03, 0.87)))
        bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["−1", "−0.5", "0", "0.5", "1"])
        bar.outline.set_visible(False)
        return to_svg(canvas, name, "correlation matrix of the latent's channels")


def moments(record: Record, name: str, model: int = 0) -> Markup | None:
    """Every channel's mean, with a standard deviation to both sides.

    Arguments as for `histograms`.
    """
    mean, std = (np.asarray(record["latent"].get(k) or [], float)[:SHOWN] for k in ("mean", "std"))
    if not len(mean) or len(mean) != len(std):
        return None
    with look():
        canvas = Figure(figsize=(WIDTH, 2.6))
        axis = canvas.add_axes((0.145, 0.185, 0.84, 0.785))
        position = np.arange(len(mean))
        axis.axhline(0, color=FAINT, lw=0.8, zorder=0)
        axis.vlines(position, mean - std, mean + std, color=colour(model), lw=1.6)
        axis.scatter(position, mean, s=14, color=colour(model), zorder=3)
        _channel_ticks(axis.xaxis, len(mean))
        axis.set(xlim=(-0.7, len(mean) - 0.3), xlabel="channel", ylabel="mean ± std")
        return to_svg(canvas, name, "mean and standard deviation of the latent's channels")


def by_transformation(records: Sequence[Record], name: str, key: str, label: str) -> Markup | None:
    """A figure of every model and transformation: a dot each, a row a transformation.

    Args:
      records: of several models.
      name: unique on the page.
      key: of the figure in a transformation.
      label: of the axis.
    """
    rows = {t["name"]: label_of(t) for record in records for t in record["transformations"]}
    values = [{t["name"]: figure(t, key) for t in record["transformations"]} for record in records]
    if all(value is None for of in values for value in of.values()):
        return None
    count = len(records)
    gap = 0.8 / max(count, 3)  # the models of a row lie a little apart, A on top
    with look():
        canvas = Figure(figsize=(WIDTH, 0.6 + len(rows) * (0.16 + 0.11 * count)))
        bottom = 0.5 / canvas.get_figheight()
        axis = canvas.add_axes((0.27, bottom, 0.69, 0.995 - bottom))
        for r in range(0, len(rows), 2):
            axis.axhspan(r - 0.5, r + 0.5, color="#f4f4f7", lw=0, zorder=0)
        axis.grid(axis="x", color=FAINT, lw=0.6, zorder=0)
        for i, (letter, of) in enumerate(zip(letters(count), values, strict=True)):
            for r, row in enumerate(rows):
                if of.get(row) is None:
                    continue
                place = of[row], r + (i - (count - 1) / 2) * gap
                axis.scatter(*place, s=26, color=colour(i), zorder=3, clip_on=False)
                axis.annotate(
                    letter, place, (6, 0), textcoords="offset points", va="center", size=8,
                    color=colour(i), annotation_clip=False,
                )  # fmt: skip
        axis.set_yticks(range(len(rows)), labels=list(rows.values()), color=INK, parse_math=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.tick_params(length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
        if key == "error":
            axis.set_xlim(left=0)
        axis.set_xlabel(label)
        return to_svg(canvas, name, f"{label} by transformation")


def _curve(record: Record, frequency: str, energy: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Frequencies and energies; those that are not positive have no logarithm."""
    found = record["latent"].get("spectrum") or {}
    x, y = (np.asarray(found.get(key) or [], float) for key in (frequency, energy))
    kept = np.isfinite(y) & (y > 0)
    return (x[kept], y[kept]) if kept.any() else None


def _direct_labels(axis: Axes, lines: list[tuple[str, str, Any]]) -> None:
    """Each curve's name beside its end, off the other names."""
    low, high = np.log(axis.get_ylim())
    ends = sorted(
        ((np.log(y[-1]) - low) / (high - low), mark, tint) for mark, tint, (_, y) in lines
    )
    place = -1.0
    for end, mark, tint in ends:
        place = max(end, place + 0.065)
        axis.text(
            1.02, place, mark, color=tint, va="center", transform=axis.transAxes, weight="bold"
        )


def _range(edges: np.ndarray, density: np.ndarray) -> tuple[float, float]:
    """Where nearly all numbers lie."""
    mass = (density * np.diff(edges)).sum(axis=0)
    below = np.concatenate([[0], np.cumsum(mass)]) / max(mass.sum(), 1e-300)
    low = edges[max(np.searchsorted(below, _MASS / 2, side="right") - 1, 0)]
    high = edges[min(np.searchsorted(below, 1 - _MASS / 2), len(edges) - 1)]
    return float(low), float(high)


def _inner_ticks(low: float, high: float) -> list[float]:
    """Two round numbers or a few more, so far from the ends that labels miss the neighbour's."""
    margin = 0.14 * (high - low)
    for count in range(3, 12):
        ticks = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
        inner = [tick for tick in ticks if low + margin <= tick <= high - margin]
        if len(inner) > 1:
            break
    return inner


def _channel_ticks(axis: Any, count: int) -> None:
    axis.set_ticks(range(0, count, 1 if count <= 16 else 4 if count <= 32 else -(-count // 8)))
