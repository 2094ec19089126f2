"""Mean, standard deviation and quantiles of more numbers than fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

BINS = 16_384
# Bins are equally wide in asinh(x / SMALL): of constant width near zero, of constant ratio
# beyond. They reach to +-1e6.
SMALL = 0.01
REACH = float(np.arcsinh(1e6 / SMALL))


class ChannelStatistics:
    """Statistics per channel of numbers that come in parts, each seen once.

    Mean and variance are exact: sums in float64 of each part about its own mean, joined by
    Chan's formula. Quantiles come from a histogram of fixed bins, interpolated linearly
    within a bin: they are off by less than a bin, 0.25% of the value, or 2.5e-5 near zero.

    Args:
      channels: C.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.mean, self.square = np.zeros(channels), np.zeros(channels)
        self.least, self.most = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.histogram = np.zeros((channels, BINS), np.int64)

    def add(self, x: Float[np.ndarray, "... C"]) -> None:
        """Takes numbers in; none may be missing (NaN).

        Raises:
          ValueError: for numbers that are not finite.
        """
        x_NC = np.asarray(x, np.float64).reshape(-1, len(self.mean))
        if not len(x_NC):
            return
        if not np.isfinite(x_NC).all():
            raise ValueError("statistics: numbers that are not finite")
        mean = x_NC.mean(axis=0)
        self._join(len(x_NC), mean, np.square(x_NC - mean).sum(axis=0))
        self.least = np.minimum(self.least, x_NC.min(axis=0))
        self.most = np.maximum(self.most, x_NC.max(axis=0))
        position = (np.arcsinh(x_NC / SMALL) / REACH + 1) / 2 * BINS
        bins = np.clip(position.astype(np.int64), 0, BINS - 1) + BINS * np.arange(len(self.mean))
        self.histogram += np.bincount(bins.ravel(), minlength=self.histogram.size).reshape(
            self.histogram.shape
        )

    def merge(self, other: ChannelStatistics) -> None:
        """Takes in what another has seen."""
        self._join(other.count, other.mean, other.square)
        self.least = np.minimum(self.least, other.least)
        self.most = np.maximum(self.most, other.most)
        self.histogram += other.histogram

    def _join(self, count: int, mean: np.ndarray, square: np.ndarray) -> None:
        if not count:
            return
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * count / total
        self.square = self.square + square + difference**2 * self.count * count / total
        self.count = total

    @property
    def std(self) -> Float[np.ndarray, " C"]:
        """sqrt(sum (x - mean)^2 / N)."""
        return np.sqrt(self.square / max(self.count, 1))

    def quantiles(self, fractions: Sequence[float]) -> Float[np.ndarray, "Q C"]:
        """The values below which these fractions of each channel's numbers lie."""
        return np.stack(
            [self._quantiles(h, fractions, *limits) for h, *limits in zip(
                self.histogram, self.least, self.most, strict=True)], axis=1
        )  # fmt: skip

    def pooled_quantiles(self, fractions: Sequence[float]) -> Float[np.ndarray, " Q"]:
        """The same of all channels' numbers together."""
        limits = self.least.min(), self.most.max()
        return self._quantiles(self.histogram.sum(axis=0), fractions, *limits)

    @staticmethod
    def _quantiles(
        histogram: np.ndarray, fractions: Sequence[float], least: float, most: float
    ) -> np.ndarray:
        below = np.concatenate([[0], np.cumsum(histogram)])
        # Empty bins at the ends would make the inverse ambiguous at 0 and 1: limits end it.
        position = np.interp(np.asarray(fractions) * below[-1], below, np.arange(BINS + 1))
        return np.clip(SMALL * np.sinh((2 * position / BINS - 1) * REACH), least, most)

    def density(self, bins: int = 60) -> tuple[Float[np.ndarray, " K+1"], Float[np.ndarray, "C K"]]:
        """Edges of equally wide bins, and the density of each channel's numbers in them, to plot.

        The bins reach from the least 0.1% quantile of a channel to the greatest 99.9% quantile.
        The first and the last also hold what is beyond, at most 0.2% of a channel's numbers, so
        that the density integrates to 1. Where all numbers are about equal the bins together are
        as wide as 1% of them.
        """
        low, high = self.quantiles((0.001, 0.999))
        low, high = low.min(), high.max()
        width = max(high - low, 0.01 * max(abs(low), abs(high), SMALL))
        edges = (low + high) / 2 + np.linspace(-width / 2, width / 2, bins + 1)
        position = (np.arcsinh(edges / SMALL) / REACH + 1) / 2 * BINS
        position[0], position[-1] = 0, BINS
        below = np.pad(np.cumsum(self.histogram, axis=1), ((0, 0), (1, 0)))
        at_edges = np.stack([np.interp(position, np.arange(BINS + 1), b) for b in below])
        counts = np.diff(at_edges, axis=1)
        return edges, counts / self.count / np.diff(edges)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; `from_arrays` is the inverse."""
        names = ("count", "mean", "square", "least", "most", "histogram")
        return {name: np.asarray(getattr(self, name)) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ChannelStatistics:
        """What `arrays` gave."""
        made = cls(len(arrays["mean"]))
        for name in made.arrays():
            setattr(made, name, arrays[name].copy())
        made.count = int(made.count)
        return made
