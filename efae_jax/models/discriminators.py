"""Discriminators: images in [-1, 1] to a map of logits, positive for "an image of the data"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from efae_jax.models.vgg import VGG16, VGG16_WIDTHS, scale_input

VGG_FORMS = ("released", "later")
BATCH_NORM_EPS, BATCH_NORM_MOMENTUM = 1e-5, 0.1

Statistics = dict[str, dict[str, Array]]

# (kernel = stride) of each layer of the five heads; together with the pooling before its tap
# every head divides the side by 16.
_LATER_HEADS = ((4, 4), (4, 2), (2, 2), (2,), (1,))


class VGGPatchDiscriminator(nnx.Module):
    """Heads on the features of a VGG16 that is trained along.

    "released", the discriminator of AuraEquiVAE: one 1x1 convolution without bias on
    relu3_3, a logit for every 4x4 pixels. "later", of the same program later: a head on each
    of the five taps, convolutions that do not overlap (kernel = stride), halving the channels
    and with ReLU between where there are two; the five maps of logits, one for every 16x16
    pixels, are added. The last layer of every head starts at zero, and so do all logits.

    The trunk should start from pretrained weights: `efae_jax.convert.perceptual.read_vgg16`
    gives the parameters under "trunk", for the number of stages that `trunk_stages` tells.

    Args:
      form: "released" or "later".
      rngs: draws the parameters (float32).
      dtype: of the computation; logits are float32.

    Raises:
      ValueError: another form.
    """

    def __init__(self, form: str, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.form = form
        self.trunk = VGG16(trunk_stages(form), rngs=rngs, dtype=dtype)
        if form == "released":
            width = VGG16_WIDTHS[2][-1]
            zeros = nnx.initializers.zeros
            self.head = nnx.Conv(
                width, 1, (1, 1), use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs
            )
        else:
            self.heads = nnx.List(
                PatchHead(stage[-1], kernels, rngs=rngs, dtype=dtype)
                for stage, kernels in zip(VGG16_WIDTHS, _LATER_HEADS, strict=True)
            )

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        """Logits: h = floor(H / 4) for "released", floor(H / 16) for "later".

        The five heads of "later" agree at every side from 16 on.

        Raises:
          ValueError: a side below 4 or 16; neither 1 nor 3 channels.
        """
        taps = self.trunk(scale_input(x_BHWC))
        if self.form == "released":
            logits_Bhw1 = self.head(taps[-1]).astype(jnp.float32)
        else:
            heads = zip(self.heads, taps, strict=True)
            logits_Bhw1 = sum(head(tap).astype(jnp.float32) for head, tap in heads)
        return logits_Bhw1[..., 0]


def trunk_stages(form: str) -> int:
    """The stages of VGG16 in a `VGGPatchDiscriminator`: 3 for "released", 5 for "later".

    Raises:
      ValueError: another form.
    """
    if form not in VGG_FORMS:
        raise ValueError(
            f"VGG discriminator {form!r} does not exist; allowed: {', '.join(VGG_FORMS)}"
        )
    return 3 if form == "released" else 5


class PatchHead(nnx.Module):
    """One or two convolutions whose kernel is their stride; the last gives logits from zero."""

    def __init__(self, width: int, kernels: tuple[int, ...], *, rngs: nnx.Rngs, dtype: DTypeLike):
        widths = [width, *[width // 2] * (len(kernels) - 1), 1]
        last = len(kernels) - 1
        self.convs = nnx.List(
            nnx.Conv(
                widths[i],
                widths[i + 1],
                (kernel, kernel),
                strides=kernel,
                padding="VALID",
                kernel_init=nnx.initializers.zeros if i == last else nnx.initializers.he_normal(),
                dtype=dtype,
                rngs=rngs,
            )
            for i, kernel in enumerate(kernels)
        )

    def __call__(self, h_BhwD: Float[Array, "B h w D"]) -> Float[Array, "B h w 1"]:
        for i, conv in enumerate(self.convs):
            h_BhwD = conv(h_BhwD if i == 0 else jax.nn.relu(h_BhwD))
        return h_BhwD


class PatchGAN(nnx.Module):
    """The discriminator of pix2pix (Isola et al. 2016, arXiv:1611.07004) as LDM uses it.

    Convolutions 4x4 with zero padding 1 and LeakyReLU 0.2 between: `layers` of stride 2, then
    two of stride 1, the last of which gives the logits; widths `features` times 1, 2, 4, 8,
    8, ...; batch normalisation after all but the first and the last, whose convolutions alone
    have a bias. Kernels start normal(0, 0.02), scales normal(1, 0.02), biases at 0.

    It is a pure function also of the running statistics of its batch normalisation:

        net = Net(lambda rngs: PatchGAN(rngs=rngs))
        params = jax.jit(net.init)(key)
        statistics = initial_statistics(params)
        logits, statistics = net(params, x, statistics, training=True)

    Args:
      channels: of the images.
      features: of the first layer.
      layers: of stride 2.
      rngs: draws the parameters (float32).
      dtype: of the convolutions; normalisation and logits are float32.
    """

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        layers: int = 3,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        self.layers = layers
        self.smallest_side = 3 * 2**layers
        widths = [channels, *(features * min(2**i, 8) for i in range(layers + 1)), 1]
        self.convs = nnx.List(
            nnx.Conv(
                widths[i],
                widths[i + 1],
                (4, 4),
                strides=2 if i < layers else 1,
                padding=1,
                use_bias=i in (0, layers + 1),
                kernel_init=nnx.initializers.normal(0.02),
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(layers + 2)
        )
        self.norms = nnx.List(BatchNorm(width, rngs=rngs) for width in widths[2:-1])

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], statistics: Statistics, *, training: bool
    ) -> tuple[Float[Array, "B h w"], Statistics]:
        """(logits, statistics after this batch).

        Args:
          x_BHWC: images; every call in training normalises by its own batch, so images and
            decodings that are given in two calls are normalised apart, as in LDM.
          statistics: of `initial_statistics`, or what the last call in training returned.
          training: normalise by the mean and variance of the batch and move the running
            ones; otherwise normalise by the running ones and return them unchanged.

        Inside `jax.jit` the batch is the global one, however it is sharded.

        Raises:
          ValueError: sides of which the convolutions leave nothing.
        """
        height, width = x_BHWC.shape[1:3]
        if min(height, width) < self.smallest_side:
            raise ValueError(
                f"image sides {height}x{width} are too small for a PatchGAN of {self.layers} "
                f"layers: each must be at least {self.smallest_side}"
            )
        moved = {}
        h = self.convs[0](x_BHWC)
        for i, norm in enumerate(self.norms):
            h = self.convs[i + 1](jax.nn.leaky_relu(h, 0.2))
            h, moved[str(i)] = norm(h, statistics[str(i)], training=training)
        logits_Bhw1 = self.convs[-1](jax.nn.leaky_relu(h, 0.2))
        return logits_Bhw1[..., 0].astype(jnp.float32), moved


def initial_statistics(params: Mapping[str, Any]) -> Statistics:
    """Running means 0 and variances 1 for a `PatchGAN` of these parameters."""
    return {
        name: {"mean": jnp.zeros(norm["scale"].shape), "var": jnp.ones(norm["scale"].shape)}
        for name, norm in params["norms"].items()
    }


class BatchNorm(nnx.Module):
    """scale (x - mean) / sqrt(var + 1e-5) + bias over all axes but the last, in float32.

    The batch is normalised by its biased variance; the running mean and variance move to
    0.9 old + 0.1 new, where the new variance is the unbiased one (as in PyTorch).
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(1 + 0.02 * jax.random.normal(rngs.params(), (width,)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(
        self, x_BhwD: Float[Array, "B h w D"], statistics: dict[str, Array], *, training: bool
    ) -> tuple[Float[Array, "B h w D"], dict[str, Array]]:
        x = x_BhwD.astype(jnp.float32)
        if training:
            count = x.size // x.shape[-1]
            if count < 2:
                raise ValueError("batch normalisation of a single value; give a larger batch")
            # Two passes: the mean of squares less the square of the mean loses digits.
            mean = x.mean(axis=(0, 1, 2))
            var = jnp.square(x - mean).mean(axis=(0, 1, 2))
            new = jax.lax.stop_gradient({"mean": mean, "var": var * (count / (count - 1))})
            statistics = jax.tree.map(
                lambda old, now: (1 - BATCH_NORM_MOMENTUM) * old + BATCH_NORM_MOMENTUM * now,
                statistics,
                new,
            )
        else:
            mean, var = statistics["mean"], statistics["var"]
        x = (x - mean) * (self.scale[...] * jax.lax.rsqrt(var + BATCH_NORM_EPS)) + self.bias[...]
        return x, statistics
