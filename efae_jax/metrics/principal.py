"""Latents as colours, by their principal components."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

REACH = 2.5  # standard deviations from the middle of the range of colours to its ends


def principal_directions(
    covariance: Float[np.ndarray, "C C"], count: int = 3
) -> tuple[Float[np.ndarray, "C K"], Float[np.ndarray, " K"]]:
    """Unit eigenvectors of the largest eigenvalues, largest first, with the standard deviations.

    K = min(count, C). An eigenvector is free in its sign: the component of the largest size is
    made positive.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(len(values))] < 0, -1.0, 1.0)
    return vectors, np.sqrt(np.maximum(values, 0))


def to_rgb(
    z: Float[np.ndarray, "... C"],
    mean: Float[np.ndarray, " C"],
    covariance: Float[np.ndarray, "C C"],
) -> Float[np.ndarray, "... 3"]:
    """The first three principal components as red, green and blue in [0, 1].

    With the mean and the covariance of all images (`LatentMoments`) the basis is one for all of
    them. A component is 1/2 at the mean and 0 and 1 at 2.5 of its own standard deviations below
    and above, clipped there. One channel gives grey; of two, and of components that do not vary,
    the rest is 1/2.
    """
    vectors, std = principal_directions(covariance)
    varies = std > 1e-6 * std[0]
    components = (np.asarray(z, np.float64) - mean) @ vectors
    components = np.where(varies, components / np.where(varies, std, 1), 0)
    colours = np.clip(0.5 + components / (2 * REACH), 0, 1)
    if len(std) == 1:
        return np.repeat(colours, 3, axis=-1)
    missing = 3 - len(std)
    return np.pad(colours, [(0, 0)] * (colours.ndim - 1) + [(0, missing)], constant_values=0.5)
