"""Blocks that several networks share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

GROUPS, GROUP_CHANNELS = 32, 4
EPS = 1e-6


def group_norm(channels: int, *, rngs: nnx.Rngs, affine: bool = True) -> nnx.GroupNorm:
    """Group normalisation in float32: up to 32 groups, of at least 4 channels where that divides.

    A group of a single channel would erase what is constant over positions: the mean colour,
    a vector latent.
    """
    groups = math.gcd(GROUPS, channels)
    while groups > 1 and channels // groups < GROUP_CHANNELS:
        groups //= 2
    return nnx.GroupNorm(
        channels,
        num_groups=groups,
        epsilon=EPS,
        use_scale=affine,
        use_bias=affine,
        dtype=jnp.float32,
        rngs=rngs,
    )


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation in float32 without scale and bias; modulation supplies them."""
    return nnx.LayerNorm(
        width, epsilon=EPS, use_scale=False, use_bias=False, dtype=jnp.float32, rngs=rngs
    )


def zero_linear(n_in: int, n_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts at zero."""
    return nnx.Linear(n_in, n_out, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)


def zero_conv(n_in: int, n_out: int, kernel: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution that starts at zero."""
    return nnx.Conv(
        n_in,
        n_out,
        (kernel, kernel),
        kernel_init=nnx.initializers.zeros,
        dtype=dtype,
        rngs=rngs,
    )


def sinusoids(t_B: Float[Array, " B"], size: int) -> Float[Array, "B D"]:
    """[cos, sin] of 1000 t times size/2 frequencies from 1 down to 1/10000."""
    half = size // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half) / half)
    angles = 1000.0 * t_B[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Time in [0, 1] to a vector: sinusoids, linear, SiLU, linear."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, size: int = 256):
        self.size = size
        self.first = nnx.Linear(size, width, dtype=dtype, rngs=rngs)
        self.second = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, t_B: Float[Array, " B"]) -> Float[Array, "B D"]:
        return self.second(jax.nn.silu(self.first(sinusoids(t_B, self.size))))


class LatentGrid(nnx.Module):
    """Lays a spatial latent over a grid of cells, `cell` pixels wide, by a linear map.

    Where the latent is coarser than the grid, one latent position gives each of its cells
    values of their own; where it is finer, the positions in a cell are taken together.

    Args:
      latent_channels: of z[B,H/factor,W/factor,C].
      width: of the result [B,H/cell,W/cell,width].
      factor: image side / latent side.
      cell: image side / grid side; it must divide `factor` or be a multiple of it.

    Raises:
      ValueError: otherwise, and when a latent's sides are not the image's over `factor`.
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        factor: int,
        cell: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if factor % cell and cell % factor:
            raise ValueError(
                f"velocity field: patch (or stem) {cell} and the latent's factor {factor}: "
                "one must divide the other"
            )
        self.factor, self.dtype = factor, dtype
        self.gather, self.spread = max(cell // factor, 1), max(factor // cell, 1)
        self.linear = nnx.Linear(
            latent_channels * self.gather**2, width * self.spread**2, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, z_BhwC: Float[Array, "B h w C"], height: int, width: int
    ) -> Float[Array, "B r c D"]:
        if z_BhwC.shape[1:3] != (height / self.factor, width / self.factor):
            raise ValueError(
                f"velocity field: image {height}x{width} with latent "
                f"{z_BhwC.shape[1]}x{z_BhwC.shape[2]}, but the latent must be 1/{self.factor} "
                "of the image's sides"
            )
        g, s = self.gather, self.spread
        z = rearrange(z_BhwC.astype(self.dtype), "b (h p) (w q) c -> b h w (p q c)", p=g, q=g)
        return rearrange(self.linear(z), "b h w (p q d) -> b (h p) (w q) d", p=s, q=s)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def precondition(
    network: Array, x_t: Array, t_B: Float[Array, " B"], data_std: float
) -> Float[Array, "B H W C"]:
    """Velocity from a network's output: v = a(t) x_t + b(t) F, in float32.

    a is the best linear prediction of e - x from x_t = (1 - t) x + t e when x has
    standard deviation s, and b makes the target of F have unit variance:

        a = (t - (1 - t) s^2) / (t^2 + (1 - t)^2 s^2),   b = s / sqrt(t^2 + (1 - t)^2 s^2).

    It is the preconditioning of Karras et al. 2022 (arXiv:2206.00364) on the straight
    path: the network need not carry the noise through to its output.
    """
    t = t_B.astype(jnp.float32).reshape(-1, 1, 1, 1)
    variance = jnp.square(t) + jnp.square((1 - t) * data_std)
    a = (t - (1 - t) * data_std**2) / variance
    b = data_std / jnp.sqrt(variance)
    return a * x_t.astype(jnp.float32) + b * network.astype(jnp.float32)
