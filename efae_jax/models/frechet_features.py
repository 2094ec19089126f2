"""Features of images over which a Frechet distance is computed, by named protocols.

Distances of different protocols do not compare, not even over the same network: how images are
resized on their way into it moves the distance by as much as good models differ.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from efae_jax.models.functional import Net, Params
from efae_jax.models.inception import SIDE, InceptionV3
from efae_jax.models.vgg import VGG16, VGG16_WIDTHS, pooled, scale_input

PROTOCOLS = {
    "torch-fidelity": "FID as torch-fidelity computes it: 2048 features of the 2015 InceptionV3; "
    "images resized to 299 bilinearly as by TensorFlow 1, without antialiasing; (x - 128) / 128",
    "pytorch-fid": "FID as pytorch-fid computes it: 2048 features of the 2015 InceptionV3; images "
    "resized to 299 bilinearly between pixel centres, without antialiasing; 2 x / 255 - 1",
    "vgg16": "no FID: the Frechet distance over the 512 channels of VGG16's relu5_3, averaged "
    "over positions, of images at their own size, scaled as for LPIPS",
}


class FrechetFeatures:
    """The features of one protocol: a pure function of parameters and images.

    Attributes:
      name: of the protocol.
      described: what is computed, in words.
      net: holds `InceptionV3`, whose parameters `efae_jax.convert.inception` reads, or `VGG16`,
        whose parameters are LPIPS' under "trunk".
      size: D, how many features an image has.
      smallest_side: of an image.

    Args:
      name: of `PROTOCOLS`.

    Raises:
      ValueError: another name.
    """

    def __init__(self, name: str):
        if name not in PROTOCOLS:
            raise ValueError(f"features {name!r} do not exist; allowed: {', '.join(PROTOCOLS)}")
        self.name, self.described = name, PROTOCOLS[name]
        if name == "vgg16":
            self.net = Net(lambda rngs: VGG16(rngs=rngs))
            self.size, self.smallest_side = VGG16_WIDTHS[-1][-1], 16
        else:
            self.net = Net(lambda rngs: InceptionV3(rngs=rngs))
            self.size, self.smallest_side = 2048, 1

    def __call__(self, params: Params, pixels_BHWC: Real[Array, "B H W C"]) -> Float[Array, "B D"]:
        """The features, each image's on its own.

        `LPIPS.features_and_pooled` gives "vgg16" in the pass that it makes for its own features.

        Args:
          params: of `net`.
          pixels_BHWC: whole numbers 0..255, uint8 or float; 1 channel (grey) or 3.

        Raises:
          ValueError: images of other channels, or too small.
        """
        if self.name == "vgg16":
            x_BHWC = scale_input(pixels_BHWC.astype(jnp.float32) / 127.5 - 1)
            return pooled(self.net(params, x_BHWC)[-1])
        prepare = torch_fidelity_input if self.name == "torch-fidelity" else pytorch_fid_input
        return self.net(params, prepare(pixels_BHWC))


def torch_fidelity_input(pixels_BHWC: Real[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """(x - 128) / 128 of images 0..255, resized as TensorFlow 1 did for the first FIDs.

    Bilinear without antialiasing: pixel i of 299 is read at the source's i H / 299, so that the
    first pixels' centres meet and the image moves by up to half a pixel; beyond the last centre
    the last pixel is repeated. Grey images are taken as equal red, green and blue.

    Raises:
      ValueError: neither 1 nor 3 channels.
    """
    x_BHWC = _resize(_colours(pixels_BHWC), lambda side: np.arange(SIDE) * side / SIDE)
    return (x_BHWC - 128) / 128


def pytorch_fid_input(pixels_BHWC: Real[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """2 x / 255 - 1 of images 0..255, resized as PyTorch does.

    Bilinear without antialiasing: the centre of pixel i of 299 is read at the source's
    (i + 1/2) H / 299 - 1/2; beyond the outer centres the outer pixels are repeated. Grey images
    are taken as equal red, green and blue.

    Raises:
      ValueError: neither 1 nor 3 channels.
    """
    x_BHWC = _resize(
        _colours(pixels_BHWC) / 255, lambda side: (np.arange(SIDE) + 0.5) * side / SIDE - 0.5
    )
    return 2 * x_BHWC - 1


def _colours(pixels_BHWC: Array) -> Array:
    channels = pixels_BHWC.shape[-1]
    if channels not in (1, 3):
        raise ValueError(
            f"images of {channels} channels have no Inception features: 1 (grey) or 3 (colour)"
        )
    return jnp.broadcast_to(pixels_BHWC, (*pixels_BHWC.shape[:-1], 3)).astype(jnp.float32)


def _resize(x_BHWC: Array, positions: Callable[[int], np.ndarray]) -> Array:
    """Interpolates linearly along both axes; `positions` tells where on a side's pixels."""
    for axis in (1, 2):
        side = x_BHWC.shape[axis]
        at = np.clip(positions(side), 0, side - 1)
        below = np.floor(at).astype(np.int32)
        above = np.minimum(below + 1, side - 1)
        # Not a product of matrices, which accelerators compute with few digits.
        share = (at - below).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        low, high = jnp.take(x_BHWC, below, axis=axis), jnp.take(x_BHWC, above, axis=axis)
        x_BHWC = low + (high - low) * share
    return x_BHWC
