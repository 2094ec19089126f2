"""From an image as stored - a file's bytes, an array, a Pillow image - to uint8 [H, W, C]."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from efae_jax.errors import UserError

CROPS = ("random", "center", "mixed", "zoom")
ZOOM = (0.5, 1.0)  # least and largest share of the shorter side
# Only these: Pillow would hand some other formats to outside programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {  # what to do to an image of that EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(Exception):
    """An image that cannot be used; the message says why."""


@dataclass(frozen=True)
class Transform:
    """The way of every image into a batch; `transform(image, random)` -> uint8 [H, W, C].

    Upright by EXIF, to RGB or grey (transparency over white), shorter side resized (bicubic,
    antialiased) and the rest cropped, flipped, padded.

    size: (height, width) of the result. channels: 1 or 3. crop: 'random', 'center'; 'mixed':
    half of the images are cropped at their own resolution, anywhere, where they are large enough;
    or 'zoom': a part of the result's shape anywhere, 0.5 to 1 times the largest there is, resized
    by area (bicubic where that enlarges it), as latent-diffusion's training data.
    flip: mirror left-right with probability 1/2. pad: black pixels on each side, inside `size`
    (MNIST: size (32, 32), pad 2). max_pixels: an image with more is not decoded.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    pad: int = 0
    max_pixels: int = 50_000_000

    def __post_init__(self):
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"data.size: {self.size} is not (height, width), both at least 1")
        if self.channels not in (1, 3):
            raise UserError(f"data.channels: {self.channels}; allowed: 1 or 3")
        if self.crop not in CROPS:
            raise UserError(f"data.crop: {self.crop!r}; allowed: {', '.join(CROPS)}")
        if not 0 <= 2 * self.pad < min(self.size):
            raise UserError(f"data.pad: {self.pad} on each side leaves nothing of {self.size}")
        if self.max_pixels < 1:
            raise UserError(f"data.max_pixels: {self.max_pixels}; it must be at least 1")

    def __call__(
        self, image: bytes | np.ndarray | Image.Image, random: Random
    ) -> UInt8[np.ndarray, "H W C"]:
        """The uint8 image [H, W, C]; all that is random comes from `random`.

        Raises BadImageError, or whatever Pillow raises, if the image cannot be read.
        """
        place, mirror = (random.random(), 0.5), random.random() < 0.5
        if self.crop == "center":
            place = (0.5, 0.5)
        img = _open(image)
        if img.width * img.height > self.max_pixels:
            raise BadImageError(
                f"{img.width}x{img.height} pixels are more than data.max_pixels={self.max_pixels}"
            )
        inner = (self.size[0] - 2 * self.pad, self.size[1] - 2 * self.pad)
        native = self.crop == "mixed" and random.random() < 0.5
        if native and img.height >= max(inner) and img.width >= max(inner):  # upright or not
            place = (place[0], random.random())
            img = _native_crop(_decode(img, None), inner, place)
        elif self.crop == "zoom":
            share, place = random.uniform(*ZOOM), (place[0], random.random())
            img = _zoom(_decode(img, tuple(round(n / share) for n in inner)), inner, share, place)
        else:
            img = _resize_and_crop(_decode(img, inner), inner, place[0])
        img = img.convert("L" if self.channels == 1 else "RGB")
        if self.flip and mirror:
            img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.pad:
            img = ImageOps.expand(img, self.pad, fill=0)
        return np.asarray(img).reshape(*self.size, self.channels)

    def example(self, record: dict[str, Any], random: Random) -> dict[str, np.ndarray]:
        """A source's record as {"image": uint8 [H, W, C], "label": int32}."""
        return {"image": self(record["image"], random), "label": np.int32(record["label"])}

    def blank(self) -> dict[str, np.ndarray]:
        """A black image with label 0."""
        return {"image": np.zeros((*self.size, self.channels), np.uint8), "label": np.int32(0)}


def read_picture(
    image: bytes, *, channels: int = 3, multiple: int = 1, max_pixels: int = 2**31
) -> UInt8[np.ndarray, "H W C"]:
    """An image at its own size, cropped (centre) to sides that are multiples of `multiple`.

    Otherwise as `Transform` reads images: upright, transparency over white. While it reads more
    than Pillow's own limit allows, that limit, which all threads share, is `max_pixels`.

    Raises BadImageError, or whatever Pillow raises, if the image cannot be read.
    """
    with _pillow_limit(max_pixels):
        img = _open(image)
        if img.width * img.height > max_pixels:
            raise BadImageError(f"{img.width}x{img.height} pixels are more than {max_pixels:,}")
        img = _decode(img, (img.height, img.width)).convert("L" if channels == 1 else "RGB")
        height, width = (n // multiple * multiple for n in (img.height, img.width))
        if not height or not width:
            raise BadImageError(f"{img.height}x{img.width} is less than {multiple} pixels a side")
        top, left = (img.height - height) // 2, (img.width - width) // 2
        img = img.crop((left, top, left + width, top + height))
    return np.asarray(img).reshape(height, width, channels)


def decode(image: bytes | np.ndarray | Image.Image, target: tuple[int, int]) -> Image.Image:
    """The upright image as 'L' or 'RGB', at such a size that it can be resized to the target."""
    return _decode(_open(image), target)


def fit(
    image: bytes | np.ndarray | Image.Image, side: int, *, square: bool, max_pixels: int = 2**31
) -> Image.Image:
    """The image as 'L' or 'RGB', its shorter side resized to `side` as `Transform` does it.

    square: and its centre cropped, to the pixels that `Transform` with crop 'center' gives. What
    `Transform` crops out of the whole is what it crops out of the image itself, up to rounding.

    Raises BadImageError, or whatever Pillow raises, if the image cannot be read.
    """
    img, target = _open(image), (side, side)
    if img.width * img.height > max_pixels:
        raise BadImageError(f"{img.width}x{img.height} pixels are more than {max_pixels:,}")
    img = _decode(img, target)
    return _resize_and_crop(img, target, 0.5) if square else _resize_whole(img, side)


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    if before is None or max_pixels <= before:  # then threads do not meet here
        yield
        return
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def make_transform(config: Any, *, train: bool) -> Transform:
    """The transform that config.data asks for; for evaluation: centre crop and no flip."""
    return Transform(
        size=tuple(config.size),
        channels=config.channels,
        crop=config.crop if train else "center",
        flip=config.flip and train,
        pad=config.pad,
        max_pixels=config.max_pixels,
    )


def flatten(img: Image.Image) -> Image.Image:
    """An image of any mode as 'L' or 'RGB'; what is transparent becomes white.

    16-bit grey is divided by 257; floats are taken to lie in [0, 1].
    """
    keyed = img.mode in ("P", "L", "RGB") and "transparency" in img.info
    if keyed or img.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        if img.mode in ("La", "RGBa"):  # premultiplied: Pillow converts it to its plain form only
            img = img.convert({"La": "LA", "RGBa": "RGBA"}[img.mode])
        img = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
    if img.mode in ("L", "RGB"):
        return img
    if img.mode == "1":
        return img.convert("L")
    if img.mode.startswith("I") or img.mode == "F":
        values = np.asarray(img, np.float64) * (255 if img.mode == "F" else 1 / 257)
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    return img.convert("RGB")


def _open(image: bytes | np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise BadImageError(f"an array of {image.dtype}, not uint8")
        return Image.fromarray(image[..., 0] if image.shape[-1:] == (1,) else image)
    return Image.open(io.BytesIO(image), formats=_FORMATS)


def _decode(img: Image.Image, target: tuple[int, int] | None) -> Image.Image:
    """The decoded image, upright by EXIF, as 'L' or 'RGB'.

    With a target, a JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves at least twice the
    target's resolution: half the time for a photograph of 3 megapixels, and less than 0.3%
    (52 dB) of difference.
    """
    shrink = min(img.size) / (2 * max(target)) if target else 1
    if shrink > 1:
        img.draft(None, (math.ceil(img.width / shrink), math.ceil(img.height / shrink)))
    img.load()  # the TIFF reader turns the image itself here, and then drops the tag
    how = _UPRIGHT.get(img.getexif().get(_ORIENTATION))
    img = flatten(img)
    return img if how is None else img.transpose(how)


def _native_crop(
    img: Image.Image, target: tuple[int, int], place: tuple[float, float]
) -> Image.Image:
    """The target's size out of the image as it is; place in [0, 1] along both sides."""
    height, width = target
    left = math.floor((img.width - width) * place[0] + 0.5)
    top = math.floor((img.height - height) * place[1] + 0.5)
    return img.crop((left, top, left + width, top + height))


def _zoom(
    img: Image.Image, target: tuple[int, int], share: float, place: tuple[float, float]
) -> Image.Image:
    """Resizes a part of the image: `share` times the largest of the target's shape.

    place in [0, 1] along width and height.
    """
    height, width = target
    scale = share * min(img.height / height, img.width / width)
    left, top = (img.width - width * scale) * place[0], (img.height - height * scale) * place[1]
    how = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
    box = (max(left, 0.0), max(top, 0.0))
    ends = (min(left + width * scale, img.width), min(top + height * scale, img.height))
    return img.resize((width, height), how, box=(*box, *ends))


def _resize_and_crop(img: Image.Image, target: tuple[int, int], place: float) -> Image.Image:
    """Resizes the shorter side (relative to the target's) and crops, in one pass over the crop.

    place in [0, 1] is the crop's along the other side, on whole pixels of the resized image, so
    that an image that needs no resizing keeps its pixels.
    """
    height, width = target
    scale = max(height / img.height, width / img.width)
    left = math.floor((round(img.width * scale) - width) * place + 0.5) / scale
    top = math.floor((round(img.height * scale) - height) * place + 0.5) / scale
    left = max(0.0, min(left, img.width - width / scale))
    top = max(0.0, min(top, img.height - height / scale))
    right, bottom = min(left + width / scale, img.width), min(top + height / scale, img.height)
    return img.resize(
        (width, height),
        Image.Resampling.BICUBIC,
        box=(left, top, right, bottom),
        reducing_gap=3.0,
    )


def _resize_whole(img: Image.Image, side: int) -> Image.Image:
    """Resizes the shorter side, on the grid of pixels that `_resize_and_crop` crops from.

    Where the longer side is rounded up, the grid's last line would lie in part outside the image;
    it is moved inside.
    """
    scale = side / min(img.size)
    width, height = (round(n * scale) for n in img.size)
    inside = tuple(
        min(n, math.floor(old * scale + 1e-6))
        for n, old in zip((width, height), img.size, strict=True)
    )
    how = {"resample": Image.Resampling.BICUBIC, "reducing_gap": 3.0}
    right, bottom = (min(n / scale, old) for n, old in zip(inside, img.size, strict=True))
    result = img.resize(inside, box=(0, 0, right, bottom), **how)
    if inside == (width, height):
        return result
    whole = Image.new(img.mode, (width, height))
    whole.paste(result)
    if width > inside[0]:
        box = (img.width - 1 / scale, 0, img.width, img.height)
        whole.paste(img.resize((1, height), box=box, **how), (width - 1, 0))
    else:
        box = (0, img.height - 1 / scale, img.width, img.height)
        whole.paste(img.resize((width, 1), box=box, **how), (0, height - 1))
    return whole
