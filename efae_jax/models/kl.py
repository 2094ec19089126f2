"""Encoder and decoder of the latent-diffusion family: AutoencoderKL, and Aura's VAE."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efae_jax.models.conv_blocks import (
    Attention,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Statistics,
    conv1,
    conv3,
    local_statistics,
    upsample,
)
from efae_jax.models.wavelet import wavelet

AURA_HEAD_WIDTH = 64


class Middle(nnx.Module):
    """Block, attention if any, block."""

    def __init__(self, block: Callable[..., ResnetBlock], attention: nnx.Module | None, width: int):
        self.block1 = block(width, width)
        self.attention = attention
        self.block2 = block(width, width)

    def __call__(self, h: Array, statistics: Statistics = local_statistics) -> Array:
        h = self.block1(h, statistics)
        if self.attention is not None:
            h = self.attention(h, statistics)
        return self.block2(h, statistics)


class Level(nnx.Module):
    """Residual blocks at one resolution, then a change of resolution, if any.

    Args:
      blocks: of the level.
      attentions: one behind each block, or none at all.
      down, up: the convolutions of the change.
    """

    def __init__(
        self,
        blocks: Sequence[ResnetBlock],
        attentions: Sequence[nnx.Module] = (),
        down: nnx.Conv | None = None,
        up: nnx.Conv | None = None,
    ):
        self.blocks = nnx.List(blocks)
        self.attentions = nnx.List(attentions) if attentions else None
        self.down, self.up = down, up

    def __call__(self, h: Array, statistics: Statistics = local_statistics) -> Array:
        for i, block in enumerate(self.blocks):
            h = block(h, statistics)
            if self.attentions is not None:
                h = self.attentions[i](h, statistics)
        if self.down is not None:
            h = self.down(h)
        return h if self.up is None else self.up(upsample(h))


class _Network(nnx.Module):
    """What encoder and decoder share: settings of the blocks, and rematerialisation."""

    def _prepare(
        self,
        attention: str,
        groups: int,
        eps: float,
        padding: str,
        dtype: Any,
        remat: bool,
        rngs: Any,
    ) -> tuple[Callable, Callable, Callable, Callable]:
        self.dtype, self.remat = dtype, remat
        norm = {"groups": groups, "eps": eps}
        block = functools.partial(ResnetBlock, **norm, padding=padding, dtype=dtype, rngs=rngs)

        def attend(width: int) -> Attention:
            fused = attention == "heads"
            head = AURA_HEAD_WIDTH if fused else width
            return Attention(width, head, fused=fused, **norm, dtype=dtype, rngs=rngs)

        def middle(width: int) -> Middle:
            return Middle(block, None if attention == "none" else attend(width), width)

        return (
            block,
            attend,
            middle,
            functools.partial(conv3, padding=padding, dtype=dtype, rngs=rngs),
        )

    def _run(self, part: nnx.Module, h: Array, statistics: Statistics) -> Array:
        # Statistics that are gathered on the way could not leave a rematerialised function.
        if self.remat and statistics is local_statistics:
            return jax.checkpoint(part.__call__)(h)
        return part(h, statistics)


class Encoder(_Network):
    """Images x[B,H,W,c] in [-1, 1] to z[B,h,w,n], in float32.

    A convolution, levels of residual blocks with strided convolutions between them, a block,
    attention, a block, and a convolution to the latent. Of AutoencoderKL, n counts mean and
    log-variance.

    Args:
      channels: of the images.
      widths: channels of every level, from the image inwards.
      blocks: residual blocks per level.
      out_channels: n.
      attention: in the middle: "none"; "single", one head; "heads", of 64 channels (Aura).
      wavelet_input: a wavelet transform takes the first downsampling's place.
      quant: a 1x1 convolution at the end.
      level_attention: levels, counted from the image inwards, with attention behind each block.
      groups, eps: of the group norms, which are float32.
      padding: of the convolutions that keep the sides: "zeros" or "reflect".
      dtype: of the computation; parameters are float32.
      remat: recompute each level in the backward pass instead of keeping its activations.

    Raises:
      ValueError: sizes that do not fit each other; on a call, sides of an image that `factor`
        does not divide.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        out_channels: int,
        *,
        attention: str,
        wavelet_input: bool = False,
        quant: bool = False,
        level_attention: Sequence[int] = (),
        groups: int = 32,
        eps: float = 1e-6,
        padding: str = "zeros",
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        block, attend, middle, conv = self._prepare(
            attention, groups, eps, padding, dtype, remat, rngs
        )
        self.wavelet_input, self.factor = wavelet_input, level_factor(widths)
        self.conv_in = conv(4 * channels if wavelet_input else channels, widths[0])
        levels = []
        for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths))):
            inputs = (before, *[width] * (blocks - 1))
            down = None
            if i < len(widths) - 1 and not (wavelet_input and i == 0):
                down = Downsample(width, dtype=dtype, rngs=rngs)
            more = [attend(width) for _ in inputs] if i in level_attention else ()
            levels.append(Level([block(n, width) for n in inputs], more, down=down))
        self.levels = nnx.List(levels)
        self.middle = middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1], groups, eps)
        self.conv_out = conv(widths[-1], out_channels)
        self.quant = conv1(out_channels, out_channels, dtype=dtype, rngs=rngs) if quant else None

    def __call__(
        self, x_BHWC: Float[Array, "B H W c"], statistics: Statistics = local_statistics
    ) -> Float[Array, "B h w n"]:
        check_sides(x_BHWC.shape, self.factor)
        h = wavelet(x_BHWC) if self.wavelet_input else x_BHWC
        h = self.conv_in(h.astype(self.dtype))
        for level in self.levels:
            h = self._run(level, h, statistics)
        h = self._run(self.middle, h, statistics)
        h = jax.nn.swish(self.norm_out(h, statistics)).astype(self.dtype)
        h = self.conv_out(h)
        return (h if self.quant is None else self.quant(h)).astype(jnp.float32)


class Decoder(_Network):
    """Latents z[B,h,w,C] to images [B,H,W,c], in float32 and not clipped.

    The encoder's mirror image, with one more block a level and nearest upsampling.

    Args:
      channels: of the images.
      widths: channels of every level, from the image inwards, as the encoder's; each but the
        first doubles the sides.
      blocks: of the encoder, per level.
      latent_channels: C.
      post_quant: a 1x1 convolution at the start.
      level_attention: as for `Encoder`, also counted from the image inwards.
      attention, groups, eps, padding, dtype, remat: as for `Encoder`.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        latent_channels: int,
        *,
        attention: str,
        post_quant: bool = False,
        level_attention: Sequence[int] = (),
        groups: int = 32,
        eps: float = 1e-6,
        padding: str = "zeros",
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        block, attend, middle, conv = self._prepare(
            attention, groups, eps, padding, dtype, remat, rngs
        )
        quant = functools.partial(conv1, latent_channels, latent_channels, dtype=dtype, rngs=rngs)
        self.post_quant = quant() if post_quant else None
        inner = widths[-1]
        self.conv_in = conv(latent_channels, inner)
        self.middle = middle(inner)
        levels, outwards = [], tuple(reversed(widths))
        for i, (before, width) in enumerate(itertools.pairwise((inner, *outwards))):
            up = conv(width, width) if i < len(widths) - 1 else None
            inputs, here = (before, *[width] * blocks), len(widths) - 1 - i
            more = [attend(width) for _ in inputs] if here in level_attention else ()
            levels.append(Level([block(n, width) for n in inputs], more, up=up))
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(widths[0], groups, eps)
        self.conv_out = conv(widths[0], channels)

    def __call__(
        self, z_BhwC: Float[Array, "B h w C"], statistics: Statistics = local_statistics
    ) -> Float[Array, "B H W c"]:
        return self.last_layer(self.features(z_BhwC, statistics))

    def features(
        self, z_BhwC: Float[Array, "B h w C"], statistics: Statistics = local_statistics
    ) -> Float[Array, "B H W D"]:
        """What the last convolution takes."""
        h = z_BhwC.astype(self.dtype)
        h = self.conv_in(h if self.post_quant is None else self.post_quant(h))
        h = self._run(self.middle, h, statistics)
        for level in self.levels:
            h = self._run(level, h, statistics)
        return jax.nn.swish(self.norm_out(h, statistics)).astype(self.dtype)

    def last_layer(self, h_BHWD: Float[Array, "B H W D"]) -> Float[Array, "B H W c"]:
        """The last convolution."""
        return self.conv_out(h_BHWD).astype(jnp.float32)


def level_factor(widths: Sequence[int]) -> int:
    """Image side / latent side: all levels but one halve (a wavelet takes the place of one)."""
    return 2 ** (len(widths) - 1)


def check_sides(shape: Sequence[int], factor: int) -> None:
    """Raises ValueError, naming the sides, unless the factor divides both."""
    _, height, width, _ = shape
    if height % factor or width % factor or not height or not width:
        raise ValueError(
            f"encoder: image {height}x{width}, but the factor {factor} needs sides that are "
            f"multiples of {factor}; the nearest are "
            f"{max(round(height / factor), 1) * factor}x{max(round(width / factor), 1) * factor}"
        )
