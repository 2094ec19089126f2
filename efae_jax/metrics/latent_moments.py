"""Moments of latents' channels over all positions of all images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

# A channel that varies by less than this part of its mean does so by rounding alone.
CONSTANT = 1e-12


class LatentMoments:
    """Mean, covariance and kurtosis of channels, of latents that come in parts, each seen once.

    Sums in float64 of the first four powers of the distance from the mean, each part about its
    own mean, joined by the formulas of Pébay (2008, Sandia report SAND2008-6212).

    Args:
      channels: C.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.mean = np.zeros(channels)
        self.products = np.zeros((channels, channels))  # sum of (x - mean) (x - mean)^T
        self.cubes, self.fourths = np.zeros(channels), np.zeros(channels)

    def add(self, z: Float[np.ndarray, "... C"]) -> None:
        """Takes latents in: [N, h, w, C] or [N, C].

        Raises:
          ValueError: for numbers that are not finite.
        """
        z_NC = np.asarray(z, np.float64).reshape(-1, len(self.mean))
        if not len(z_NC):
            return
        if not np.isfinite(z_NC).all():
            raise ValueError("latent moments: numbers that are not finite")
        part = LatentMoments(len(self.mean))
        part.count, part.mean = len(z_NC), z_NC.mean(axis=0)
        x_NC = z_NC - part.mean
        square_NC = x_NC * x_NC
        part.products = x_NC.T @ x_NC
        part.cubes, part.fourths = (square_NC * x_NC).sum(axis=0), (square_NC**2).sum(axis=0)
        self.merge(part)

    def merge(self, other: LatentMoments) -> None:
        """Takes in what another has seen."""
        a, b, n = self.count, other.count, self.count + other.count
        if not b:
            return
        d = other.mean - self.mean
        squares_a, squares_b = self.products.diagonal(), other.products.diagonal()
        self.fourths = (
            (self.fourths + other.fourths)
            + d**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * d**2 * (a * a * squares_b + b * b * squares_a) / n**2
            + 4 * d * (a * other.cubes - b * self.cubes) / n
        )
        self.cubes = (
            (self.cubes + other.cubes)
            + d**3 * (a * b * (a - b) / n**2)
            + 3 * d * (a * squares_b - b * squares_a) / n
        )
        self.products = self.products + other.products + np.outer(d, d) * (a * b / n)
        self.mean = self.mean + d * (b / n)
        self.count = n

    @property
    def covariance(self) -> Float[np.ndarray, "C C"]:
        """Mean of (x - mean) (x - mean)^T."""
        return self.products / max(self.count, 1)

    @property
    def std(self) -> Float[np.ndarray, " C"]:
        """sqrt of the mean of (x - mean)^2; 0 for a constant channel."""
        std = np.sqrt(self.covariance.diagonal())
        return np.where(std <= CONSTANT * np.abs(self.mean), 0.0, std)

    @property
    def excess_kurtosis(self) -> Float[np.ndarray, " C"]:
        """Mean of ((x - mean) / std)^4, less 3: 0 for a Gaussian, and for a constant channel."""
        varies = self.std > 0
        fourth = self.fourths / max(self.count, 1)
        return np.where(varies, fourth / np.where(varies, self.std, 1) ** 4 - 3, 0.0)

    @property
    def correlation(self) -> Float[np.ndarray, "C C"]:
        """Covariance over the product of the two std; 0 of a constant channel with the others."""
        varies = self.std > 0
        scale = np.where(varies, self.std, 1)
        correlation = np.where(np.outer(varies, varies), self.covariance, 0)
        correlation = np.clip(correlation / np.outer(scale, scale), -1, 1)
        np.fill_diagonal(correlation, 1)
        return correlation

    @property
    def mean_abs_correlation(self) -> float:
        """Mean |correlation| of two channels that vary; 0 where there are fewer than two."""
        varies = self.std > 0
        pairs = np.outer(varies, varies) & ~np.eye(len(varies), dtype=bool)
        return float(np.abs(self.correlation[pairs]).mean()) if pairs.any() else 0.0

    def figures(self) -> dict[str, float | list]:
        """mean, std, excess_kurtosis [C], correlation [C][C], mean_abs_correlation, as floats."""
        names = ("mean", "std", "excess_kurtosis", "correlation")
        lists = {name: getattr(self, name).tolist() for name in names}
        return {**lists, "mean_abs_correlation": self.mean_abs_correlation}

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; `from_arrays` is the inverse."""
        names = ("count", "mean", "products", "cubes", "fourths")
        return {name: np.asarray(getattr(self, name)) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LatentMoments:
        """What `arrays` gave."""
        made = cls(len(arrays["mean"]))
        for name in made.arrays():
            setattr(made, name, arrays[name])
        made.count = int(made.count)
        return made
