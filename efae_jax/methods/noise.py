"""Noise on a latent on its way to the decoder."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, PRNGKeyArray

NOISE_KINDS = ("none", "additive", "multiplicative")


def perturb(
    keys_B: PRNGKeyArray, z: Float[Array, "B ..."], kind: str, size: float
) -> Float[Array, "B ..."]:
    """Noise of a fixed size on the latent, n standard normal.

    "additive": z + size n; "multiplicative": z (1 + size n); "none": z. It bounds the
    information that the latent carries and makes the decoder robust to a diffusion
    model's errors.
    """
    if kind == "none" or size == 0:
        return z
    n = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys_B)
    return z + size * n if kind == "additive" else z * (1 + size * n)
