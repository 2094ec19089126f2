"""From an image as stored - a file's bytes, an array, a Pillow image - to uint8 [H, W, C]."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from efae_jax.data.bad_image import BadImageError, looks_like
from efae_jax.data.image_types import formats
from efae_jax.data.labels import parse
from efae_jax.data.pixel_values import is_deep, to_eight_bits
from efae_jax.errors import UserError

CROPS = ("random", "center", "native", "mixed", "zoom")
ZOOM = (0.5, 1.0)  # least and largest share of the shorter side
MAX_PIXELS = 80_000_000  # of an image that is decoded, unless told otherwise
_TEXT = "S512"  # bytes of a label that is text
_PNG = b"\x89PNG\r\n\x1a\n"
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


@dataclass(frozen=True)
class Transform:
    """The way of every image into a batch; `transform(image, random)` -> uint8 [H, W, C].

    Upright by EXIF, to RGB or grey (transparency over white), shorter side resized (bicubic,
    antialiased) and the rest cropped, flipped, padded.

    size: (height, width) of the result. channels: 1 or 3. crop: 'random', 'center'; 'native': the
    centre at the image's own resolution, black around an image that is smaller, as torchvision's
    CenterCrop; 'mixed': half of the images are cropped at their own resolution, anywhere, where
    they are large enough; or 'zoom': a part of the result's shape anywhere, 0.5 to 1 times the
    largest there is, resized by area (bicubic where that enlarges it), as latent-diffusion's
    training data.
    flip: mirror left-right with probability 1/2. pad: black pixels on each side, inside `size`
    (MNIST: size (32, 32), pad 2). max_pixels: an image with more is not decoded.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    pad: int = 0
    max_pixels: int = MAX_PIXELS

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
        with _pillow_limit(self.max_pixels):
            return self._cropped(_open(image, self.max_pixels), random, place, mirror)

    def _cropped(
        self, img: Image.Image, random: Random, place: tuple[float, float], mirror: bool
    ) -> UInt8[np.ndarray, "H W C"]:
        inner = (self.size[0] - 2 * self.pad, self.size[1] - 2 * self.pad)
        native = self.crop == "mixed" and random.random() < 0.5
        if self.crop == "native":
            img = _centre(_decode(img, None), inner)
        elif native and img.height >= max(inner) and img.width >= max(inner):  # upright or not
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
        label = parse(record.get("label")).number  # which never makes an image unreadable
        return {"image": self(record["image"], random), "label": np.int32(label)}

    def with_label_text(self) -> Transform:
        """The same, whose examples have "label_text" as well (`LabelledTransform`)."""
        return LabelledTransform(**{f.name: getattr(self, f.name) for f in fields(self)})

    def blank(self) -> dict[str, np.ndarray]:
        """A black image with label 0."""
        return {"image": np.zeros((*self.size, self.channels), np.uint8), "label": np.int32(0)}


@dataclass(frozen=True)
class LabelledTransform(Transform):
    """`Transform` that keeps what a label says where it is no number, in UTF-8, as "label_text"."""

    def example(self, record: dict[str, Any], random: Random) -> dict[str, np.ndarray]:
        text = record.get("label_text", "").encode("utf-8", "replace")
        return {**super().example(record, random), "label_text": np.array(text, _TEXT)}

    def blank(self) -> dict[str, np.ndarray]:
        return {**super().blank(), "label_text": np.array(b"", _TEXT)}


def read_picture(
    image: bytes | Image.Image,
    *,
    channels: int = 3,
    multiple: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "H W C"]:
    """An image at its own size, cropped (centre) to sides that are multiples of `multiple`.

    Otherwise as `Transform` reads images: upright, transparency over white.

    Raises BadImageError, or whatever Pillow raises, if the image cannot be read.
    """
    with _pillow_limit(max_pixels):
        img = _open(image, max_pixels)
        img = _decode(img, (img.height, img.width)).convert("L" if channels == 1 else "RGB")
        height, width = (n // multiple * multiple for n in (img.height, img.width))
        if not height or not width:
            raise BadImageError(
                f"too small: {img.width}x{img.height} pixels; at least {multiple} a side"
            )
        top, left = (img.height - height) // 2, (img.width - width) // 2
        img = img.crop((left, top, left + width, top + height))
    return np.asarray(img).reshape(height, width, channels)


def decode(image: bytes | np.ndarray | Image.Image, target: tuple[int, int]) -> Image.Image:
    """The upright image as 'L' or 'RGB', at such a size that it can be resized to the target."""
    return _decode(_open(image, MAX_PIXELS), target)


def fit(
    image: bytes | np.ndarray | Image.Image,
    side: int,
    *,
    square: bool,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """The image as 'L' or 'RGB', its shorter side resized to `side` as `Transform` does it.

    square: and its centre cropped, to the pixels that `Transform` with crop 'center' gives. What
    `Transform` crops out of the whole is what it crops out of the image itself, up to rounding.

    Raises BadImageError, or whatever Pillow raises, if the image cannot be read.
    """
    target = (side, side)
    with _pillow_limit(max_pixels):
        img = _decode(_open(image, max_pixels), target)
        return _resize_and_crop(img, target, 0.5) if square else _resize_whole(img, side)


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

    Grey of more than 8 bits, and floats, by `pixel_values`.
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
    return to_eight_bits(img) if is_deep(img) else img.convert("RGB")


def _open(image: bytes | np.ndarray | Image.Image, max_pixels: int) -> Image.Image:
    """An image whose pixels are not decoded yet, of no more than so many pixels."""
    too_many = f"more pixels than data.max_pixels={max_pixels:,} (--max-pixels)"
    try:
        img = _opened(image)
    except Image.DecompressionBombError as error:  # twice as many as Pillow allows
        raise BadImageError(too_many) from error
    if img.width * img.height > max_pixels:
        raise BadImageError(f"{too_many}: {img.width}x{img.height}")
    return img


def _opened(image: bytes | np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if not image:
        raise BadImageError("empty")
    try:
        return Image.open(io.BytesIO(image), formats=formats())
    except ValueError as error:
        if not image.startswith(_PNG) or "MAX_TEXT" not in str(error):
            raise
        # Generators keep whole workflows as text in their images.
        return Image.open(io.BytesIO(_without_text(image)), formats=("PNG",))
    except UnidentifiedImageError as error:
        raise BadImageError(f"no image that Pillow reads here: {looks_like(image)}") from error


def _of_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise BadImageError(f"an array of {array.dtype}, not uint8")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (3,), (4,)):
        raise BadImageError(f"an array that is not [H, W], [H, W, 1], 3 or 4: {array.shape}")
    return Image.fromarray(array)


def _without_text(png: bytes) -> bytes:
    """A PNG without its chunks of text, of which Pillow refuses large ones."""
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(png[at : at + 12 + size])
        at += 12 + size
    return b"".join(kept)


class _Limit:
    """Pillow's own limit of pixels, which all threads share, and how many have lifted it."""

    lock = threading.Lock()
    lifted = 0
    before: int | None = Image.MAX_IMAGE_PIXELS


@contextlib.contextmanager
def _lifted_limit() -> Iterator[None]:
    with _Limit.lock:
        if not _Limit.lifted:
            _Limit.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _Limit.lifted += 1
    try:
        yield
    finally:
        with _Limit.lock:
            _Limit.lifted -= 1
            if not _Limit.lifted:
                Image.MAX_IMAGE_PIXELS = _Limit.before


def _pillow_limit(max_pixels: int) -> contextlib.AbstractContextManager[None]:
    """Lifts Pillow's limit for an image where max_pixels allows more; else threads do not meet."""
    limit = _Limit.before if _Limit.lifted else Image.MAX_IMAGE_PIXELS
    return contextlib.nullcontext() if limit is None or max_pixels <= limit else _lifted_limit()


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


def _centre(img: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The target's size around the image's centre, at its own resolution; black outside it.

    An odd line goes where torchvision's CenterCrop leaves it: halves are rounded to even where it
    crops, and down where it pads.
    """
    height, width = target
    left, top = (
        round((there - asked) / 2) if there >= asked else -((asked - there) // 2)
        for there, asked in ((img.width, width), (img.height, height))
    )
    return img.crop((left, top, left + width, top + height))


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
