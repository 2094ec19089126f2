"""Latents with embeddings on disk: packed records, their reader, batches, what is held out."""

from __future__ import annotations

import json
import pickle
from random import Random

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pair_files import planted, write_pairs
from weights import error_of

from efae_jax.data import eval_batches, make_reader, make_source, train_batches
from efae_jax.data.array_records import ArrayRecords, pack, unpack, write_records
from efae_jax.data.pairs import (
    MOST_CAPTIONS,
    PairReader,
    Pairs,
    Prediction,
    embeddings_path,
    read_summary,
)
from efae_jax.data.splits import is_held_out

COUNT, FRACTION = 23, 0.3
COUNTS = (8, 0, 8, 7)


@pytest.fixture(scope="module")
def made():
    return planted(COUNT, channels=4, dimension=3)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    prediction = Prediction(np.ones((3, 6), np.float32), np.arange(6, dtype=np.float32))
    out = tmp_path_factory.mktemp("pairs") / "planted"
    return write_pairs(out, *made[1:], prediction, FRACTION, COUNTS)


# ---- packed records

VALUES = st.one_of(
    st.integers(-(2**31), 2**63),
    st.text(),
    st.lists(st.text()),
    st.none(),
    st.booleans(),
    st.binary().filter(lambda b: not b.startswith(b"\x93NUMPY")),
    arrays(st.sampled_from(["float32", "int64", "uint8", "bool"]), array_shapes(min_dims=0)),
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), VALUES))
def test_a_record_comes_back_as_it_was_packed(record):
    found = unpack(pack(record))
    assert found.keys() == record.keys()
    for name, value in record.items():
        assert type(found[name]) is type(value)
        if isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tobytes() == value.tobytes()  # bits: NaN, -0.0
        else:
            assert found[name] == value


def test_arrays_in_any_order_of_memory_come_back():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for view in (x.T, x[:, ::-1], np.asfortranarray(x), x[:, :0]):
        found = unpack(pack({"x": view}))["x"]
        np.testing.assert_array_equal(found, view)
        found[...] = 0  # it may be written to
    with pytest.raises(ValueError, match="[Oo]bject"):
        pack({"x": np.array([{}], object)})


def test_what_is_no_array_record_of_ours_is_not_unpickled():
    header = pack({"x": np.zeros(2, np.float32)}).replace(b"'<f4'", b"'|O' ")
    with pytest.raises(ValueError, match="[Oo]bject"):
        unpack(header)


def test_records_are_readable_one_by_one_and_counted(tmp_path):
    path = tmp_path / "x.array_record"
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(5)]
    assert write_records(path, ({"image": x, "label": i} for i, x in enumerate(images))) == 5
    source = ArrayRecords([str(path)])
    for i in (3, 0, 4):
        assert source[i]["label"] == i
        np.testing.assert_array_equal(source[i]["image"], images[i])


# ---- the folder


def test_pairs_are_what_was_written(made, folder):
    pairs = Pairs(folder)
    assert len(pairs) == COUNT
    for i in (0, 7, 8, 15, 16, COUNT - 1):  # both sides of each border of shards
        record = pairs[i]
        assert record.keys() == {"latent", "captions", "image", "texts", "index", "key"}
        np.testing.assert_array_equal(record["latent"], made.latents[i])
        np.testing.assert_array_equal(record["captions"], made.captions[i])
        np.testing.assert_array_equal(record["image"], made.images[i])
        assert record["texts"] == [f"caption {n} of {i}" for n in range(1 + i % 3)]
        assert (record["index"], record["key"], pairs.key(i)) == (i, str(i), str(i))
        assert pairs.name(i) == f"{folder}: {i}"
    np.testing.assert_array_equal(pairs.prediction.matrix, np.ones((3, 6)))
    np.testing.assert_array_equal(pairs.prediction.offset, np.arange(6))
    assert pairs.summary["text"]["dimension"] == 3
    train = [i for i in range(COUNT) if not is_held_out(str(i), FRACTION)]
    text = np.mean([made.captions[i].mean(axis=0) for i in train], axis=0)
    np.testing.assert_allclose(pairs.means["caption"], text, rtol=0, atol=1e-6)
    style = made.images[train].mean(axis=0) - text.sum() - np.arange(6)
    np.testing.assert_allclose(pairs.means["style"], style, rtol=0, atol=1e-5)


def test_the_two_halves_of_a_pair_lie_where_the_folder_says(made, folder, tmp_path):
    """Some latents have no embeddings, some embeddings no latents."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with np.load(folder / "pairs.npz") as arrays:
        changed = dict(arrays)
    changed |= {
        "keys": np.array(["a", "b"]), "latents": np.array([2, 22]), "embeddings": np.array([20, 9])
    }  # fmt: skip
    np.savez(tmp_path / "pairs.npz", **changed)
    pairs = Pairs(tmp_path)
    assert len(pairs) == 2
    for i, (latent, embedding) in enumerate([(2, 20), (22, 9)]):
        np.testing.assert_array_equal(pairs[i]["latent"], made.latents[latent])
        np.testing.assert_array_equal(pairs[i]["image"], made.images[embedding])
        assert pairs[i]["key"] == pairs.key(i) == "ab"[i]


def test_pairs_go_to_another_process(made, folder):
    pairs = Pairs(folder)
    pairs[0]  # its readers are open
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pairs))[9]["image"], made.images[9])


def test_what_is_missing_is_one_line(made, folder, tmp_path):
    assert "embed` makes them" in error_of(Pairs, tmp_path)
    assert "no-such" in error_of(read_summary, tmp_path / "no-such")
    (tmp_path / "pairs.json").write_text("{")
    assert "pairs.json is not a summary of latents with embeddings" in error_of(Pairs, tmp_path)

    def without(name):
        out = tmp_path / f"without {name}"
        out.mkdir()
        for path in folder.iterdir():
            if path.name != name:
                (out / path.name).write_bytes(path.read_bytes())
        message = error_of(Pairs, out)
        assert str(out) in message
        return message

    last = embeddings_path(folder, 3, 4).name
    assert f"lacks {last}; run `embed` again" in without(last)
    assert "latents-00002-of-00004" in without("latents-00002-of-00004.array_record")
    assert "pairs.json" in without("pairs.json")
    assert "latents.json" in without("latents.json")
    assert "pairs.npz" in without("pairs.npz")


# ---- batches


def test_examples_are_padded_to_five_captions(made, folder):
    reader = PairReader((2, 2, 4), 3, 6)
    for i in range(3):
        found = reader.example(Pairs(folder)[i], Random(0))
        assert found["count"] == i + 1
        np.testing.assert_array_equal(found["captions"][: i + 1], made.captions[i])
        np.testing.assert_array_equal(found["captions"][i + 1 :], 0)
        blank = reader.blank()
        for name, value in found.items():
            assert (value.dtype, value.shape) == (blank[name].dtype, blank[name].shape), name
    assert found["captions"].shape == (MOST_CAPTIONS, 3)
    assert not any(np.any(value) for name, value in blank.items() if name != "count")
    assert blank["count"] == 1  # of which one is drawn


def test_a_record_of_another_shape_is_a_bad_one(folder):
    record = Pairs(folder)[0]
    for reader in (PairReader((2, 4, 4), 3, 6), PairReader((2, 2, 4), 4, 6),
                   PairReader((2, 2, 4), 3, 5)):  # fmt: skip
        with pytest.raises(ValueError, match="broadcast"):
            reader.example(record, Random(0))


def config_of(folder):
    return ml_collections.ConfigDict(
        {"source": "pairs", "path": str(folder), "latent": (2, 2, 4), "text": 3, "image": 6}
    )


def test_splits_are_those_that_the_folder_was_made_with(made, folder):
    config = config_of(folder)
    held = [is_held_out(str(i), FRACTION) for i in range(COUNT)]
    assert 0 < sum(held) < COUNT
    found = {}
    for split, wanted in (("test", True), ("train", False)):
        source = make_source(config, split)
        found[split] = [source.key(i) for i in range(len(source))]
        assert found[split] == [str(i) for i in range(COUNT) if held[i] == wanted]
    reader = make_reader(config, train=True)
    keys = []
    for batch in eval_batches(make_source(config, "test"), reader, batch_size=4, num_threads=1):
        for row in np.flatnonzero(batch["mask"]):
            key = int(found["test"][batch["index"][row]])
            np.testing.assert_array_equal(batch["latent"][row], made.latents[key])
            np.testing.assert_array_equal(batch["image"][row], made.images[key])
            assert batch["count"][row] == len(made.captions[key])
            keys.append(str(key))
        assert batch["captions"].shape == (4, MOST_CAPTIONS, 3)
    assert keys == found["test"]
    batches = train_batches(make_source(config, "train"), reader, batch_size=5, seed=1)
    first = next(batches)
    batches.close()
    for row, index in enumerate(first["index"]):
        key = int(found["train"][index])
        np.testing.assert_array_equal(first["latent"][row], made.latents[key])
        np.testing.assert_array_equal(first["captions"][row, 0], made.captions[key][0])


# ---- what is held out


@settings(max_examples=100, deadline=None)
@given(st.text(), st.floats(0, 0.999), st.floats(0, 0.999))
def test_more_held_out_means_the_same_and_others(key, a, b):
    low, high = sorted([a, b])
    assert is_held_out(key, high) or not is_held_out(key, low)
    assert not is_held_out(key, 0.0)


def test_a_share_of_any_keys_is_held_out():
    for prefix in ("", "a/folder of images/000000"):
        keys = [f"{prefix}{i}.jpg" for i in range(20_000)]
        for fraction in (0.02, 0.1, 0.5):
            share = np.mean([is_held_out(key, fraction) for key in keys])
            deviation = np.sqrt(fraction * (1 - fraction) / len(keys))
            assert abs(share - fraction) < 4 * deviation


def test_what_is_held_out_stays_so():
    """Another hash would let a model be tested on what it was trained on."""
    held = [i for i in range(60) if is_held_out(f"{i:012}.jpg", 0.1)]
    assert held == [14, 18, 30, 45, 51, 54, 58]
    assert is_held_out("\udcff.png", 0.999)  # a file name that is no UTF-8


def test_the_summary_is_json(folder):
    assert read_summary(folder) == json.loads((folder / "pairs.json").read_text())
