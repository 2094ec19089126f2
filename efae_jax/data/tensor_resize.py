"""Images as torchvision's pipelines of tensors give them: floats, resized as floats.

`Transform` resizes the 8-bit image and rounds again; torchvision's `ToTensor, Resize, CenterCrop`
resizes numbers and never rounds. Figures of reconstruction differ by more than a decibel.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from efae_jax.data.transforms import Transform, read_picture


@dataclass(frozen=True)
class TensorTransform(Transform):
    """`Transform` whose images are float32 [H, W, C], the numbers of 8-bit pixels and between them.

    Upright by EXIF, to RGB or grey, decoded in full; the shorter side resized to `size`, a square,
    the longer one to int(size long / short); then the centre, its corner at
    round((side - size) / 2), halves to even.

    antialias: bilinear, over the pixels that shrink into one (torchvision from 0.17 on); False: of
    the four nearest pixels, whatever the scale (of tensors before 0.17).

    Raises:
      ValueError: sizes that are not square.
    """

    antialias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.size[0] != self.size[1]:
            raise ValueError(
                f"images of {self.size[0]}x{self.size[1]}: published protocols resize to squares; "
                "give --size"
            )

    def __call__(self, image: bytes | np.ndarray | Image.Image, random: Random) -> Any:
        del random
        pixels = read_picture(image, channels=self.channels, max_pixels=self.max_pixels)
        pixels = resize_shorter(pixels, self.size[0], antialias=self.antialias)
        top, left = (round((n - self.size[0]) / 2) for n in pixels.shape[:2])
        return pixels[top : top + self.size[0], left : left + self.size[0]]

    def blank(self) -> dict[str, np.ndarray]:
        """Black, with label 0."""
        return {name: a.astype(np.float32) if name == "image" else a
                for name, a in super().blank().items()}  # fmt: skip


def resize_shorter(pixels: np.ndarray, side: int, *, antialias: bool) -> Float[np.ndarray, "H W C"]:
    """[H, W, C] with the shorter side resized to `side`, the longer one to int(side long / short).

    Bilinear, without aligned corners, as `torch.nn.functional.interpolate` of a tensor.
    """
    short = min(pixels.shape[:2])
    height, width = (side if n == short else int(side * n / short) for n in pixels.shape[:2])
    channels = np.moveaxis(pixels.astype(np.float32), -1, 0)
    if (height, width) == pixels.shape[:2]:
        return np.moveaxis(channels, 0, -1)
    resize = _antialiased if antialias else _nearest_four
    return np.stack([resize(channel, height, width) for channel in channels], axis=-1)


def _antialiased(x_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    # Pillow's filter, which PyTorch's is made after.
    image = Image.fromarray(x_HW).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _nearest_four(x_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    for axis, side in enumerate((height, width)):
        there = x_HW.shape[axis]
        place = np.maximum((np.arange(side) + 0.5) * (there / side) - 0.5, 0)
        low = np.minimum(place.astype(int), there - 1)
        share = (place - low).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        high = np.minimum(low + 1, there - 1)
        x_HW = np.take(x_HW, low, axis) * (1 - share) + np.take(x_HW, high, axis) * share
    return x_HW
