"""Orthonormal bases of a latent's channels, and what a representation mixes in them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efae_jax.groups.representations import change_basis


def qr_basis(W: Float[Array, "C C"] | np.ndarray) -> Float[Array, "C C"] | np.ndarray:
    """Q of W = Q R, with the signs for which R has a positive diagonal; orthogonal.

    A QR routine may return R with any signs on its diagonal, and then Q's columns with those
    signs. Columns belong to the channels that come in, so wrong signs there, Q S instead of Q,
    turn every row into another one: the first k rows span another subspace, and what they
    picked out of the latent is mixed with what the others did. With a positive diagonal, Q is a
    continuous function of an invertible W, is W where W is orthogonal, and so is close to W,
    row by row, where W is close to orthogonal.

    Args:
      W: a square matrix. A NumPy array is decomposed in float64 on the host, and gives float64;
        a JAX array may be traced.

    Raises:
      ValueError: it is not square.
    """
    xp, W = _square("qr_basis", W)
    Q, R = xp.linalg.qr(W)
    return Q * xp.where(xp.diagonal(R) < 0, -1, 1)


def orthogonality_error(W: Float[Array, "C C"] | np.ndarray) -> Float[Array, ""] | np.floating:
    """max |W^T W - 1|, over all entries: 0 for an orthogonal matrix.

    Args:
      W: a square matrix; a NumPy array is multiplied in float64.

    Raises:
      ValueError: it is not square.
    """
    xp, W = _square("orthogonality_error", W)
    product = W.T @ W if xp is np else jnp.matmul(W.T, W, precision=jax.lax.Precision.HIGHEST)
    return xp.abs(product - xp.eye(len(W))).max()


def block_leakage(
    matrices: np.ndarray | Float[Array, "n C C"], Q: Float[Array, "C C"], k: int
) -> Float[Array, " n"]:
    """How much of a representation mixes the first k channels of the basis Q with the others.

    With M = Q rho(g) Q^T = [[A, B], [C, D]], A of k x k: sqrt((|B|^2 + |C|^2) / |M|^2) in
    Frobenius norms, for every element g. 0: M is block-diagonal, and g acts on the first k
    channels by themselves; 1: it exchanges them with the others.

    Args:
      matrices: rho(g), for every g.
      Q: orthogonal; u = Q z.
      k: 1 to C - 1.

    Raises:
      ValueError: another k, or shapes that do not fit.
    """
    channels = matrices.shape[-1]
    if matrices.shape[1:] != (channels, channels) or Q.shape != (channels, channels):
        raise ValueError(
            f"block_leakage: got matrices {matrices.shape} and a basis {Q.shape}, need [n, C, C] "
            "and [C, C]"
        )
    if not 1 <= k < channels:
        raise ValueError(f"block_leakage: k={k}, allowed are 1 to {channels - 1}")
    squares_nCC = jnp.square(change_basis(matrices, Q))
    mixed_n = squares_nCC[:, :k, k:].sum((1, 2)) + squares_nCC[:, k:, :k].sum((1, 2))
    return jnp.sqrt(mixed_n / squares_nCC.sum((1, 2)))


def is_block_diagonal(
    matrices: np.ndarray | Float[Array, "n C C"],
    Q: Float[Array, "C C"],
    k: int,
    tolerance: float = 1e-5,
) -> bool:
    """Whether every g acts on the first k channels of the basis Q by themselves.

    That is, no `block_leakage` (see there) is above the tolerance, which leaves room for the
    rounding of float32.
    """
    return bool((block_leakage(matrices, Q, k) <= tolerance).all())


def _square(name: str, W: Any) -> tuple[Any, Any]:
    """The library for W, and W in float64 where that is NumPy."""
    if W.ndim != 2 or W.shape[0] != W.shape[1]:
        raise ValueError(f"{name}: got shape {W.shape}, need a square matrix")
    return (np, W.astype(np.float64)) if isinstance(W, np.ndarray) else (jnp, W)
