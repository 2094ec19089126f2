"""Every image a file can hold becomes the right uint8 array."""

import io
import struct
import zlib
from random import Random

import numpy as np
import pytest
from data_files import data_config, encoded, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile

from efae_jax.data import Transform, make_transform
from efae_jax.data.transforms import BadImageError
from efae_jax.errors import UserError

WHOLE = Transform((10, 12))  # the size of picture(): nothing is resized
RGB = np.asarray(picture(0))


def rgb(image, transform=WHOLE, seed=0):
    return transform(image, Random(seed))


def psnr(x, y):
    return 10 * np.log10(255**2 / max(np.square(x.astype(float) - y).mean(), 1e-9))


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "P", "PA"]
)
def test_colour_modes_become_rgb(mode):
    image = picture(0)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode in ("PA", "RGBa"):
        image = image.convert("RGBA").convert(mode)
    else:
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    assert image.mode == mode
    assert psnr(rgb(image), RGB) > (25 if mode in ("P", "PA") else 30)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "I", "F", "I;16", "I;16B", "1"])
def test_grey_modes_become_three_equal_channels_or_one(mode):
    grey = np.asarray(picture(0).convert("L"))
    if mode == "1":
        grey = np.where(grey > 90, 255, 0).astype(np.uint8)
        image = Image.fromarray(grey > 90)
    elif mode == "F":
        image = Image.fromarray((grey / 255).astype(np.float32))
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        data = (grey.astype(np.uint16) * 257).astype(order).tobytes()
        image = Image.frombytes(mode, (12, 10), data)
    else:
        image = Image.fromarray(grey)
        image = image.convert("LA").convert(mode) if mode != "L" else image
    assert image.mode == mode
    np.testing.assert_array_equal(rgb(image), np.repeat(grey[..., None], 3, -1))
    one = rgb(image, Transform((10, 12), channels=1))
    np.testing.assert_array_equal(one, grey[..., None])


def test_colour_to_one_channel_is_luma():
    one = rgb(picture(0), Transform((10, 12), channels=1))
    np.testing.assert_allclose(one[..., 0], RGB @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_becomes_white(mode):
    options = {}
    if mode == "RGBA":
        image = Image.new(mode, (4, 4), (200, 0, 0, 0))
        image.putpixel((0, 0), (200, 0, 0, 255))
        image.putpixel((1, 0), (200, 0, 0, 128))
    elif mode == "LA":
        image = Image.new(mode, (4, 4), (10, 0))
        image.putpixel((0, 0), (10, 255))
    else:
        image = Image.new("RGB", (4, 4), (0, 0, 255))
        image.putpixel((0, 0), (200, 0, 0))
        image = image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image
        options["transparency"] = image.getpixel((3, 3))
    x = rgb(encoded(image, **options), Transform((4, 4)))
    np.testing.assert_array_equal(x[2:], 255)
    np.testing.assert_allclose(x[0, 0], [10] * 3 if mode == "LA" else [200, 0, 0], atol=8)
    if mode == "RGBA":
        np.testing.assert_allclose(x[0, 1], [227, 127, 127], atol=2)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form, orientation):
    # How a camera that was held so has stored the picture (the standard's own definitions).
    x = RGB
    stored = {
        1: x,
        2: x[:, ::-1],
        3: x[::-1, ::-1],
        4: x[::-1],
        5: x.transpose(1, 0, 2),
        6: np.rot90(x, 1),
        7: x[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    image = Image.fromarray(np.ascontiguousarray(stored))
    data = encoded(image, form, exif=exif, **quality.get(form, {}))
    assert psnr(rgb(data), RGB) > (38 if form == "JPEG" else 90)


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    factor=st.integers(1, 3),
    extra=st.integers(0, 5),
    tall=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_one_pass_equals_resize_then_crop(height, width, factor, extra, tall, seed):
    """The reference: the whole image to the size that just covers the target, then a cut."""
    full = (height + extra, width) if tall else (height, width + extra)
    image = picture(seed, full[1] * factor, full[0] * factor)
    x = rgb(image, Transform((height, width), crop="random"), seed)
    resized = np.asarray(image.resize(full[::-1], Image.Resampling.BICUBIC)).astype(int)
    cuts = [
        resized[d : d + height, a : a + width]
        for d in range(full[0] - height + 1)
        for a in range(full[1] - width + 1)
    ]
    assert min(abs(cut - x).max() for cut in cuts) <= 1


def test_crops_reach_every_place_and_the_centre_is_the_centre():
    image = picture(0, 12, 4)
    random = Transform((4, 4), crop="random")
    x = np.asarray(image)
    places = set()
    for seed in range(200):
        cut = rgb(image, random, seed)
        places |= {a for a in range(9) if np.array_equal(cut, x[:, a : a + 4])}
    assert places == set(range(9))
    for seed in range(3):
        np.testing.assert_array_equal(rgb(image, Transform((4, 4)), seed), x[:, 4:8])


def test_mixed_crops_take_half_of_the_images_at_their_own_size():
    image = picture(0, 12, 10)
    x, mixed = np.asarray(image), Transform((4, 6), crop="mixed")
    places = [(d, a) for d in range(7) for a in range(7)]
    found = []
    for seed in range(300):
        cut = rgb(image, mixed, seed)
        native = [p for p in places if np.array_equal(cut, x[p[0] : p[0] + 4, p[1] : p[1] + 6])]
        if not native:  # then it is what a random crop gives
            np.testing.assert_array_equal(cut, rgb(image, Transform((4, 6), crop="random"), seed))
        found += native
    assert 110 < len(found) < 190
    assert {d for d, _ in found} == {a for _, a in found} == set(range(7))
    # Too small for it: always resized.
    small = Transform((11, 11), crop="mixed")
    for seed in range(8):
        expected = rgb(image, Transform((11, 11), crop="random"), seed)
        np.testing.assert_array_equal(rgb(image, small, seed), expected)


@pytest.mark.parametrize(
    ("side", "asked", "first", "black"),
    [
        # Of torchvision's CenterCrop: round((side - asked) / 2), halves to even; (asked - side)//2
        # black lines before an image that is smaller.
        (12, 12, 0, 0),
        (12, 6, 3, 0),
        (13, 12, 0, 0),
        (11, 8, 2, 0),
        (13, 8, 2, 0),
        (5, 8, 0, 1),
        (6, 8, 0, 1),
    ],
)
def test_native_crops_are_the_centre_of_the_image_as_it_is(side, asked, first, black):
    x = np.asarray(picture(0, side, side)) // 2 + 100
    expected = np.zeros((asked, asked, 3), np.uint8)
    inside = slice(black, black + min(side, asked))
    part = slice(first, first + min(side, asked))
    expected[inside, inside] = x[part, part]
    for image in (x, Image.fromarray(x), encoded(Image.fromarray(x))):
        native = Transform((asked, asked), crop="native")
        np.testing.assert_array_equal(rgb(image, native), expected)
    # Each side by itself.
    one = rgb(Image.fromarray(x), Transform((side, asked), crop="native"))
    np.testing.assert_array_equal(one[:, inside], x[:, part])


def test_native_crops_see_all_pixels_of_a_large_jpeg():
    image = picture(0, 96, 96)
    whole = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG", quality=95))))
    cut = rgb(encoded(image, "JPEG", quality=95), Transform((8, 8), crop="native"))
    np.testing.assert_array_equal(cut, whole[44:52, 44:52])


def test_zoomed_crops_are_half_to_all_of_the_shorter_side_anywhere():
    # Pixels tell where they come from: red by column, green by row.
    row, column = np.mgrid[0:80, 0:120]
    image = np.stack([column * 2, row * 3, np.zeros_like(row)], axis=-1).astype(np.uint8)
    sides, lefts = [], []
    for seed in range(200):
        cut = rgb(image, Transform((8, 8), crop="zoom"), seed).astype(float)
        assert cut.shape == (8, 8, 3)
        across, down = cut[0, :, 0] / 2, cut[:, 0, 1] / 3
        step = (across[-1] - across[0]) / 7
        assert (down[-1] - down[0]) / 7 == pytest.approx(step, abs=0.2)  # a square
        sides.append(8 * step)
        lefts.append(across[0] - step / 2)
        assert -0.6 <= lefts[-1] <= 120 - sides[-1] + 0.6
    assert 38 < min(sides) < 44
    assert 76 < max(sides) < 82
    assert np.mean(sides) == pytest.approx(60, abs=3)
    assert min(lefts) < 3
    assert max(lefts) > 60
    # By area: the mean of the pixels that a pixel covers, where the side is a multiple.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = rgb(noise, Transform((1, 1), crop="zoom"), 5).reshape(3).astype(float)
    assert np.abs(found - 127).max() < 10
    # An image smaller than the result is enlarged.
    assert rgb(picture(0), Transform((64, 64), crop="zoom")).shape == (64, 64, 3)


def test_an_odd_size_keeps_its_proportions():
    # 100 x 37 to 20 x 20: the shorter side decides, so a disc stays a disc.
    y, x = np.mgrid[0:100, 0:37]
    disc = np.where((y - 50) ** 2 + (x - 18) ** 2 < 14**2, 255, 0).astype(np.uint8)
    cut = rgb(disc, Transform((20, 20)))[..., 0] > 127
    across, down = cut.any(0).sum(), cut.any(1).sum()
    assert abs(across - 27 * 20 / 37) < 1
    assert abs(down - 27 * 20 / 37) < 1


def test_flip():
    flip = Transform((10, 12), flip=True)
    results = [rgb(picture(0), flip, seed) for seed in range(100)]
    mirrored = [np.array_equal(x, RGB[:, ::-1]) for x in results]
    assert all(m or np.array_equal(x, RGB) for m, x in zip(mirrored, results, strict=True))
    assert 30 < sum(mirrored) < 70


def test_pad_is_black_and_inside_the_size():
    image = picture(0, 28, 28)
    x = rgb(image, Transform((32, 32), pad=2)).copy()
    np.testing.assert_array_equal(x[2:-2, 2:-2], np.asarray(image))
    x[2:-2, 2:-2] = 0
    assert not x.any()


@pytest.mark.parametrize("array", [RGB, RGB[..., 0], RGB[..., :1]])
def test_arrays(array):
    grey = array.ndim == 2 or array.shape[-1] == 1
    expected = np.repeat(RGB[..., :1], 3, -1) if grey else RGB
    np.testing.assert_array_equal(rgb(array), expected)
    with pytest.raises(BadImageError, match="float64"):
        rgb(array.astype(float))


def test_smaller_jpeg_decode_is_used_and_close(monkeypatch):
    data = encoded(picture(3, 640, 480), "JPEG", quality=95)
    fast = rgb(data, Transform((32, 32)))
    sizes = []
    load = JpegImageFile.load

    def watch(image):
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImageFile, "load", watch)
    rgb(data, Transform((32, 32)))
    assert sizes[0] == (160, 120)  # a quarter: still twice 32 and more
    monkeypatch.setattr(JpegImageFile, "draft", Image.Image.draft)  # does nothing
    assert psnr(fast, rgb(data, Transform((32, 32)))) > 45


def test_too_many_pixels_are_refused_before_decoding():
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def bomb(side):  # a header that promises side^2 pixels, and nothing behind it
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", b"")
            + chunk(b"IEND", b"")
        )

    with pytest.raises(BadImageError, match=r"data.max_pixels=1,000,000 .*2000x2000"):
        rgb(bomb(2000), Transform((8, 8), max_pixels=1_000_000))
    with pytest.raises(BadImageError, match="data.max_pixels=100,000,000"):  # and than Pillow's
        rgb(bomb(20_000), Transform((8, 8), max_pixels=10**8))
    assert rgb(picture(0), Transform((8, 8), max_pixels=120)).shape == (8, 8, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_raise(form):
    data = encoded(picture(0, 64, 64), form)
    assert rgb(data, Transform((8, 8))).shape == (8, 8, 3)
    for broken in (b"", b"garbage", data[: len(data) // 2]):
        with pytest.raises((OSError, SyntaxError, ValueError, BadImageError)):
            rgb(broken, Transform((8, 8)))


def test_formats_that_need_other_programs_are_refused():
    data = encoded(picture(0), "EPS")
    with pytest.raises(BadImageError, match="PostScript"):
        rgb(data)


def test_make_transform_is_plain_for_evaluation():
    config = data_config(size=[6, 4], channels=1, crop="random", flip=True, pad=1, max_pixels=99)
    assert make_transform(config, train=True) == Transform((6, 4), 1, "random", True, 1, 99)
    assert make_transform(config, train=False) == Transform((6, 4), 1, "center", False, 1, 99)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (8,)),
        ("size", (0, 8)),
        ("channels", 4),
        ("crop", "middle"),
        ("pad", 4),
        ("max_pixels", 0),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(UserError, match=f"data.{field}"):
        Transform(**{"size": (8, 8), field: value})
