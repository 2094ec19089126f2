"""TAESD: tiny autoencoders distilled from those of Stable Diffusion, FLUX and Sana.

Source: https://github.com/madebyollin/taesd. A network is a plain sequence of layers, and a
layer's place in it is its name in the published files, so the same list (`encoder_layers`,
`decoder_layers`) builds the modules and names the weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efae_jax.models.conv_blocks import (
    PADDINGS,
    GroupNorm,
    Statistics,
    local_statistics,
    upsample,
)
from efae_jax.models.kl import check_sides

IMAGE_CHANNELS = 3
BRANCH_GROUPS, BRANCH_EPS = 4, 1e-5
BRANCH_WIDENING = 4


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the variants differ in.

    Attributes:
      latent_channels: C.
      deep: factor 32 instead of 8, with a stem of two strided convolutions.
      branch: the three blocks nearest the latent have a normalised branch.
    """

    latent_channels: int
    deep: bool = False
    branch: bool = False

    @property
    def factor(self) -> int:
        """Image side / latent side."""
        return 32 if self.deep else 8


VARIANTS = {
    "taesd": Variant(4),
    "taesdxl": Variant(4),
    "taesd3": Variant(16),
    "taef1": Variant(16),
    "taef2": Variant(32, branch=True),
    "taesana": Variant(32, deep=True),
}


@dataclasses.dataclass(frozen=True)
class Conv:
    """A 3x3 convolution."""

    n_in: int
    n_out: int
    stride: int = 1
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class Residual:
    """A `Block`."""

    width: int
    branch: bool = False


Layer = Conv | Residual | str  # without weights: "relu", "up", "bound"


def encoder_layers(name: str) -> list[Layer]:
    """The encoder's sequence, from image to latent.

    Raises:
      ValueError: no such variant.
    """
    v = get_variant(name)
    if v.deep:
        layers = [Conv(IMAGE_CHANNELS, 32, stride=2), "relu", Conv(32, 64, stride=2), "relu"]
    else:
        layers = [Conv(IMAGE_CHANNELS, 64)]
    layers += [Residual(64)]
    for last in (False, False, True):
        layers += [Conv(64, 64, stride=2, bias=False)] + 3 * [Residual(64, v.branch and last)]
    return [*layers, Conv(64, v.latent_channels)]


def decoder_layers(name: str) -> list[Layer]:
    """The decoder's sequence, from latent to image.

    Raises:
      ValueError: no such variant.
    """
    v = get_variant(name)
    widths = (256, 128, 64, 64, 64, 64) if v.deep else (64, 64, 64, 64)
    layers: list[Layer] = ["bound", Conv(v.latent_channels, widths[0]), "relu"]
    for i, (width, after) in enumerate(itertools.pairwise(widths)):
        layers += 3 * [Residual(width, v.branch and i == 0)]
        layers += ["up", Conv(width, after, bias=False)]
    return [*layers, Residual(64), Conv(64, IMAGE_CHANNELS)]


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
      ValueError: listing the names.
    """
    if name not in VARIANTS:
        raise ValueError(f"TAESD: no variant {name!r}; allowed: {', '.join(VARIANTS)}")
    return VARIANTS[name]


class Branch(nnx.Module):
    """expand, group norm in float32, ReLU, reduce: 1x1 convolutions without biases."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        wide = BRANCH_WIDENING * width
        self.expand = nnx.Conv(width, wide, (1, 1), use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(wide, BRANCH_GROUPS, BRANCH_EPS)
        self.reduce = nnx.Conv(wide, width, (1, 1), use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array, statistics: Statistics = local_statistics) -> Array:
        h = self.norm(self.expand(x_BHWC), statistics)
        return self.reduce(jax.nn.relu(h).astype(x_BHWC.dtype))


class Block(nnx.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))), where x may first get x + branch(x)."""

    def __init__(self, width: int, conv: Callable[..., nnx.Conv], branch: Branch | None):
        self.convs = nnx.List([conv(width, width) for _ in range(3)])
        self.branch = branch

    def __call__(self, x_BHWC: Array, statistics: Statistics = local_statistics) -> Array:
        if self.branch is not None:
            x_BHWC = x_BHWC + self.branch(x_BHWC, statistics)
        h = x_BHWC
        for i, conv in enumerate(self.convs):
            h = conv(jax.nn.relu(h) if i else h)
        return jax.nn.relu(x_BHWC + h)


class Step(nnx.Module):
    """A layer without weights: "relu", "up" (twice the sides), "bound" (3 tanh(x / 3))."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, x_BHWC: Array) -> Array:
        if self.kind == "relu":
            return jax.nn.relu(x_BHWC)
        return upsample(x_BHWC) if self.kind == "up" else 3 * jnp.tanh(x_BHWC / 3)


class _Sequence(nnx.Module):
    def __init__(
        self,
        layers: list[Layer],
        *,
        padding: str = "zeros",
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.remat = dtype, remat

        def conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nnx.Conv:
            return nnx.Conv(
                n_in,
                n_out,
                (3, 3),
                strides=stride,
                padding=PADDINGS[padding],
                use_bias=bias,
                dtype=dtype,
                rngs=rngs,
            )

        def make(layer: Layer) -> nnx.Module:
            if isinstance(layer, Conv):
                return conv(layer.n_in, layer.n_out, layer.stride, layer.bias)
            if isinstance(layer, Residual):
                branch = Branch(layer.width, dtype=dtype, rngs=rngs) if layer.branch else None
                return Block(layer.width, conv, branch)
            return Step(layer)

        self.layers = nnx.List([make(layer) for layer in layers])

    def _run(self, h: Array, statistics: Statistics) -> Array:
        for layer in self.layers:
            if not isinstance(layer, Block):
                h = layer(h)
            # Statistics that are gathered on the way could not leave a rematerialised function.
            elif self.remat and statistics is local_statistics:
                h = jax.checkpoint(layer.__call__)(h)
            else:
                h = layer(h, statistics)
        return h


class TAESDEncoder(_Sequence):
    """Images x[B,H,W,3] in [-1, 1] to latents z[B,h,w,C], in float32.

    The published networks take pixels in [0, 1]; x is shifted and scaled to that inside.

    Args:
      variant: a name of `VARIANTS`.
      padding: of every 3x3 convolution, the strided ones too: "zeros" or "reflect".
      dtype: of the computation; parameters and group norms are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
      ValueError: no such variant; on a call, sides that the factor does not divide.
    """

    def __init__(self, variant: str, **settings: object):
        super().__init__(encoder_layers(variant), **settings)
        self.factor = get_variant(variant).factor

    def __call__(
        self, x_BHWC: Float[Array, "B H W 3"], statistics: Statistics = local_statistics
    ) -> Float[Array, "B h w C"]:
        check_sides(x_BHWC.shape, self.factor)
        x_BHWC = (x_BHWC.astype(jnp.float32) + 1) / 2
        return self._run(x_BHWC.astype(self.dtype), statistics).astype(jnp.float32)


class TAESDDecoder(_Sequence):
    """Latents z[B,h,w,C] to images x[B,H,W,3] in [-1, 1], in float32 and not clipped.

    Args:
      variant, padding, dtype, remat: as for `TAESDEncoder`.
    """

    def __init__(self, variant: str, **settings: object):
        super().__init__(decoder_layers(variant), **settings)

    def __call__(
        self, z_BhwC: Float[Array, "B h w C"], statistics: Statistics = local_statistics
    ) -> Float[Array, "B H W 3"]:
        x = self._run(z_BhwC.astype(self.dtype), statistics).astype(jnp.float32)
        return 2 * x - 1
