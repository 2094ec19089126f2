"""Embeddings in the user's own files: what is found there, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from captioned_examples import assert_unit, saying
from pyarrow import parquet
from weights import error_of

from efae_jax.embedders.supplied import supplied_embedders

KEYS = ["a.jpg", "b/c.jpg", "d.png"]


def arrays(seed=0, **changes):
    r = np.random.default_rng(seed)
    plain = {
        "keys": np.array(KEYS),
        "text": r.standard_normal((3, 4)).astype(np.float32),
        "image": 9 * r.standard_normal((3, 5)),
    }
    return {name: a for name, a in (plain | changes).items() if a is not None}


def several(seed=0):
    """Three text embeddings a key, of which 1, 3 and 2 are there."""
    text = np.random.default_rng(seed).standard_normal((3, 3, 4)).astype(np.float16)
    text[0, 1:], text[2, 2:] = np.nan, 0
    return arrays(text=text, counts=np.array([1, 3, 2], np.uint8))


def save(path, **content):
    if path.suffix == ".npz":
        np.savez(path, **content)
        return path
    counts = content.get("counts")
    text = content["text"].astype(np.float32).tolist()
    if counts is not None:
        text = [rows[:n] for rows, n in zip(text, counts, strict=True)]
    columns = {"key": content["keys"].tolist(), "text": text, "image": content["image"].tolist()}
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def normalised(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embeddings_of_a_file_are_found_by_key(tmp_path, suffix):
    given = arrays()
    text, image = supplied_embedders(save(tmp_path / f"mine{suffix}", **given))
    assert (text.dimension, image.dimension, image.needs_image) == (4, 5, False)
    assert text.name == image.name
    assert text.name.startswith(f"mine{suffix} sha256:")
    assert text.space != image.space
    examples = [saying("x", "y", key=KEYS[i]) for i in (2, 0, 2)]
    rows = text(examples)
    assert [r.shape for r in rows] == [(1, 4)] * 3  # the file's, not the captions'
    np.testing.assert_allclose(np.concatenate(rows), normalised(given["text"][[2, 0, 2]]), 1e-6)
    found = image(examples)
    assert_unit(found, 5)
    np.testing.assert_allclose(found, normalised(given["image"][[2, 0, 2]]), 1e-6)
    message = error_of(text, [saying("x", key="e.jpg")])
    assert "has no embeddings of 'e.jpg', but of 3 other keys such as 'a.jpg'" in message
    assert "'e.jpg'" in error_of(image, [saying("x", key="e.jpg")])


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_may_have_several_text_embeddings_of_a_key(tmp_path, suffix):
    given = several()
    text, _ = supplied_embedders(save(tmp_path / f"mine{suffix}", **given))
    rows = text([saying("x", key=key) for key in KEYS[::-1]])
    for i, count in ((0, 1), (1, 3), (2, 2)):
        assert_unit(rows[2 - i], 4)
        np.testing.assert_allclose(rows[2 - i], normalised(given["text"][i, :count]), atol=1e-6)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_the_first_five_text_embeddings_count(tmp_path, suffix):
    many = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)
    text, _ = supplied_embedders(save(tmp_path / f"mine{suffix}", **arrays(text=many)))
    (rows,) = text([saying("x", key=KEYS[1])])
    np.testing.assert_allclose(rows, normalised(many[1, :5]), atol=1e-6)


def test_one_space_is_what_the_user_says(tmp_path):
    path = save(tmp_path / "mine.npz", **arrays(image=arrays()["text"] + 1))
    text, image = supplied_embedders(path)
    assert text.space != image.space
    text, image = supplied_embedders(path, same_space=True)
    assert text.space == image.space
    other = save(tmp_path / "other.npz", **arrays())
    message = error_of(supplied_embedders, other, same_space=True)
    assert "4 numbers and image embeddings of 5 do not live in one space" in message


def changed(name, row, value):
    content = {name: arrays()[name].copy()}
    content[name][row] = value
    return content


WRONG = {
    "no keys": ({"keys": None}, "wanted are keys [N], text [N, D] or [N, K, D]"),
    "numbers as keys": ({"keys": np.arange(3)}, "holds keys int64 [3]"),
    "too few texts": ({"text": np.ones((2, 4))}, "text float64 [2, 4]"),
    "too few images": ({"image": np.ones((2, 4))}, "image float64 [2, 4]"),
    "flat text": ({"text": np.ones(3)}, "text float64 [3]"),
    "several images": ({"image": np.ones((3, 2, 4))}, "image float64 [3, 2, 4]"),
    "whole numbers": ({"text": np.ones((3, 4), int)}, "text int64 [3, 4]"),
    "no dimension": ({"image": np.ones((3, 0))}, "image float64 [3, 0]"),
    "nothing": ({"keys": np.array([], str), "text": np.ones((0, 4))}, "text float64 [0, 4]"),
    "a key twice": (changed("keys", 2, "a.jpg"), "has the key 'a.jpg' twice"),
    "not a number": (changed("text", (1, 2), np.nan), "text embedding of 'b/c.jpg' is zero or"),
    "infinite": (changed("image", (2, 0), np.inf), "image embedding of 'd.png' is zero or not"),
    "zero": (changed("image", 0, 0), "image embedding of 'a.jpg' is zero or not finite"),
    "padding without counts": ({"text": several()["text"]}, "text embedding of 'a.jpg' is zero"),
    "counts of text": ({"counts": np.array(["1"] * 3)}, "counts <U1 [3]"),
    "other counts": ({"counts": np.array([1, 1])}, "counts int64 [2]"),
    "no caption": ({"counts": np.array([1, 0, 1])}, "counts must be 1 to the 1 text"),
    "too many": ({"counts": np.array([1, 2, 1])}, "counts must be 1 to the 1 text"),
    "objects": ({"keys": np.array(["a", None, "b"], object)}, "is no npz of plain arrays"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_an_npz_is_said(tmp_path, name):
    changes, expected = WRONG[name]
    path = save(tmp_path / "mine.npz", **arrays(**changes))
    message = error_of(supplied_embedders, path)
    assert expected in message
    assert str(path) in message


LIST = pa.list_(pa.float32())
ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
WRONG_COLUMNS = {
    "no text": ({"text": None}, "holds columns key, image; wanted are columns key"),
    "numbers as keys": ({"key": [1, 2, 3]}, "keys int64"),
    "a null key": ({"key": ["a", None, "b"]}, "keys string"),
    "plain numbers": ({"image": [1.0, 2.0, 3.0]}, "a column of double"),
    "words": ({"text": [["a"], ["b"], ["c"]]}, "a column of list<element: string>"),
    "several images": ({"image": [[[1.0]], [[1.0]], [[1.0], [2.0]]]}, "image list<"),
    "a null row": ({"image": [[1.0], None, [2.0]]}, "with 1 nulls"),
    "a null number": ({"image": [[1.0], [None], [2.0]]}, "with nulls or different lengths"),
    "a null caption": ({"text": [[[1.0]], [None], [[2.0]]]}, "with nulls or different lengths"),
    "lengths": ({"text": [[1.0], [1.0, 2.0], [2.0]]}, "with nulls or different lengths"),
    "nested lengths": ({"text": [[[1.0]], [[1.0, 2.0]], [[2.0]]]}, "nulls or different lengths"),
    "no caption": ({"text": [[[1.0]], [], [[2.0]]]}, "has no text embedding of 'b/c.jpg'"),
    "not a number": ({"text": [[1.0], [float("nan")], [2.0]]}, "of 'b/c.jpg' is zero or not"),
    "no numbers": ({"image": pa.array([[], [], []], LIST)}, "image embedding of 'a.jpg' is zero"),
    "a key twice": ({"key": ["a", "b", "a"]}, "has the key 'a' twice"),
    "no rows": (
        {"key": pa.array([], pa.string()), "text": pa.array([], LIST), "image": pa.array([], LIST)},
        "holds no embeddings",
    ),
}


@pytest.mark.parametrize("name", WRONG_COLUMNS)
def test_what_is_wrong_with_a_parquet_is_said(tmp_path, name):
    changes, expected = WRONG_COLUMNS[name]
    columns = {"key": KEYS, "text": ROWS, "image": ROWS} | changes
    path = tmp_path / "mine.parquet"
    parquet.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), path)
    message = error_of(supplied_embedders, path)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_files_that_cannot_be_read(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    assert "No such file" in error_of(supplied_embedders, path)
    whole = save(path, **arrays()).read_bytes()
    for damaged in (b"", b"no embeddings", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert str(path) in error_of(supplied_embedders, path)
    message = error_of(supplied_embedders, tmp_path / "mine.csv")
    assert "allowed are files .npz and .parquet" in message


@pytest.mark.parametrize("kind", [pa.list_(pa.float64(), 2), pa.large_list(pa.float16())])
def test_other_lists_of_parquet_are_read(tmp_path, kind):
    path = tmp_path / "mine.parquet"
    column = pa.array(ROWS, pa.list_(pa.float64(), 2)).cast(kind)
    parquet.write_table(pa.table({"key": KEYS, "text": column, "image": column}), path)
    _, image = supplied_embedders(path)
    np.testing.assert_allclose(image([saying("x", key=KEYS[1])]), [[0.6, 0.8]], rtol=1e-6)
