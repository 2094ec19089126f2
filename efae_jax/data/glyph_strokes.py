"""Outlines around the parts of a glyph, and glyphs that are outlines only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw

from efae_jax.data.glyph_shapes import INK

Colour = tuple[int, int, int]
Outline = list[float]  # x0, y0, x1, y1, ... of a closed polygon


@dataclass(frozen=True)
class Stroke:
    """The line around each part of a glyph, except the ink, which is lines and dots already.

    width: outside the part, in halves of the glyph's width. hollow: the ground shows through the
    parts instead of their colours, and the ink takes the line's colour.
    """

    width: float
    colour: Colour
    hollow: bool


def draw_with_stroke(
    canvas: Image.Image,
    parts: Sequence[tuple[int, Outline]],
    colours: Sequence[Colour],
    stroke: Stroke,
    unit: float,
) -> None:
    """Draws the (role, polygon) parts onto the canvas in their order, each with its outline.

    colours: of the parts, by role. unit: half the glyph's width in pixels.
    """
    ground = canvas.copy()
    pen = ImageDraw.Draw(canvas)
    # Neighbours in one colour have one outline, or pens that meet would show where.
    for role, group in groupby(parts, key=lambda part: part[0]):
        polygons = [polygon for _, polygon in group]
        for polygon in polygons if role != INK else ():
            _trace(pen, polygon, stroke.width * unit, stroke.colour)
        if stroke.hollow and role != INK:
            inside = Image.new("1", canvas.size)
            for polygon in polygons:
                ImageDraw.Draw(inside).polygon(polygon, fill=1)
            canvas.paste(ground, mask=inside)
        else:
            fill = stroke.colour if stroke.hollow else colours[role]
            for polygon in polygons:
                pen.polygon(polygon, fill=fill)


def _trace(pen: ImageDraw.ImageDraw, polygon: Outline, radius: float, colour: Colour) -> None:
    """All points within the radius of the polygon's sides."""
    pen.line(polygon + polygon[:2], fill=colour, width=max(1, round(2 * radius)))
    for x, y in zip(polygon[::2], polygon[1::2], strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
