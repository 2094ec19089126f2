"""The Frechet distance between sets of images, from the mean and covariance of their features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float, Real


class Gaussian(Protocol):
    """What `frechet_distance` compares.

    Attributes:
      mean: [D].
      covariance: [D, D], symmetric.
    """

    @property
    def mean(self) -> Float[np.ndarray, " D"]: ...

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]: ...


class FeatureStatistics:
    """Mean and covariance of features that come in parts, each seen once; in float64.

    Sums of each part about its own mean, joined by Chan's formula: how features are cut into
    parts changes rounding only.

    Args:
      size: D, how many features an image has.
    """

    def __init__(self, size: int):
        self.count = 0
        self.mean, self.scatter = np.zeros(size), np.zeros((size, size))

    def add(self, features_ND: Real[np.ndarray, "N D"]) -> None:
        """Takes the features of N >= 0 images in.

        Raises:
          ValueError: features of another size, or that are not finite.
        """
        features_ND = np.asarray(features_ND, np.float64)
        if features_ND.ndim != 2 or features_ND.shape[1] != len(self.mean):
            raise ValueError(
                f"features of shape {features_ND.shape}, not [images, {len(self.mean)}]"
            )
        if not np.isfinite(features_ND).all():
            raise ValueError("features that are not finite")
        if len(features_ND):
            mean = features_ND.mean(axis=0)
            self._join(len(features_ND), mean, features_ND - mean)

    def merge(self, other: FeatureStatistics) -> None:
        """Takes in what another has seen.

        Raises:
          ValueError: features of another size.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(f"{len(other.mean)} features do not join {len(self.mean)}")
        if other.count:
            self._join(other.count, other.mean, np.zeros((0, len(self.mean))))
            self.scatter += other.scatter

    def _join(self, count: int, mean: np.ndarray, centred_ND: np.ndarray) -> None:
        total = self.count + count
        difference = mean - self.mean
        # The means' distance counts as one more deviation: a single product of matrices.
        between = difference * np.sqrt(self.count * count / total)
        deviations = np.vstack([centred_ND, between])
        self.scatter += deviations.T @ deviations
        self.mean = self.mean + difference * (count / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """sum (x - mean) (x - mean)^T / (N - 1).

        Raises:
          ValueError: fewer than 2 images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: at least 2")
        return self.scatter / (self.count - 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; `from_arrays` is the inverse."""
        names = ("count", "mean", "scatter")
        return {name: np.array(getattr(self, name)) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> FeatureStatistics:
        """What `arrays` gave."""
        made = cls(0)
        made.count = int(arrays["count"])
        made.mean, made.scatter = np.array(arrays["mean"]), np.array(arrays["scatter"])
        return made


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), of means m and covariances S.

    The squared Wasserstein-2 distance of two Gaussians (Dowson & Landau 1982), by which Heusel
    et al. (2017, arXiv:1706.08500) compare sets of images. The last trace is the sum of the
    square roots of the eigenvalues of R^T S_b R, where R R^T = S_a; covariances of fewer images
    than features need nothing added. Negative results, which only rounding gives, are 0.

    Raises:
      ValueError: different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"Frechet distance of {len(a.mean)} features and {len(b.mean)}: must be the same ones"
        )
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(covariance_a)
    # Directions in which a does not vary have eigenvalues of rounding size, of either sign.
    varies = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    root = vectors[:, varies] * np.sqrt(values[varies])
    product = np.linalg.eigvalsh(root.T @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b)
    shared = np.sqrt(np.maximum(product, 0)).sum()
    return max(0.0, float(np.sum(np.square(a.mean - b.mean)) + trace - 2 * shared))
