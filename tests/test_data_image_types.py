"""Types of images and ranges of their numbers: read as their files say, or refused and counted."""

import io
import struct
from random import Random

import numpy as np
import pytest
from data_files import data_config, encoded, picture
from PIL import Image, PngImagePlugin, TiffImagePlugin

from efae_jax.data import Transform, make_source
from efae_jax.data.bad_image import BadImageError, reason_of
from efae_jax.data.image_types import extensions, foreign, formats, is_image, stored
from efae_jax.data.left_out import LeftOut, account, account_lines
from efae_jax.data.transforms import fit, read_picture
from efae_jax.errors import UserError


def grey(data):
    """The values of an image of one row, in 8 bits."""
    return read_picture(data, channels=1)[..., 0]


def tiff(values, **tags):
    names = {"bits": 258, "photometric": 262, "max": 281, "smin": 340, "smax": 341}
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        ifd[names[name]] = value
        if name.startswith("s"):
            ifd.tagtype[names[name]] = 11 if isinstance(value, float) else 9
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=ifd)


# Types


def test_common_types_are_read_and_programs_are_not_called():
    assert {".jpg", ".png", ".webp", ".avif", ".jfif", ".tga", ".qoi", ".psd"} <= {*extensions()}
    assert not {".eps", ".wmf", ".pdf", ".svg", ".heic"} & {*extensions()}
    assert not {"EPS", "WMF"} & {*formats()}
    assert is_image("a/B.JPEG")
    assert not is_image("notes.txt")
    assert foreign("x.HEIC") == "of type .heic, which is not read here"
    assert foreign("x.eps") == "of type .eps, which is not read here"
    assert foreign("x.mp4") == "videos (.mp4)"
    assert foreign("x.txt") is None
    assert foreign("x.png") is None


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        *((".avif", "AVIF"), (".jfif", "JPEG"), (".tga", "TGA"), (".qoi", "QOI")),
        *((".pcx", "PCX"), (".ico", "ICO"), (".dds", "DDS"), (".sgi", "SGI")),
        *((".apng", "PNG"), (".jp2", "JPEG2000"), (".dib", "DIB"), (".jif", "JPEG")),
        (".mpo", "MPO"),
    ],
)
def test_types_that_pillow_reads(tmp_path, ending, form):
    image = picture(3, 32, 32)
    (tmp_path / f"x{ending}").write_bytes(encoded(image, form))
    source = make_source(data_config(path=str(tmp_path)), "all")
    found = Transform((32, 32))(source[0]["image"], Random(0)).astype(int)
    assert abs(found - np.asarray(image)).mean() < 3


def test_what_has_no_signature_is_never_guessed():
    """A damaged file of another type would pass for TGA, with some pixels or other."""
    content = encoded(picture(0), "TGA")
    with pytest.raises(BadImageError, match="no image that Pillow reads here"):
        read_picture(content)
    assert read_picture(stored(content, "x.TGA")).shape == (10, 12, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><p>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0\0\0\x18ftypheic....", "HEIF"),
        (b"\0\0\0\x18ftypisom....", "a video"),
        (b"\0" * 100, "zeros"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"nonsense", "a file that begins with b.nonsense'"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(content, words):
    with pytest.raises(BadImageError, match=words):
        read_picture(content)


# Numbers

DEEP = np.array([[0, 257 * 100, 65535]], np.uint16)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "PPM"])
def test_sixteen_bits(form):
    np.testing.assert_array_equal(grey(encoded(Image.fromarray(DEEP), form)), [[0, 100, 255]])


def test_a_pgm_of_ten_bits():
    data = b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023)
    np.testing.assert_array_equal(grey(data), [[0, 128, 255]])


def test_a_stated_largest_value_is_white():
    values = np.array([[0, 2048, 4095]], np.uint16)
    np.testing.assert_array_equal(grey(tiff(values, max=4095)), [[0, 128, 255]])


def test_white_may_be_zero():
    np.testing.assert_array_equal(grey(tiff(DEEP, photometric=0)), [[255, 155, 0]])


def test_floats_are_zero_to_one_unless_they_say_otherwise():
    one = np.array([[0, 0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(grey(tiff(one)), [[0, 128, 255]])
    np.testing.assert_array_equal(grey(tiff(one + 0.1)), [[26, 153, 255]])  # a bright spot
    np.testing.assert_array_equal(grey(tiff(200 * one, smin=0.0, smax=400.0)), [[0, 64, 128]])
    for odd in (255 * one, 4 * one - 2):
        with pytest.raises(BadImageError, match="numbers of no known range: they run from"):
            grey(tiff(odd))
    with pytest.raises(BadImageError, match="not finite"):
        grey(tiff(one * np.nan))


def test_whole_numbers_of_32_bits_need_a_range():
    values = np.array([[-1000, 0, 1000]], np.int32)
    with pytest.raises(BadImageError, match="no stated range: 32 bits, signed"):
        grey(tiff(values))
    np.testing.assert_array_equal(grey(tiff(values, smin=-1000, smax=1000)), [[0, 128, 255]])


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 2), (8,), (0, 8, 3), (1, 8, 8, 3)])
def test_arrays_of_other_shapes(shape):
    with pytest.raises(BadImageError, match="an array that is not"):
        read_picture(np.zeros(shape, np.uint8))


# What Pillow refuses for caution's sake


def test_large_texts_in_a_png_are_no_damage():
    """Programs keep whole workflows in their images."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    data = encoded(picture(1), "PNG", pnginfo=info)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(read_picture(data), picture(1))


def test_pillows_limit_gives_way_to_ours_and_comes_back(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(picture(1, 30, 30))
    assert read_picture(data).shape == (30, 30, 3)
    assert fit(data, 8, square=True).size == (8, 8)
    assert Transform((8, 8), crop="random")(data, Random(0)).shape == (8, 8, 3)
    with pytest.raises(BadImageError, match="more pixels than data.max_pixels=800 .*30x30"):
        read_picture(data, max_pixels=800)
    assert Image.MAX_IMAGE_PIXELS == 100


# Folders


def test_a_folder_counts_what_it_leaves_out(tmp_path):
    names = ("a/1.png", "a/2.heic", "a/.3.png", "b/clip.mp4", "b/notes.txt", ".old/4.png", "b/5")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(0)))
    (tmp_path / "b" / "again").symlink_to(tmp_path / "a")
    source = make_source(data_config(path=str(tmp_path)), "all")
    assert [source.key(i) for i in range(len(source))] == ["a/1.png"]
    assert dict(source.left_out.counts()) == {
        "hidden folders with images": 1,
        "folders that a link leads to once more": 1,
        "of type .heic, which is not read here": 1,
        "hidden files (their names, or their folders', begin with a dot)": 1,
        "no images by the endings of their names": 1,
        "videos (.mp4)": 1,
    }


def test_folders_beside_those_of_the_splits_are_counted(tmp_path):
    for name in ("train/1.png", "test/2.png", "extra/3.png", "4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0)))
    both = make_source(data_config(path=str(tmp_path)), "all")
    assert len(both) == 2
    assert dict(both.left_out.counts()) == {
        "images beside the folders of the splits": 1,
        "folders beside those of the splits": 1,
    }


def test_only_images_of_other_types(tmp_path):
    (tmp_path / "1.heic").touch()
    with pytest.raises(UserError, match=r"no image in .*1 of type .heic, .* allowed: .jpg"):
        make_source(data_config(path=str(tmp_path)), "all")


def test_the_account_of_what_was_read():
    class Source:
        left_out = LeftOut()

        def __len__(self):
            return 10

    Source.left_out.add("hidden files", "b/.x.png", 3)
    unreadable = {
        "1.png": "more pixels than data.max_pixels=80 (--max-pixels): 9x9",
        "2.png": "more pixels than data.max_pixels=80 (--max-pixels): 20x30",
        "caf\udce9": reason_of(OSError("image file is truncated (3 bytes not processed)")),
    }
    found = account(Source(), unreadable)
    assert (found["images"], found["used"]) == (10, 7)
    assert [entry["count"] for entry in found["left_out"].values()] == [3, 2, 1]
    assert account_lines(found) == [
        "used 7 of 10 images; left out, or of note:",
        "  hidden files: 3 (such as b/.x.png)",
        "  unreadable (more pixels than data.max_pixels=N (--max-pixels)): 2 (such as 1.png: 9x9)",
        "  unreadable (damaged or cut short): 1 (caf\\xe9: image file is truncated (3 bytes not "
        "processed))",
    ]
