"""Rectified flow: the path from images to noise, its velocity, guidance, the training loss.

Times run from 0 (images) to 1 (noise): x_t = (1 - t) x + t e, e standard normal,
and the velocity is dx_t/dt = e - x. Liu et al. 2022, arXiv:2209.03003; the logit-normal
time density is that of Esser et al. 2024, arXiv:2403.03206.

Pure functions on arrays; `velocity` stands for any function of (x_t, t).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Velocity = Callable[[Float[Array, "B ..."], Float[Array, " B"]], Float[Array, "B ..."]]

TIME_DENSITIES = ("uniform", "logit_normal")


def expand(t_B: Float[Array, " B"], like: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Appends axes of length one to t until it broadcasts against `like`."""
    return t_B.reshape(t_B.shape + (1,) * (like.ndim - t_B.ndim))


def path(
    x: Float[Array, "B ..."], noise: Float[Array, "B ..."], t_B: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """x_t = (1 - t) x + t e."""
    t = expand(t_B, x)
    return (1 - t) * x + t * noise


def velocity_target(
    x: Float[Array, "B ..."], noise: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """dx_t/dt = e - x, the same at every time of a path."""
    return noise - x


def sample_time(
    key: PRNGKeyArray, density: str, loc: float = 0.0, scale: float = 1.0
) -> Float[Array, ""]:
    """One training time in (0, 1).

    Args:
      key: one random key; vmap over keys for a batch.
      density: "uniform", or "logit_normal": t = sigmoid(loc + scale n), n standard normal.
      loc: shifts the logit-normal density; positive values favour noise.
      scale: its width; 1 is the usual choice.

    Raises:
      ValueError: for another density.
    """
    if density == "uniform":
        return jax.random.uniform(key)
    if density == "logit_normal":
        return jax.nn.sigmoid(loc + scale * jax.random.normal(key))
    raise ValueError(f"time density {density!r} is not one of {', '.join(TIME_DENSITIES)}")


def matching_loss(
    velocity: Velocity,
    x: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    t_B: Float[Array, " B"],
) -> Float[Array, " B"]:
    """Conditional flow matching, per example: mean over elements of (v(x_t, t) - (e - x))^2.

    Up to a constant and a weight that depends on t, a bound on -log p(x).
    """
    error = velocity(path(x, noise, t_B), t_B).astype(jnp.float32) - velocity_target(x, noise)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, x.ndim)))


def drop(keys_B: PRNGKeyArray, z: Float[Array, "B ..."], rate: float) -> Float[Array, "B ..."]:
    """Replaces the latent of an example by zeros with probability `rate`.

    A field trained so knows the velocity without a condition, v(x_t, t, 0), which
    guidance needs (Ho & Salimans 2022, arXiv:2207.12598). Zeros are fixed by every
    linear action, so dropping before or after a group acts is the same.
    """
    kept_B = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate))(keys_B)
    return jnp.where(expand(kept_B, z), z, 0)


def guided(
    velocity: Callable[[Array, Array, Array], Array], z: Float[Array, "B ..."], scale: float
) -> Velocity:
    """Guidance: v = v_null + w (v_cond - v_null), v_null = v(x, t, 0), v_cond = v(x, t, z).

    w = 1 is the conditional field itself, at the cost of one evaluation; any other
    scale evaluates both halves as one batch of twice the size.
    """
    if scale == 1:
        return lambda x, t_B: velocity(x, t_B, z)

    def field(x: Array, t_B: Array) -> Array:
        both = velocity(
            jnp.concatenate([x, x]),
            jnp.concatenate([t_B, t_B]),
            jnp.concatenate([z, jnp.zeros_like(z)]),
        )
        conditional, null = jnp.split(both, 2)
        return null + scale * (conditional - null)

    return field
