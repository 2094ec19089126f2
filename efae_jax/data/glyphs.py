"""The built-in images: procedural coloured glyphs on coloured grounds, drawn with Pillow.

An image is a function of its index and size alone: no file, no font, no download. The kind of
glyph is the label; colours, ground, pose and size vary. No image equals one of its flips or
rotations, so an equivariant model has something to learn from each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from efae_jax.data.glyph_shapes import GLYPHS
from efae_jax.data.glyph_strokes import Colour, Stroke, draw_with_stroke
from efae_jax.data.left_out import LeftOut
from efae_jax.errors import UserError

KINDS = tuple(GLYPHS)
GROUNDS = ("gradient", "stripes", "checks", "waves", "hill", "disc", "dots")
TEST_OFFSET = 1 << 40  # held-out images use the indices from here on
Pen = ImageDraw.ImageDraw

# One array of points per glyph, so that one product poses the whole glyph.
_POINTS = {kind: np.concatenate([p for _, p in parts]) for kind, parts in GLYPHS.items()}
_PARTS = {
    kind: [
        (role, 2 * end - 2 * len(p), 2 * end) for (role, p), end in zip(parts, ends, strict=True)
    ]
    for kind, parts in GLYPHS.items()
    for ends in [np.cumsum([len(p) for _, p in parts]).tolist()]
}


@dataclass(frozen=True)
class Factors:
    """What an image shows and how it looks; `draw` turns it into pixels.

    kind, ground: names out of KINDS and GROUNDS. ground_colours: (from, to, pattern).
    glyph_colours: by role (main, accent, ink, light). shift: of the glyph's centre, in shorter
    sides; scale: half the glyph's width in shorter sides; tilt: clockwise radians.
    pattern: four numbers in [0, 1) that place the ground's pattern. stroke: None for no outlines.
    """

    kind: str
    ground: str
    ground_colours: tuple[Colour, Colour, Colour]
    glyph_colours: tuple[Colour, Colour, Colour, Colour]
    shift: tuple[float, float]
    scale: float
    tilt: float
    pattern: tuple[float, float, float, float]
    stroke: Stroke | None = None


def oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """sRGB bytes of a colour given by OKLab lightness (0..1), chroma (0..0.3) and hue (turns).

    Colours outside sRGB are clipped. Source: B. Ottosson, A perceptual color space (2020).
    """
    a, b = chroma * cos(2 * pi * hue), chroma * sin(2 * pi * hue)
    l_ = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m_ = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s_ = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
        -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
        -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
    )
    return tuple(
        round(255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055))
        for c in (min(max(c, 0.0), 1.0) for c in linear)
    )


def factors(index: int) -> Factors:
    """What image number `index` (0 <= index < 2^63) shows. A pure function."""
    # Only random() is used: of all methods of Random, its numbers alone never change.
    u = Random(index).random
    kind, ground = KINDS[int(u() * len(KINDS))], GROUNDS[int(u() * len(GROUNDS))]
    hue, dark = u(), u() < 0.3
    turn = (0.5, 0.35, 0.65, 0.42)[int(u() * 4)] + 0.06 * (u() - 0.5)
    level, chroma = (0.41, 0.075) if dark else (0.84, 0.075)
    level += 0.08 * (u() - 0.5)
    step, drift = (0.10 if dark else -0.09), 0.12 * (u() - 0.5)
    main = 0.74 if dark else 0.58
    return Factors(
        kind=kind,
        ground=ground,
        ground_colours=(
            oklch(level, chroma, hue),
            oklch(level + 0.8 * step, chroma * 1.25, hue + drift),
            oklch(level + 1.1 * step, chroma * 1.15, hue - 0.6 * drift),
        ),
        glyph_colours=(
            oklch(main + 0.08 * (u() - 0.5), 0.165, hue + turn),
            oklch(main + 0.08, 0.14, hue + turn + 0.12 + 0.06 * u()),
            oklch(0.24 if not dark else 0.2, 0.05, hue + turn),
            oklch(0.965, 0.025, hue + turn + 0.1),
        ),
        shift=(0.14 * (u() - 0.5), 0.14 * (u() - 0.5)),
        scale=0.34 + 0.07 * u(),
        tilt=0.5 * (u() - 0.5),
        pattern=(u(), u(), u(), u()),
    )


def draw(f: Factors, size: tuple[int, int]) -> Image.Image:
    """The RGB image of the given (height, width), antialiased. A pure function."""
    height, width = size
    side = min(size)
    sample = 4 if side <= 48 else 3 if side <= 96 else 2
    if f.stroke is not None:
        sample *= 2  # thin lines show whole pixels more than areas do
    canvas = _gradient(f, width * sample, height * sample)
    pen = ImageDraw.Draw(canvas)
    _PATTERNS[f.ground](pen, f, canvas.width, canvas.height, side * sample)

    unit = f.scale * side * sample
    c, s = unit * cos(f.tilt), unit * sin(f.tilt)
    centre = (
        canvas.width / 2 + f.shift[0] * side * sample,
        canvas.height / 2 + f.shift[1] * side * sample,
    )
    points = (_POINTS[f.kind] @ np.array([[c, s], [-s, c]]) + centre).ravel().tolist()
    parts = [(role, points[start:end]) for role, start, end in _PARTS[f.kind]]
    if f.stroke is None:
        for role, polygon in parts:
            pen.polygon(polygon, fill=f.glyph_colours[role])
    else:
        draw_with_stroke(canvas, parts, f.glyph_colours, f.stroke, unit)
    return canvas.reduce(sample)


def _gradient(f: Factors, width: int, height: int) -> Image.Image:
    """From the first ground colour to the second, in a direction that no flip keeps."""
    a, b = f.ground_colours[:2]
    corners = (0.0, 0.3, 0.6, 1.0) if f.pattern[0] < 0.5 else (0.4, 0.0, 1.0, 0.75)
    small = Image.new("RGB", (2, 2))
    small.putdata(
        [tuple(round(p + t * (q - p)) for p, q in zip(a, b, strict=True)) for t in corners]
    )
    return small.resize((width, height), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _no_pattern(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    pass


def _stripes(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    angle = pi * (0.12 + 0.26 * f.pattern[1]) * (1 if f.pattern[2] < 0.5 else -1)
    period = side * (0.3 + 0.2 * f.pattern[3])
    dx, dy = cos(angle), sin(angle)
    reach = (width + height) / 2
    n = int(reach / period) + 1
    for k in range(-n, n + 1):
        x = width / 2 - dy * k * period + 0.3 * period
        y = height / 2 + dx * k * period
        half = period / 4
        pen.polygon(
            [
                x - dx * reach * 1.5 - dy * half, y - dy * reach * 1.5 + dx * half,
                x + dx * reach * 1.5 - dy * half, y + dy * reach * 1.5 + dx * half,
                x + dx * reach * 1.5 + dy * half, y + dy * reach * 1.5 - dx * half,
                x - dx * reach * 1.5 + dy * half, y - dy * reach * 1.5 - dx * half,
            ],
            fill=f.ground_colours[2],
        )  # fmt: skip


def _checks(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    cell = side / (3 + int(2 * f.pattern[1]))
    x0, y0 = -cell * f.pattern[2], -cell * f.pattern[3]
    for row in range(int(height / cell) + 2):
        for column in range(row % 2, int(width / cell) + 2, 2):
            x, y = x0 + column * cell, y0 + row * cell
            pen.rectangle((x, y, x + cell, y + cell), fill=f.ground_colours[2])


def _waves(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    period, swell = side * (0.34 + 0.12 * f.pattern[1]), side * 0.06
    x = np.linspace(0, width, 17)
    wave = swell * np.sin(2 * pi * (x / (side * (0.7 + 0.4 * f.pattern[2])) + f.pattern[3]))
    xs = np.concatenate([x, x[::-1]])
    ys = np.concatenate([wave, (wave + period / 2)[::-1]])
    y = period * (f.pattern[0] - 1)
    while y < height + swell:
        pen.polygon(np.stack([xs, ys + y], 1).ravel().tolist(), fill=f.ground_colours[2])
        y += period


def _hill(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    x = np.linspace(0, 1, 17)
    top = 0.62 + 0.12 * f.pattern[1] + 0.1 * np.sin(2 * pi * (0.7 * x + f.pattern[2]))
    points = np.stack([x * width, top * height], 1).ravel().tolist()
    pen.polygon([*points, width, height, 0, height], fill=f.ground_colours[2])


def _disc(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    x, y = width * (0.25 + 0.5 * f.pattern[1]), height * (0.25 + 0.5 * f.pattern[2])
    r = side * (0.34 + 0.14 * f.pattern[3])
    pen.ellipse((x - r, y - r, x + r, y + r), fill=f.ground_colours[2])


def _dots(pen: Pen, f: Factors, width: int, height: int, side: int) -> None:
    cell, r = side / 3, side * (0.075 + 0.03 * f.pattern[3])
    for row in range(-1, int(height / cell) + 2):
        for column in range(-1, int(width / cell) + 2):
            x = (column + f.pattern[1] + row % 2 / 2) * cell
            y = (row + f.pattern[2]) * cell
            pen.ellipse((x - r, y - r, x + r, y + r), fill=f.ground_colours[2])


_PATTERNS = dict(
    zip(GROUNDS, (_no_pattern, _stripes, _checks, _waves, _hill, _disc, _dots), strict=True)
)


class Glyphs:
    """The built-in images as a data source: `num_examples` images of the given (height, width).

    Held-out images (split 'test') start at index TEST_OFFSET, training images at 0, so that the
    two never share one, whatever their numbers.
    """

    class_names = KINDS
    num_classes = len(KINDS)

    def __init__(self, split: str, num_examples: int, size: tuple[int, int]):
        self.left_out = LeftOut()
        self.offset = TEST_OFFSET if split == "test" else 0
        self.num_examples = num_examples
        self.size = size

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"glyphs: image {index} of {self.num_examples}")
        f = factors(self.offset + index)
        return {"image": draw(f, self.size), "label": KINDS.index(f.kind)}

    def key(self, index: int) -> str:
        return str(self.offset + index)

    def name(self, index: int) -> str:
        return f"glyphs, {'held-out ' if self.offset else ''}image {index}"


def open_glyphs(config: Any, split: str) -> Glyphs:
    """data.num_train or data.num_test images, drawn at the size that remains inside data.pad."""
    number = config.num_train if split == "train" else config.num_test
    size = tuple(side - 2 * config.pad for side in config.size)
    for name, value, least in (
        (f"num_{split}", number, 1),
        ("size", min(size, default=0), 8),
    ):
        if value < least:
            raise UserError(f"data.{name}: glyphs need at least {least}, got {value}")
    return Glyphs(split, number, size)
