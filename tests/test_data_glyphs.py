"""The built-in images: the same everywhere, never symmetric, at any size."""

from dataclasses import replace

import numpy as np
import pytest
from data_files import data_config
from PIL import Image

from efae_jax.data import make_source
from efae_jax.data.glyph_shapes import curve, stroke
from efae_jax.data.glyphs import GROUNDS, KINDS, TEST_OFFSET, draw, factors
from efae_jax.errors import UserError


def transformed(x_HWC):
    """The seven other flips and rotations of a square image."""
    for turns in range(4):
        turned = np.rot90(x_HWC, turns)
        if turns:
            yield turned
        yield turned[:, ::-1]


def pixels(f, side=32):
    return np.asarray(draw(f, (side, side))).astype(float)


def test_no_image_resembles_one_of_its_transforms():
    for index in range(300):
        x = pixels(factors(index))
        for number, y in enumerate(transformed(x)):
            assert abs(x - y).mean() > 4, (index, number)  # grey levels out of 255


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_asymmetric_on_its_own(kind):
    black, white = (0, 0, 0), (255, 255, 255)
    f = replace(factors(0), kind=kind, ground="gradient", ground_colours=(white,) * 3)
    f = replace(f, glyph_colours=(black,) * 4, shift=(0.0, 0.0), tilt=0.0, scale=0.4)
    x = pixels(f)
    assert all(abs(x - y).mean() > 8 for y in transformed(x))


def test_factors_are_a_fixed_function_of_the_index():
    known = {0: ("R", "disc"), 1: ("boat", "disc"), 2: ("4", "dots"), 3: ("house", "waves")}
    assert {i: (factors(i).kind, factors(i).ground) for i in known} == known
    assert factors(5) == factors(5)
    assert factors(5) != factors(6)


def test_all_kinds_and_grounds_occur_about_equally_often():
    many = [factors(i) for i in range(2000)]
    for names, values in ((KINDS, [f.kind for f in many]), (GROUNDS, [f.ground for f in many])):
        assert len(names) >= 7
        for name in names:
            assert 0.6 < values.count(name) * len(names) / 2000 < 1.5, name
    assert len(KINDS) >= 10


def test_colours_vary():
    grounds = np.array([factors(i).ground_colours[0] for i in range(500)])
    glyphs = np.array([factors(i).glyph_colours[0] for i in range(500)])
    for colours in (grounds, glyphs):
        assert all(np.bincount(colours.argmax(1), minlength=3) > 80)
    assert np.abs(grounds - glyphs).max(1).min() > 25  # and a glyph stands out from its ground


def test_a_pen_stroke_has_its_width_everywhere():
    path = curve((-0.8, -0.4), (-0.2, 0.3), (0.5, 0.1), (0.7, 0.8))
    distances = np.linalg.norm(stroke(0.2, path)[:, None] - path, axis=-1).min(1)
    np.testing.assert_allclose(distances, 0.1, atol=0.01)
    assert stroke(0.2, path)[:, 1].max() > 0.88  # round ends reach beyond the path's


def test_train_and_held_out_images_are_disjoint():
    config = data_config(source="glyphs", num_train=150, num_test=150)
    train, test = make_source(config, "train"), make_source(config, "test")
    assert test.offset == TEST_OFFSET > train.offset + 2**32
    images = {s[i]["image"].tobytes() for s in (train, test) for i in range(150)}
    assert len(images) == 300


def test_labels_name_the_kind():
    source = make_source(data_config(source="glyphs", num_train=40), "train")
    assert source.num_classes == len(KINDS)
    for index in range(40):
        assert KINDS[source[index]["label"]] == factors(index).kind
    with pytest.raises(IndexError):
        source[40]


@pytest.mark.parametrize("size", [(8, 8), (24, 56), (64, 64), (100, 37), (256, 256)])
def test_any_size(size):
    image = make_source(data_config(source="glyphs", size=size), "train")[0]["image"]
    assert (image.mode, image.size) == ("RGB", size[::-1])


def test_sizes_show_the_same_picture():
    for index in range(40):
        large = draw(factors(index), (128, 128)).resize((32, 32), Image.Resampling.BOX)
        error = np.square(np.asarray(large, float) - pixels(factors(index))).mean()
        assert error < 60, index  # 30 dB


def test_padding_leaves_room_inside_the_size():
    config = data_config(source="glyphs", size=(32, 32), pad=2)
    assert make_source(config, "test")[0]["image"].size == (28, 28)


@pytest.mark.parametrize("changes", [{"num_train": 0}, {"size": (4, 32)}, {"pad": 3}])
def test_impossible_settings_are_named(changes):
    with pytest.raises(UserError, match=r"data\.(num_train|size)"):
        make_source(data_config(source="glyphs", **changes), "train")
