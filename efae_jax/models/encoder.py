"""A convolutional residual encoder to a latent image or a latent vector."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efae_jax.models.layers import group_norm, zero_conv


class ResidualBlock(nnx.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); the second convolution starts at zero."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = group_norm(width, rngs=rngs)
        self.conv1 = nnx.Conv(width, width, (3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(width, rngs=rngs)
        self.conv2 = zero_conv(width, width, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x_BHWC)).astype(x_BHWC.dtype))
        h = self.conv2(jax.nn.silu(self.norm2(h)).astype(h.dtype))
        return x_BHWC + h


class ConvEncoder(nnx.Module):
    """Images x[B,H,W,c] to latents z[B,H/f,W/f,C], or to vectors z[B,C].

    A patchifying convolution, then levels of residual blocks with strided convolutions
    between them: f = stem * 2^(levels - 1).

    Args:
      channels: of the images.
      widths: one per level.
      blocks: residual blocks per level.
      stem: side and stride of the first convolution, in pixels.
      latent_channels: C.
      vector: average over positions and return a vector.
      dtype: of the computation; parameters and norms are float32.
      remat: recompute each block in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        stem: int,
        latent_channels: int,
        *,
        vector: bool = False,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.factor = encoder_factor(stem, widths)
        self.vector, self.dtype, self.remat = vector, dtype, remat
        self.stem = nnx.Conv(
            channels, widths[0], (stem, stem), strides=stem, dtype=dtype, rngs=rngs
        )
        self.down = nnx.List(
            [
                nnx.Conv(a, b, (3, 3), strides=2, dtype=dtype, rngs=rngs)
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.levels = nnx.List(
            [
                nnx.List([ResidualBlock(w, dtype=dtype, rngs=rngs) for _ in range(blocks)])
                for w in widths
            ]
        )
        self.norm = group_norm(widths[-1], rngs=rngs)
        self.out = nnx.Conv(widths[-1], latent_channels, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Float[Array, "B H W c"]) -> Float[Array, "B ..."]:
        _, height, width, _ = x_BHWC.shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"encoder: image {height}x{width}, but the factor {self.factor} needs sides "
                f"that are multiples of {self.factor}"
            )
        h = self.stem(x_BHWC.astype(self.dtype))
        for i, level in enumerate(self.levels):
            if i:
                h = self.down[i - 1](h)
            for block in level:
                h = (jax.checkpoint(block.__call__) if self.remat else block)(h)
        h = jax.nn.silu(self.norm(h)).astype(self.dtype)
        z = self.out(h.mean(axis=(1, 2), keepdims=True) if self.vector else h)
        return (z[:, 0, 0] if self.vector else z).astype(jnp.float32)


def encoder_factor(stem: int, widths: Sequence[int]) -> int:
    """Image side / latent side of a `ConvEncoder`."""
    return math.prod((stem, *(2 for _ in widths[1:])))
