"""Angles between subspaces, and how well embeddings are predicted and found again."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

TIE = 1e-6  # of the largest distance: what float32 does not tell apart


def principal_angles(
    a_KxC: Float[np.ndarray, "K C"], b_KxC: Float[np.ndarray, "K C"]
) -> Float[np.ndarray, " K"]:
    """The principal angles between two subspaces of one dimension, in degrees, largest first.

    Their cosines are the singular values of a b^T, their sines those of b - (b a^T) a. Small
    angles follow from the sines, whose rounding they do not feel, others from the cosines.

    Args:
      a_KxC, b_KxC: orthonormal rows that span the subspaces.

    Raises:
      ValueError: other shapes, or rows that are not orthonormal within 1e-3.

    Source: A. Bjorck, G. Golub, Numerical methods for computing angles between linear subspaces
    (1973).
    """
    a, b = np.asarray(a_KxC, np.float64), np.asarray(b_KxC, np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"principal_angles: got {a.shape} and {b.shape}, need two [K, C]")
    for rows in (a, b):
        if not np.abs(rows @ rows.T - np.eye(len(rows))).max() <= 1e-3:  # NaN neither
            raise ValueError("principal_angles: the rows are not orthonormal")
    cosines = np.linalg.svd(b @ a.T, compute_uv=False)[::-1]
    sines = np.linalg.svd(b - (b @ a.T) @ a, compute_uv=False)
    angles = np.where(
        sines < 0.7, np.arcsin(np.minimum(sines, 1)), np.arccos(np.minimum(cosines, 1))
    )
    return np.degrees(angles)


def r_squared(
    found_ND: Float[np.ndarray, "N D"],
    target_ND: Float[np.ndarray, "N D"],
    mean_D: Float[np.ndarray, " D"],
) -> float:
    """The share of the targets' variance that is predicted: 1 - sum |e - t|^2 / sum |m - t|^2.

    1: all of it; 0: no more than the mean m tells; below: less.

    Args:
      found_ND: predictions e. target_ND: what they should be, t.
      mean_D: of the targets that the predictor was made from: predicting it is no merit.
    """
    target = np.asarray(target_ND, np.float64)
    left = np.square(found_ND - target).sum()
    return float(1 - left / np.square(mean_D - target).sum())


def retrieval_ranks(
    found_ND: Float[np.ndarray, "N D"],
    candidates_MD: Float[np.ndarray, "M D"],
    own_NM: Bool[np.ndarray, "N M"] | Int[np.ndarray, "N K"],
    block: int = 512,
) -> Int[np.ndarray, " N"]:
    """How many candidates lie nearer to a prediction than the nearest of its own, for each.

    Distances are Euclidean: among candidates of one length that is the order of the cosines. A
    candidate as near as its own counts against it: nothing is found by not telling them apart.

    Args:
      found_ND: predictions.
      candidates_MD: all that may be found, each once.
      own_NM: for each prediction the numbers of its own candidates, -1 for none; or which they
        are.
      block: predictions at a time.
    """
    found, candidates = (np.asarray(v, np.float32) for v in (found_ND, candidates_MD))
    centre = candidates.mean(axis=0)  # distances keep more digits about it
    found, candidates = found - centre, candidates - centre
    squares_M, ranks = np.square(candidates).sum(axis=1), []
    for start in range(0, len(found), block):
        part = slice(start, start + block)
        distance = squares_M - 2 * found[part] @ candidates.T
        mine = np.asarray(own_NM[part])
        if mine.dtype != bool:
            chosen = np.zeros((len(mine), len(candidates) + 1), bool)
            np.put_along_axis(chosen, mine.astype(np.int64) % (len(candidates) + 1), True, axis=1)
            mine = chosen[:, :-1]
        nearest = np.where(mine, distance, np.inf).min(axis=1, keepdims=True)
        rounding = TIE * np.abs(distance).max(axis=1, keepdims=True)
        # What is not farther counts, so that a prediction that is not finite finds nothing.
        ranks.append((~(distance > nearest + rounding) & ~mine).sum(axis=1))
    return np.concatenate(ranks)


def recall(ranks_N: Int[np.ndarray, " N"], k: int) -> float:
    """The share of the predictions that find one of their own among the k nearest candidates."""
    return float(np.mean(np.asarray(ranks_N) < k))
