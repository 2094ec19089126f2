"""The captioned built-in images: captions name the shape, and nothing else tells it."""

import colorsys
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from efae_jax.data.captioned_glyphs import (
    NAMES,
    NUM_CAPTIONS,
    TEMPLATES,
    WIDEST,
    CaptionedGlyphs,
    captioned_factors,
    captions,
    shape_vector,
    style_vector,
)
from efae_jax.data.glyph_shapes import ACCENT, INK, LIGHT, MAIN
from efae_jax.data.glyph_strokes import Stroke, draw_with_stroke
from efae_jax.data.glyphs import GROUNDS, KINDS, TEST_OFFSET, draw, factors

MANY = [captioned_factors(i) for i in range(4000)]


def pixels(f, side=64):
    return np.asarray(draw(f, (side, side))).astype(float)


def stroke_style(f):
    return "none" if f.stroke is None else "hollow" if f.stroke.hollow else "outlined"


def dependence(pairs):
    """Chi squared of a table of counts, as a share of its mean for independent names."""
    rows, columns = (sorted(set(names)) for names in zip(*pairs, strict=True))
    table = np.zeros((len(rows), len(columns)))
    for (a, b), n in Counter(pairs).items():
        table[rows.index(a), columns.index(b)] = n
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi = ((table - expected) ** 2 / expected).sum()
    return chi / ((len(rows) - 1) * (len(columns) - 1))


def test_shape_and_style_are_independent():
    def hue(colour):
        return int(6 * colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0])

    styles = {
        "ground": lambda f: f.ground,
        "stroke": stroke_style,
        "width": lambda f: f.stroke is not None and f.stroke.width > 0.085,
        "stroke's hue": lambda f: -1 if f.stroke is None else hue(f.stroke.colour),
        "ground's hue": lambda f: hue(f.ground_colours[0]),
        "glyph's hue": lambda f: hue(f.glyph_colours[0]),
    }
    for name, style in styles.items():
        assert dependence([(f.kind, style(f)) for f in MANY]) < 1.6, name


def test_the_wording_tells_neither_shape_nor_style():
    def wording(index, kind):
        text = captions(index)[0]
        return next(text.replace(name, "") for name in NAMES[kind] if name in text)

    wordings = [wording(i, f.kind) for i, f in enumerate(MANY)]
    assert len(set(wordings)) == len(TEMPLATES)
    for tell in (stroke_style, lambda f: f.kind, lambda f: f.ground):
        assert dependence(list(zip(wordings, map(tell, MANY), strict=True))) < 1.6


def test_styles_of_strokes_are_equally_frequent_and_vary():
    counts = Counter(map(stroke_style, MANY))
    assert all(abs(n / len(MANY) - 1 / 3) < 0.03 for n in counts.values())
    assert len(counts) == 3
    for hollow in (False, True):
        strokes = [f.stroke for f in MANY if f.stroke and f.stroke.hollow == hollow]
        widths = [s.width for s in strokes]
        assert max(widths) > 1.7 * min(widths)
        assert max(widths) <= WIDEST
        assert len({s.colour for s in strokes}) > 200
    outlined = [f for f in MANY if stroke_style(f) == "outlined"]
    roles = Counter(f.glyph_colours.index(f.stroke.colour) for f in outlined)
    assert sorted(roles) == [ACCENT, INK, LIGHT]
    assert all(abs(n / len(outlined) - 1 / 3) < 0.04 for n in roles.values())


def test_an_image_without_stroke_is_the_plain_one_of_its_index():
    for index in range(60):
        f = captioned_factors(index)
        assert replace(f, stroke=None) == factors(index)
    assert captioned_factors(7) == captioned_factors(7)
    known = {0: ("R", "none"), 1: ("boat", "outlined"), 6: ("moon", "hollow")}
    assert {i: (MANY[i].kind, stroke_style(MANY[i])) for i in known} == known


def glyph_alone(kind, stroke):
    """Red parts (blue ink) on a white ground, and what they cover without a stroke."""
    white, red, blue = (255,) * 3, (255, 0, 0), (0, 0, 255)
    colours = tuple(blue if role == INK else red for role in range(4))
    f = replace(MANY[0], kind=kind, ground="gradient", ground_colours=(white,) * 3, stroke=stroke)
    x = pixels(replace(f, glyph_colours=colours, tilt=0.1, scale=0.36), 96)
    return x, x.min(-1) < 250


@pytest.mark.parametrize("kind", ["fish", "key", "note", "4", "snail"])
def test_an_outline_surrounds_the_glyph_with_its_width(kind):
    green, width = (0, 255, 0), 0.1
    plain, covered = glyph_alone(kind, None)
    x, now = glyph_alone(kind, Stroke(width, green, hollow=False))
    assert not (covered & ~now).any()  # what was there is there
    y, x_ = np.nonzero(now & ~covered)
    ys, xs = np.nonzero(covered)
    distance = np.hypot(y[:, None] - ys, x_[:, None] - xs).min(1)
    pixels_wide = width * 0.36 * 96
    assert pixels_wide - 1.2 < distance.max() < pixels_wide + 1.2
    red = (plain == (255, 0, 0)).all(-1)
    assert (x[red] == (255, 0, 0)).all(-1).mean() > 0.55  # far inside, the parts keep their colour


@pytest.mark.parametrize("hollow", [False, True])
def test_parts_of_one_colour_that_meet_have_one_outline(hollow):
    canvas = Image.new("RGB", (60, 40), "white")
    left, right = ([x, 10, x + 20, 10, x + 20, 30, x, 30] for x in (10, 25))
    stroke = Stroke(0.2, (0, 255, 0), hollow)
    colours = ["red", "blue", "black", "grey"]
    fill = (255, 255, 255) if hollow else (255, 0, 0)
    draw_with_stroke(canvas, [(MAIN, left), (MAIN, right)], colours, stroke, 20)
    for x in (23, 27, 32):  # on either side of both parts' sides
        assert canvas.getpixel((x, 20)) == fill
    draw_with_stroke(canvas, [(MAIN, right), (ACCENT, left)], colours, stroke, 20)
    assert canvas.getpixel((32, 20)) == (0, 255, 0)
    for side in ((25, 7), (35, 33), (48, 20), (7, 20)):  # 3 pixels outside each
        assert canvas.getpixel(side) == (0, 255, 0)
    assert canvas.getpixel((47, 32)) == (0, 255, 0)  # a corner: within 4 pixels of (45, 30)
    assert canvas.getpixel((49, 34)) == (255, 255, 255)  # and beyond: corners are round


def test_ink_has_no_outline_and_takes_the_colour_of_a_hollow_glyph():
    square = [10, 10, 20, 10, 20, 20, 10, 20]
    for hollow, colour in ((False, (0, 0, 255)), (True, (0, 255, 0))):
        canvas = Image.new("RGB", (30, 30), "white")
        stroke = Stroke(0.2, (0, 255, 0), hollow)
        draw_with_stroke(canvas, [(INK, square)], [(0, 0, 255)] * 4, stroke, 20)
        assert canvas.getpixel((15, 15)) == colour
        assert canvas.getpixel((22, 15)) == (255, 255, 255)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hollow_glyph_shows_the_ground_inside_its_lines(kind):
    green = (0, 255, 0)
    _, covered = glyph_alone(kind, None)
    x, now = glyph_alone(kind, Stroke(0.08, green, hollow=True))
    assert set(map(tuple, x[(x == x.round()).all(-1)].reshape(-1, 3))) >= {green, (255.0,) * 3}
    assert x[..., 1].min() == 255  # nothing but green and white: no colour of the parts
    assert (covered & ~now).sum() > 0.1 * covered.sum()
    assert now.sum() > 300


@pytest.mark.parametrize("side", [16, 32, 100])
def test_strokes_scale_with_the_image(side):
    for index in (0, 2, 3, 5, 8):
        large = draw(captioned_factors(index), (4 * side, 4 * side)).reduce(4)
        x = pixels(captioned_factors(index), side)
        assert np.square(np.asarray(large, float) - x).mean() < 80  # 29 dB


def test_every_hollow_glyph_stands_out_from_its_ground():
    hollow = [f for f in MANY if stroke_style(f) == "hollow"]
    apart = [
        np.abs(np.subtract(f.stroke.colour, ground)).max()
        for f in hollow
        for ground in f.ground_colours
    ]
    assert min(apart) > 60


def test_captions_name_the_shape_and_differ():
    used = Counter()
    for index in range(300):
        texts = captions(index)
        assert texts == captions(index)
        assert len(set(texts)) == NUM_CAPTIONS == len(texts)
        kind = captioned_factors(index).kind
        for text in texts:
            matches = [
                (k, template)
                for k, names in NAMES.items()
                for name in names
                for template in TEMPLATES
                if template.format(name) == text
            ]
            assert {k for k, _ in matches} == {kind}, text
            used[matches[0][1]] += 1
    assert len(used) == len(TEMPLATES)
    assert min(used.values()) > 0.6 * 300 * NUM_CAPTIONS / len(TEMPLATES)
    assert len({captions(i) for i in range(300)}) > 290


def test_articles_are_right_and_every_kind_has_a_name():
    assert tuple(NAMES) == KINDS
    for name in (n for names in NAMES.values() for n in names):
        article, first = name.split()[:2]
        vowel = first[0] in "aeiou" or first == "R"  # said "ar"
        assert article == "the" or (article == "an") == vowel, name


def test_shape_vector_is_the_kind():
    for f in MANY[:50]:
        vector = shape_vector(f)
        assert (vector.dtype, vector.sum(), KINDS[vector.argmax()]) == (np.float32, 1, f.kind)


def test_style_vector_tells_the_style_and_not_the_shape():
    names = ("none", "outlined", "hollow")
    for f in MANY[:200]:
        v = style_vector(f)
        assert (v.shape, v.dtype) == ((35,), np.float32)
        assert abs(v).max() <= 1
        assert (v[:7].sum(), GROUNDS[v[:7].argmax()]) == (1, f.ground)
        assert (v[7:10].sum(), names[v[7:10].argmax()]) == (1, stroke_style(f))
        assert v[10] == pytest.approx(f.stroke.width / WIDEST if f.stroke else 0)
        colours = np.round((v[11:] + 1) * 127.5).reshape(8, 3)
        assert tuple(colours[0]) == f.ground_colours[0]
        if f.ground == "gradient":
            assert not v[17:20].any()
        else:
            assert tuple(colours[2]) == f.ground_colours[2]
        if stroke_style(f) == "hollow":
            assert not v[20:32].any()
        else:
            assert tuple(map(tuple, colours[3:7])) == f.glyph_colours
        if f.stroke is None:
            assert not v[32:].any()
        else:
            assert tuple(colours[7]) == f.stroke.colour
        moved = replace(f, kind="fish", shift=(0.0, 0.0), tilt=0.0, scale=0.3, pattern=(0.5,) * 4)
        np.testing.assert_array_equal(style_vector(moved), v)


def test_records_and_held_out_images():
    train, test = (CaptionedGlyphs(split, 20, (16, 24)) for split in ("train", "test"))
    assert (train.key(3), test.key(3)) == ("3", str(TEST_OFFSET + 3))
    record = pickle.loads(pickle.dumps(test))[3]
    f = captioned_factors(TEST_OFFSET + 3)
    assert record["factors"] == f
    assert record["captions"] == captions(TEST_OFFSET + 3)
    assert KINDS[record["label"]] == f.kind
    assert record["image"].size == (24, 16)
    assert record["image"].tobytes() == draw(f, (16, 24)).tobytes()
    assert test.name(3) == "captioned_glyphs, held-out image 3"
    assert len(test) == 20
    assert test.num_classes == len(KINDS)
    with pytest.raises(IndexError, match="image 20 of 20"):
        test[20]
