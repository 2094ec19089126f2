"""The built-in images with captions: the captions name the shape, all else is style.

An image is one of `glyphs`, at times with outlines or hollow. Its kind is drawn independently of
its ground, its colours, its stroke and its pose, so that nothing of the style tells the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
from jaxtyping import Float32

from efae_jax.data.glyph_shapes import ACCENT, INK, LIGHT, MAIN
from efae_jax.data.glyph_strokes import Colour, Stroke
from efae_jax.data.glyphs import GROUNDS, KINDS, Factors, Glyphs, draw, factors

NUM_CAPTIONS = 5
NAMES = {
    "fish": ("a fish",),
    "snail": ("a snail",),
    "boat": ("a boat", "a sailing boat"),
    "house": ("a house",),
    "mug": ("a mug", "a cup"),
    "note": ("a musical note", "a note"),
    "bird": ("a bird",),
    "key": ("a key",),
    "flag": ("a flag",),
    "cactus": ("a cactus",),
    "whale": ("a whale",),
    "teapot": ("a teapot",),
    "moon": ("a moon", "a crescent moon"),
    "R": ("the letter R", "an R"),
    "G": ("the letter G", "a G"),
    "4": ("the number 4", "a 4"),
}
TEMPLATES = (
    "{}",
    "a picture of {}",
    "a drawing of {}",
    "an image of {}",
    "an illustration of {}",
    "an icon of {}",
    "this is {}",
    "here is {}",
    "the picture shows {}",
    "somebody drew {}",
    "there is {} in the picture",
    "a picture with {} in it",
)
WIDEST = 0.13  # of all strokes


def captioned_factors(index: int) -> Factors:
    """What captioned image number `index` (0 <= index < 2^63) shows. A pure function.

    As `factors`, and a stroke: none, an outline around the coloured parts, or the outline alone,
    a third of the images each.
    """
    f = factors(index)
    u = _stream(index, 2)
    style, width, colour = int(u() * 3), u(), u()
    if style == 0:
        return f
    if style == 1:
        width, roles = 0.05 + 0.08 * width, (INK, LIGHT, ACCENT)
    else:  # a line alone must stand out from the ground
        dark_ground = sum(f.ground_colours[0]) < 3 * 128
        width, roles = 0.06 + 0.05 * width, (LIGHT if dark_ground else INK, MAIN)
    role = roles[int(colour * len(roles))]
    return replace(f, stroke=Stroke(width, f.glyph_colours[role], hollow=style == 2))


def captions(index: int) -> tuple[str, ...]:
    """Five different sentences that name the shape of captioned image `index`, and no style."""
    u = _stream(index, 1)
    left, names = list(TEMPLATES), NAMES[factors(index).kind]
    drawn = [left.pop(int(u() * len(left))) for _ in range(NUM_CAPTIONS)]
    return tuple(template.format(names[int(u() * len(names))]) for template in drawn)


def _stream(index: int, number: int):
    # Apart from the seeds of `factors`, which are below 2^63.
    return Random((number << 64) + index).random


def shape_vector(f: Factors) -> Float32[np.ndarray, " K"]:
    """What the captions tell of an image: its kind as a one-hot vector, in the order of KINDS."""
    return np.eye(len(KINDS), dtype=np.float32)[KINDS.index(f.kind)]


def style_vector(f: Factors) -> Float32[np.ndarray, " S"]:
    """How an image looks, whatever its kind: S = 35 numbers. What cannot be seen is 0.

    Entries:
      0-6: the ground, one-hot in the order of GROUNDS.
      7-9: no stroke, outlined, hollow, one-hot.
      10: the stroke's width as a share of the widest.
      11-19: the ground's colours: from, to, pattern (0 on a plain gradient).
      20-31: the glyph's colours: main, accent, ink, light (0 where hollow).
      32-34: the stroke's colour (0 without a stroke).

    Colours are red, green and blue in [-1, 1]. Where the glyph and the pattern lie, and the
    glyph's size and tilt, are neither shape nor style.
    """
    vector = np.zeros(35, np.float32)
    vector[GROUNDS.index(f.ground)] = 1
    vector[7 + (0 if f.stroke is None else 2 if f.stroke.hollow else 1)] = 1
    vector[11:20] = _numbers(f.ground_colours)
    if f.ground == "gradient":
        vector[17:20] = 0
    if f.stroke is None or not f.stroke.hollow:
        vector[20:32] = _numbers(f.glyph_colours)
    if f.stroke is not None:
        vector[10] = f.stroke.width / WIDEST
        vector[32:35] = _numbers([f.stroke.colour])
    return vector


def _numbers(colours: Sequence[Colour]) -> np.ndarray:
    return np.asarray(colours, np.float32).ravel() / 127.5 - 1


class CaptionedGlyphs(Glyphs):
    """`num_examples` captioned images of the given (height, width) as a data source.

    Records are {'image': Pillow image, 'label': the kind's number, 'captions': 5 sentences,
    'factors': Factors}. Held-out images as in `Glyphs`.
    """

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"captioned_glyphs: image {index} of {self.num_examples}")
        f = captioned_factors(self.offset + index)
        return {
            "image": draw(f, self.size),
            "label": KINDS.index(f.kind),
            "captions": captions(self.offset + index),
            "factors": f,
        }

    def name(self, index: int) -> str:
        return f"captioned_{super().name(index)}"
