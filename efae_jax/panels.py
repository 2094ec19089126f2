"""Images side by side under small captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

INK, PALE = "#1b1b1f", "#6b6b76"
LEAST, MOST = 256, 768  # pixels of a panel's longer side
GAP, LINES = 14, (16, 14)  # between panels, and the sizes of a caption's two lines
CAPTION = 52  # height


class Panel(NamedTuple):
    """An image uint8[H,W,c], its title, and what is said of it below, in grey."""

    image: UInt8[np.ndarray, "H W c"]
    title: str
    note: str = ""


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """One row of images. Small ones are enlarged by whole pixels, large ones made smaller."""
    images = [_fitted(picture(panel.image)) for panel in panels]
    fonts = [ImageFont.truetype(findfont("DejaVu Sans"), size) for size in LINES]
    widths = [
        max(image.width, *(int(f.getlength(t)) for f, t in zip(fonts, panel[1:], strict=True)))
        for image, panel in zip(images, panels, strict=True)
    ]
    height = max(image.height for image in images)
    sheet = Image.new(
        "RGB", (sum(widths) + GAP * (len(panels) + 1), CAPTION + height + GAP), "white"
    )
    pen, left = ImageDraw.Draw(sheet), GAP
    for panel, image, width in zip(panels, images, widths, strict=True):
        pen.text((left, 6), panel.title, fill=INK, font=fonts[0])
        pen.text((left, 28), panel.note, fill=PALE, font=fonts[1])
        sheet.paste(image, (left, CAPTION))
        left += width + GAP
    return sheet


def picture(image: UInt8[np.ndarray, "H W c"]) -> Image.Image:
    """An array as a picture; one channel is grey."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _fitted(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    if longer < LEAST:
        times = -(-LEAST // longer)
        size = (image.width * times, image.height * times)
        return image.resize(size, Image.Resampling.NEAREST)
    if longer > MOST:
        size = [max(1, round(n * MOST / longer)) for n in image.size]
        return image.resize(size, Image.Resampling.LANCZOS)
    return image
