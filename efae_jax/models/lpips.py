"""Learned perceptual image patch similarity (Zhang et al. 2018, arXiv:1801.03924)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from efae_jax.models.vgg import ALEXNET_WIDTHS, VGG16, VGG16_WIDTHS, AlexNet, pooled, scale_input

KINDS = ("vgg", "alex")
EPS = 1e-10


class LPIPS(nnx.Module):
    """A distance of images: sum over taps of the spatial mean of sum_c w_c (a_c - b_c)^2.

    a and b are the tap's features divided by (their norm over channels + 1e-10); w >= 0 are
    the weights that were learned from people's judgements. Dropout, which the published
    training code puts before w, is left out. Without pretrained weights
    (`efae_jax.convert.perceptual`) the numbers mean nothing.

    Args:
      kind: "vgg" (as a loss) or "alex" (as the figure that papers report).
      rngs: draws the parameters (float32).
      dtype: of the convolutions; what follows them is float32.

    Raises:
      ValueError: another kind.
    """

    def __init__(self, kind: str = "vgg", *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        if kind not in KINDS:
            raise ValueError(f"LPIPS {kind!r} does not exist; allowed: {', '.join(KINDS)}")
        if kind == "vgg":
            self.trunk, widths = VGG16(rngs=rngs, dtype=dtype), VGG16_WIDTHS
        else:
            self.trunk, widths = AlexNet(rngs=rngs, dtype=dtype), ALEXNET_WIDTHS
        self.heads = nnx.List(Head(stage[-1], rngs=rngs) for stage in widths)

    def __call__(
        self, a_BHWC: Float[Array, "B H W C"], b_BHWC: Float[Array, "B H W C"]
    ) -> Float[Array, " B"]:
        """The distance of images in [-1, 1], of 1 or 3 channels, per pair.

        Raises:
          ValueError: images too small for the network, or of other channels.
        """
        # Two passes rather than one of the joined batch: a constant side costs no backward pass.
        return self.distance(self.features(a_BHWC), self.features(b_BHWC))

    def distance(
        self, a: list[Float[Array, "B h w D"]], b: list[Float[Array, "B h w D"]]
    ) -> Float[Array, " B"]:
        """The distance of images whose `features` these are, per pair."""
        pairs = zip(self.heads, a, b, strict=True)
        return sum(head(jnp.square(a_BhwD - b_BhwD)) for head, a_BhwD, b_BhwD in pairs)

    def features(self, x_BHWC: Float[Array, "B H W C"]) -> list[Float[Array, "B h w D"]]:
        """The five taps' features of images in [-1, 1], each of unit norm over channels."""
        return self.features_and_pooled(x_BHWC)[0]

    def features_and_pooled(
        self, x_BHWC: Float[Array, "B H W C"]
    ) -> tuple[list[Float[Array, "B h w D"]], Float[Array, "B D"]]:
        """`features`, and the last tap averaged over positions before it is normalised.

        Of the VGG16 the latter is what the Frechet distance "vgg16" is computed over.
        """
        taps = self.trunk(scale_input(x_BHWC))
        return [_unit(h) for h in taps], pooled(taps[-1])


class Head(nnx.Module):
    """mean over positions of sum_c w_c d_c."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (width,)) / width)

    def __call__(self, d_BhwD: Float[Array, "B h w D"]) -> Float[Array, " B"]:
        return jnp.sum(d_BhwD.mean(axis=(1, 2)) * self.weight[...], axis=-1)


def _unit(h_BhwD: Array) -> Array:
    h_BhwD = h_BhwD.astype(jnp.float32)
    square = jnp.sum(jnp.square(h_BhwD), axis=-1, keepdims=True)
    # The square root has no derivative at zero, where no channel responds.
    return h_BhwD / (jnp.sqrt(jnp.maximum(square, EPS**2)) + EPS)
