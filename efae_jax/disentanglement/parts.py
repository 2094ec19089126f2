"""Which channels are compared: a basis's, random ones, and the latent's own."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Float

from efae_jax import groups

MOST_SUBSETS = 20  # of raw channels, that are tried one by one


def random_basis(channels: int, seed: int, draw: int) -> Float[np.ndarray, "C C"]:
    """An orthogonal matrix, uniform over all of them: Q of a Gaussian matrix's QR decomposition."""
    # NumPy takes (7, 0) for 7, and somebody's own basis may be drawn from that.
    normal = np.random.default_rng((seed, draw, 1)).standard_normal((channels, channels))
    return groups.qr_basis(normal).astype(np.float32)


def compared(
    matrix: Float[np.ndarray, "C C"], semantic: int, draws: int, seed: int
) -> dict[str, Float[np.ndarray, "K C"]]:
    """The rows of a basis's two parts, and of the first and the last channels of random bases.

    Names are "semantic", "style", "random semantic 0" (as many channels as are semantic), ...,
    "random style 0".
    """
    parts = {"semantic": matrix[:semantic], "style": matrix[semantic:]}
    for draw in range(draws):
        Q = random_basis(len(matrix), seed, draw)
        parts[f"random semantic {draw}"], parts[f"random style {draw}"] = Q[:semantic], Q[semantic:]
    return parts


def raw(chosen: tuple[int, ...], channels: int) -> Float[np.ndarray, "K C"]:
    """The rows that pick some of the latent's own channels."""
    return np.eye(channels, dtype=np.float32)[list(chosen)]


def raw_candidates(channels: int, count: int) -> list[tuple[int, ...]]:
    """What is tried to find the best `count` raw channels: all subsets, or single channels.

    All subsets where there are at most 20; otherwise channels are ranked one by one.
    """
    if math.comb(channels, count) <= MOST_SUBSETS:
        return list(itertools.combinations(range(channels), count))
    return [(c,) for c in range(channels)]


def best_raw(candidates: list[tuple[int, ...]], losses: list[float], count: int) -> tuple[int, ...]:
    """The raw channels that predict best: the best candidate, or the `count` best single ones."""
    order = [candidates[i] for i in np.argsort(losses, kind="stable")]
    if len(order[0]) == count:
        return order[0]
    return tuple(sorted(channel for (channel,) in order[:count]))
