"""How far an encoder is from equivariance."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def equivariance_error(
    acted: Float[Array, "B ..."], encoded: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """||rho(g) E(x) - E(g x)||^2 / ||E(g x)||^2, per image.

    0 for an equivariant encoder; 2 for independent latents of equal norm. It can be made
    small by a latent that carries little, so read it beside what decoding rho(g) E(x) gives.

    Args:
      acted: rho(g) E(x).
      encoded: E(g x).
    """
    axes = tuple(range(1, encoded.ndim))
    difference = jnp.sum(jnp.square(acted - encoded), axis=axes)
    return difference / jnp.maximum(jnp.sum(jnp.square(encoded), axis=axes), 1e-12)
