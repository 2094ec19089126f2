"""All mixtures on one sheet: large what was given and the two parts, small the raw channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from efae_jax.lerp.mixing import raw_name
from efae_jax.panels import INK, PALE

MOST = 2800  # pixels a side, about
CELL, LARGE = 256, 640  # pixels of the longer side of a raw mixture and of a large panel, at most
SMALL = 128  # pictures of fewer pixels a side are enlarged without smoothing
LEFT, MARGIN, GAP = 60, 36, 8  # the titles of rows stand in the left margin
FOOT = 44  # for the titles of columns
INSET_FROM = 8  # channels: so large a triangle has room for the large panels beside it


class Captions(NamedTuple):
    """What is written: a title, a note below it, and how often differences are enlarged."""

    title: str
    note: str
    amplified: int


class _Grid(NamedTuple):
    """Where the mixtures of raw channels stand: (row, column) by name, and the lines' titles."""

    places: dict[str, tuple[int, int]]
    rows: list[str]
    columns: list[str]
    heading: str


def draw_sheet(
    read: Callable[[str], Image.Image], channels: int, paired: bool, captions: Captions
) -> Image.Image:
    """The sheet.

    The raw mixtures make a triangle, with single channels on its diagonal and pairs below it, or,
    without pairs, a grid. The large panels stand above it, or in a large triangle's empty half.

    Args:
      read: gives the picture of a name: "input", "target", "difference", "target-difference" and
        the names of `mixing.mixtures`; all of one size.
      channels: of the latent.
      paired: whether there are pairs.
      captions: what is written.
    """
    grid = _triangle(channels) if paired else _square(channels)
    native, count = read("input").size, len(grid.columns)
    inset = paired and channels >= INSET_FROM
    room = MOST - LEFT - MARGIN - (0 if inset else 2 * CELL)
    cell = _fitted(native, min(CELL, room // count - GAP))
    pitch = (cell[0] + GAP, cell[1] + GAP)
    small = (count * pitch[0] - GAP, len(grid.rows) * pitch[1] - GAP)
    large = _fitted(native, _inset_side(native, pitch, count) if inset else CELL)
    width = LEFT + max(small[0], 4 * (large[0] + GAP) - GAP) + MARGIN
    pen_sizes = [max(20, width // 64), max(14, width // 110)]
    title, text = (ImageFont.truetype(findfont("DejaVu Sans"), size) for size in pen_sizes)
    fits = cell[0] / text.getlength("00") > 1
    tick = text if fits else ImageFont.truetype(findfont("DejaVu Sans"), max(9, cell[0] // 3))
    line = round(1.5 * pen_sizes[1])
    header = MARGIN + round(1.5 * pen_sizes[0]) + line + GAP
    below = header + line + (0 if inset else 2 * (line + large[1] + GAP) + line)
    sheet = Image.new("RGB", (width, below + small[1] + FOOT), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((LEFT, MARGIN // 2), captions.title, fill=INK, font=title)
    note = _cut(captions.note, text, width - LEFT - MARGIN)
    pen.text((LEFT, header - line - GAP), note, fill=PALE, font=text)

    left = width - MARGIN - 4 * (large[0] + GAP) + GAP if inset else LEFT
    for row, names in enumerate(_large(captions.amplified)):
        for column, (name, caption) in enumerate(names.items()):
            x, y = left + column * (large[0] + GAP), header + row * (line + large[1] + GAP)
            pen.text((x, y), caption, fill=INK, font=text)
            sheet.paste(_scaled(read(name), large), (x, y + line))

    pen.text((LEFT, below - line), grid.heading, fill=INK, font=text)
    for name, (row, column) in grid.places.items():
        place = (LEFT + column * pitch[0], below + row * pitch[1])
        sheet.paste(_scaled(read(name), cell), place)
    for row, words in enumerate(grid.rows):
        middle = below + row * pitch[1] + cell[1] // 2
        pen.text((LEFT - GAP, middle), words, fill=PALE, font=tick, anchor="rm")
    for column, words in enumerate(grid.columns):
        middle = LEFT + column * pitch[0] + cell[0] // 2
        pen.text((middle, below + small[1] + GAP), words, fill=PALE, font=tick, anchor="ma")
    return sheet


def _large(amplified: int) -> list[dict[str, str]]:
    difference = f"{amplified} × |difference|"
    return [
        {
            "input": "original",
            "reconstruction": "its reconstruction",
            "difference": difference,
            "semantic": "semantic lerp",
        },
        {
            "target": "target",
            "target-reconstruction": "its reconstruction",
            "target-difference": difference,
            "style": "style lerp",
        },
    ]


def _triangle(channels: int) -> _Grid:
    places = {raw_name(i): (i, i) for i in range(channels)}
    places |= {raw_name(j, i): (i, j) for i in range(channels) for j in range(i)}
    numbers = [str(i) for i in range(channels)]
    heading = "lerp of raw channels: one on the diagonal, two below it"
    return _Grid(places, numbers, numbers, heading)


def _square(channels: int) -> _Grid:
    side = math.ceil(math.sqrt(channels))
    places = {raw_name(i): divmod(i, side) for i in range(channels)}
    rows = [str(i) for i in range(0, channels, side)]
    return _Grid(places, rows, [f"+{i}" for i in range(side)], "lerp of one raw channel")


def _inset_side(native: tuple[int, int], pitch: tuple[int, int], count: int) -> int:
    """The largest side of 2 x 4 panels that leave the triangle's stairs free."""
    for side in range(LARGE, CELL, -1):
        width, height = _fitted(native, side)
        # A line of text, at most as in MOST pixels of width, stands above each row of panels.
        stairs = math.ceil(2 * (height + MOST // 60 + GAP) / pitch[1])
        if 4 * (width + GAP) + MARGIN <= (count - stairs) * pitch[0]:
            return side
    return CELL


def _fitted(native: tuple[int, int], longer: int) -> tuple[int, int]:
    """So many pixels on the longer side; of small pictures, a whole number of times as many."""
    if max(native) < SMALL and (times := longer // max(native)) >= 1:
        return native[0] * times, native[1] * times
    return tuple(max(1, round(n * longer / max(native))) for n in native)


def _cut(words: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """As much of the words as there is room for."""
    if font.getlength(words) <= room:
        return words
    while words and font.getlength(words + "…") > room:
        words = words[:-1]
    return words + "…"


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    pixels_show = image.width <= size[0] and max(image.size) < SMALL
    how = Image.Resampling.NEAREST if pixels_show else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)
