"""Blocks of the convolutional autoencoders of the latent-diffusion family."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float

from efae_jax.models.attention import attention

PADDINGS = {"zeros": ((1, 1), (1, 1)), "reflect": "REFLECT"}
# (x[B,H,W,C], groups) -> (mean[B,G], variance[B,G]) over the positions and channels of a group.
Statistics = Callable[[Array, int], tuple[Array, Array]]


def local_statistics(
    x_BHWC: Float[Array, "B H W C"], groups: int
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """Mean and variance of every group of channels, over all positions of `x`."""
    # Per channel first: a reduction over leading axes is the faster one on a CPU.
    mean_BG = _by_group(jnp.mean(x_BHWC, axis=(1, 2)), groups).mean(axis=-1)
    mean_BC = jnp.repeat(mean_BG, x_BHWC.shape[-1] // groups, axis=1)
    square_BC = jnp.mean(jnp.square(x_BHWC - mean_BC[:, None, None]), axis=(1, 2))
    return mean_BG, _by_group(square_BC, groups).mean(axis=-1)


def _by_group(x_BC: Array, groups: int) -> Array:
    return rearrange(x_BC, "b (g c) -> b g c", g=groups)


class GroupNorm(nnx.Module):
    """Group normalisation in float32, whatever the type of its input.

    Args:
      channels: a multiple of `groups`.
      eps: added to the variance.

    Raises:
      ValueError: when the groups do not divide the channels.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6):
        if channels % groups:
            raise ValueError(
                f"group norm: {channels} channels cannot be split into {groups} groups"
            )
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], statistics: Statistics = local_statistics
    ) -> Float[Array, "B H W C"]:
        x_BHWC = x_BHWC.astype(jnp.float32)
        mean_BG, variance_BG = statistics(x_BHWC, self.groups)
        size = x_BHWC.shape[-1] // self.groups
        mean_BC = jnp.repeat(mean_BG, size, axis=1)
        factor_BC = jnp.repeat(jax.lax.rsqrt(variance_BG + self.eps), size, axis=1) * self.scale
        return (x_BHWC - mean_BC[:, None, None]) * factor_BC[:, None, None] + self.bias


def conv3(
    n_in: int,
    n_out: int,
    *,
    padding: str,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    std: float | None = None,
) -> nnx.Conv:
    """A 3x3 convolution that keeps the sides; `std` of the initial weights, if not LeCun's."""
    init = nnx.initializers.lecun_normal() if std is None else nnx.initializers.normal(std)
    return nnx.Conv(
        n_in, n_out, (3, 3), padding=PADDINGS[padding], kernel_init=init, dtype=dtype, rngs=rngs
    )


def conv1(n_in: int, n_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A 1x1 convolution."""
    return nnx.Conv(n_in, n_out, (1, 1), dtype=dtype, rngs=rngs)


class ResnetBlock(nnx.Module):
    """shortcut(x) + conv2(swish(norm2(conv1(swish(norm1(x)))))).

    The shortcut is a 1x1 convolution where the number of channels changes. conv2 starts
    at standard deviation 1e-4 / channels, so that a block starts near the identity.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        groups: int,
        eps: float,
        padding: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(conv3, padding=padding, dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(n_in, groups, eps)
        self.conv1 = conv(n_in, n_out)
        self.norm2 = GroupNorm(n_out, groups, eps)
        self.conv2 = conv(n_out, n_out, std=1e-4 / n_out)
        self.shortcut = conv1(n_in, n_out, dtype=dtype, rngs=rngs) if n_in != n_out else None

    def __call__(self, x_BHWC: Array, statistics: Statistics = local_statistics) -> Array:
        dtype = x_BHWC.dtype
        h = self.conv1(jax.nn.swish(self.norm1(x_BHWC, statistics)).astype(dtype))
        h = self.conv2(jax.nn.swish(self.norm2(h, statistics)).astype(dtype))
        return (x_BHWC if self.shortcut is None else self.shortcut(x_BHWC)) + h


class Attention(nnx.Module):
    """x + out(softmax(q k^T / sqrt(d)) v) over all positions, q, k, v from the normed x.

    Args:
      channels: of x.
      head_width: d; the channels, for one head.
      fused: one matrix gives q, k and v, and there are no biases (Aura's), or three do, with
        biases (AutoencoderKL's).
    """

    def __init__(
        self,
        channels: int,
        head_width: int,
        *,
        fused: bool,
        groups: int,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if channels % head_width:
            raise ValueError(
                f"attention: {channels} channels cannot be split into heads of {head_width}"
            )
        self.head_width, self.dtype = head_width, dtype
        linear = functools.partial(nnx.Linear, use_bias=not fused, dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(channels, groups, eps)
        self.qkv = linear(channels, 3 * channels) if fused else None
        self.query = None if fused else linear(channels, channels)
        self.key = None if fused else linear(channels, channels)
        self.value = None if fused else linear(channels, channels)
        self.out = linear(
            channels, channels, kernel_init=nnx.initializers.normal(0.2 / math.sqrt(channels))
        )

    def __call__(self, x_BHWC: Array, statistics: Statistics = local_statistics) -> Array:
        batch, height, width, _ = x_BHWC.shape
        h = self.norm(x_BHWC, statistics).astype(self.dtype)
        h_NC = rearrange(h, "b h w c -> (b h w) c")  # on a CPU, matrix products like it flat
        if self.qkv is None:
            q, k, v = self.query(h_NC), self.key(h_NC), self.value(h_NC)
        else:
            q, k, v = jnp.split(self.qkv(h_NC), 3, axis=-1)
        q, k, v = (
            rearrange(a, "(b n) (m d) -> b n m d", b=batch, d=self.head_width) for a in (q, k, v)
        )
        h = attention(q, k, v)
        h = self.out(rearrange(h, "b n m d -> (b n) (m d)"))
        return x_BHWC + rearrange(h, "(b h w) c -> b h w c", h=height, w=width)


class Downsample(nnx.Conv):
    """A 3x3 convolution of stride 2, padded by zeros on the right and at the bottom only."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(
            channels,
            channels,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=dtype,
            rngs=rngs,
        )


def upsample(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Every pixel twice in both directions."""
    return repeat(x_BHWC, "b h w c -> b (h p) (w q) c", p=2, q=2)
