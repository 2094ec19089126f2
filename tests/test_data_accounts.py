"""Which images a command takes of a source, what it says of the rest, and names of any bytes."""

import json
import os

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_files import data_config, encoded, picture, write_tar
from saved_models import conv_config, save
from tensorflow_datasets.proto import tf_example_pb2

from efae_jax.__main__ import main
from efae_jax.data import make_source, write_array_record
from efae_jax.data.array_records import pack, read_image, unpack, write_records
from efae_jax.data.bad_image import BadImageError
from efae_jax.data.chosen import choose_images, named
from efae_jax.data.latents import Latents
from efae_jax.errors import UserError


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "kl", conv_config())


@pytest.fixture
def tar(tmp_path):
    """Twenty images in a shard, with labels that are texts."""
    files = []
    for i in range(20):
        files += [(f"{i:02}.png", encoded(picture(i, 16, 16))), (f"{i:02}.cls", b"n%08d" % (i % 3))]
    write_tar(tmp_path / "a.tar", files)
    return tmp_path / "a.tar"


def counts(source):
    return dict(source.left_out.counts())


# Which images


def test_data_without_splits_are_taken_whole(tar):
    config = data_config(test_fraction=0.25)
    whole = choose_images(config, f"webdataset:{tar}", default_split="test")
    assert (len(whole.source), whole.described["split"]) == (20, "all")
    assert not counts(whole.source)
    parts = {
        split: choose_images(config, f"webdataset:{tar}", split=split, test_fraction=0.4)
        for split in ("train", "test")
    }
    train, test = (parts[split].source for split in ("train", "test"))
    assert len(train) + len(test) == 20
    assert 0 < len(test) < len(train)
    assert counts(train) == {"held out for testing (data.test_fraction=0.4)": len(test)}
    assert counts(test) == {"for training, not held out (data.test_fraction=0.4)": len(train)}
    example = next(iter(train.left_out.as_json().values()))["example"]
    assert example in {test.key(i) for i in range(len(test))}


def test_data_with_splits_give_the_default_one_or_all(tmp_path):
    for name in ("train/1.png", "train/2.png", "val/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0)))
    data = f"folder:{tmp_path}"
    sizes = {
        split: len(choose_images(data_config(), data, split=split, default_split="test").source)
        for split in (None, "train", "all")
    }
    assert sizes == {None: 1, "train": 2, "all": 3}
    glyphs = choose_images(data_config(size=(16, 16)), "glyphs", split="all").source
    assert len({glyphs.key(i) for i in range(len(glyphs))}) == 14
    assert (
        glyphs[13]["label"]
        == make_source(data_config(source="glyphs", size=(16, 16)), "test")[3]["label"]
    )


def test_the_models_own_images_are_the_held_out_ones(tar):
    config = data_config(source="webdataset", path=str(tar), test_fraction=0.4)
    chosen = choose_images(config, default_split="test")
    assert chosen.described["split"] == "test"
    assert 0 < len(chosen.source) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "no split 'val'; allowed: train, test, all"),
        ({"split": "all", "test_fraction": 0.1}, "nothing is held out of split 'all'"),
        ({"test_fraction": 0.1}, "nothing is held out of split 'all'"),
        ({"split": "test", "test_fraction": 1.0}, r"\(--test-fraction\): 1.0; allowed"),
        (
            {"split": "test", "test_fraction": 0.0},
            r"choose another fraction \(--config.*--test-fraction",
        ),
    ],
)
def test_splits_that_cannot_be(tar, options, message):
    with pytest.raises(UserError, match=message):
        choose_images(data_config(), f"webdataset:{tar}", **options)


def test_home_folders_in_what_is_named(tar, monkeypatch):
    monkeypatch.setenv("HOME", str(tar.parent))
    assert named("webdataset:~/a.tar") == ("webdataset", str(tar))
    assert len(choose_images(data_config(), "webdataset:~/a.tar").source) == 20
    config = data_config(source="webdataset", path="~/a.tar")
    assert len(make_source(config, "all")) == 20
    (tar.parent / "x.png").write_bytes(encoded(picture(0)))
    assert len(choose_images(data_config(), "~").source) == 1
    assert len(make_source(data_config(path="~"), "all")) == 1
    with pytest.raises(UserError, match="there is no user 'nobody-here'"):
        choose_images(data_config(), "~nobody-here/x")


# What commands say


def test_encode_says_and_keeps_what_it_read(kl, tar, tmp_path, capsys):
    files = {"torn.png": encoded(picture(1))[:60], "wide.png": encoded(picture(2, 40, 40))}
    with_more = tmp_path / "b.tar"
    write_tar(with_more, [*files.items(), ("x.heic", b""), ("1.png", encoded(picture(3, 16, 16)))])
    command = ["encode", "--model", str(kl), "--data", f"webdataset:{tmp_path}/*.tar"]
    out = tmp_path / "latents"
    assert main([*command, "--out", str(out), "--max-pixels", "1000"]) == 0
    printed = capsys.readouterr().out
    found = Latents(out)
    assert len(found) == 21
    assert found.class_names == ("n00000000", "n00000001", "n00000002")
    assert [found[i]["label"] for i in range(21)] == [i % 3 for i in range(20)] + [0]
    read = found.summary["read"]
    assert (read["images"], read["used"]) == (23, 21)
    assert {kind: entry["count"] for kind, entry in read["left_out"].items()} == {
        "of type .heic, which is not read here": 1,
        "unreadable (damaged or cut short)": 1,
        "unreadable (more pixels than data.max_pixels=N (--max-pixels))": 1,
    }
    assert "used 21 of 23 images; left out, or of note:" in printed
    assert "of type .heic, which is not read here: 1 (b.tar/x.heic)" in printed


@pytest.mark.parametrize("form", ["array_record", "npz"])
def test_texts_without_a_table_are_kept(kl, tmp_path, form):
    file = tmp_path / "a.array_record"
    records = [{"image": encoded(picture(i, 16, 16)), "label": label}
               for i, label in enumerate(("dog", 3, None, [1, 2]))]  # fmt: skip
    write_records(file, records)
    out = tmp_path / "latents"
    command = ["encode", "--model", str(kl), "--data", f"array_record:{file}", "--out", str(out)]
    assert main([*command, "--format", form]) == 0
    found = Latents(out)
    assert [found[i]["label"] for i in range(4)] == [0, 3, 0, 0]
    assert [found[i].get("label_text") for i in range(4)] == ["dog", None, None, "[1, 2]"]
    (text,) = found.summary["read"]["left_out"].values()
    assert text["count"] == 2


def test_a_cache_keeps_the_table_and_what_was_left_out(tar, tmp_path, capsys):
    out = tmp_path / "cache"
    command = ["cache", "--data", f"webdataset:{tar}", "--out", str(out), "--size", "8"]
    assert main([*command, "--test-fraction", "0.3"]) == 0
    assert "held out for testing" in capsys.readouterr().out
    config = data_config(source="array_record", path=str(out / "{split}-*.array_record"))
    both = make_source(config, "all")
    assert both.class_names == ("n00000000", "n00000001", "n00000002")
    assert len(both) == 20
    wanted = {i: i % 3 for i in range(20)}
    stored = [unpack(reader[i]) for reader in _readers(both) for i in range(len(reader))]
    assert {int(r["key"].split("/")[1]): r["label"] for r in stored} == wanted
    train = json.loads((out / "train.read.json").read_text())
    test = json.loads((out / "test.read.json").read_text())
    assert train["used"] + test["used"] == 20
    assert (
        train["left_out"]["held out for testing (data.test_fraction=0.3)"]["count"] == test["used"]
    )


def _readers(joined):
    return [reader for source in joined.sources for reader in source._readers]


def test_texts_go_through_a_cache(tmp_path, capsys):
    files = []
    for i, label in enumerate(("3", "n01", '"half \\ud800"')):
        kind = "json" if "half" in label else "cls"
        content = f'{{"label": {label}}}' if kind == "json" else label
        files += [(f"{i}.png", encoded(picture(i))), (f"{i}.{kind}", content.encode())]
    write_tar(tmp_path / "a.tar", files)
    out = tmp_path / "c"
    command = ["cache", "--data", f"webdataset:{tmp_path}/a.tar", "--out", str(out), "--size", "8"]
    assert main([*command, "--split", "all"]) == 0
    assert "kept as label_text, numbered 0): 2 (such as a.tar/1)" in capsys.readouterr().out
    config = data_config(source="array_record", path=str(out / "all-*.array_record"))
    found = [dict(make_source(config, "all")[i]) for i in range(3)]
    assert [r["label"] for r in found] == [3, 0, 0]
    assert [r.get("label_text") for r in found] == [None, "n01", "half \\ud800"]


def test_a_cache_of_few_images_has_no_test_split(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(picture(i)))
    command = ["cache", "--data", str(tmp_path / "images"), "--size", "8", "--test-fraction", "0"]
    assert main([*command, "--out", str(tmp_path / "c")]) == 0
    assert "test: nothing to write: data: none of the 3 images" in capsys.readouterr().out
    assert sorted(p.suffix for p in (tmp_path / "c").glob("t*")) == [
        ".array_record",
        ".json",
        ".json",
    ]
    assert main([*command, "--out", str(tmp_path / "d"), "--split", "test"]) == 2
    assert main([*command[:-2], "--out", str(tmp_path / "e"), "--split", "all"]) == 0
    assert (
        len(
            make_source(
                data_config(source="array_record", path=str(tmp_path / "e" / "all-*.array_record")),
                "all",
            )
        )
        == 3
    )


# Names of any bytes


def test_a_name_that_is_no_utf8_ends_nothing(kl, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"caf\xe9.png", "naïve.png".encode(), b"torn\xff.png"):
        content = b"" if b"torn" in name else encoded(picture(1, 16, 16))
        (folder / os.fsdecode(name)).write_bytes(content)
    for i, form in enumerate(("array_record", "npz")):
        out = tmp_path / f"latents{i}"
        command = ["encode", "--model", str(kl), "--data", str(folder), "--out", str(out)]
        assert main([*command, "--format", form]) == 0
        found = Latents(out)
        assert [os.fsencode(found[j]["key"]) for j in range(2)] == [
            b"caf\xe9.png", "naïve.png".encode(),
        ]  # fmt: skip
        assert main([*command, "--format", form]) == 0  # goes on, as it was
    cache = ["cache", "--data", str(folder), "--out", str(tmp_path / "c"), "--size", "8"]
    assert main([*cache, "--split", "all"]) == 0
    out = tmp_path / "pictures"
    assert main(["reconstruct", "--model", str(kl), str(folder), "--out", str(out)]) == 0
    assert (out / os.fsdecode(b"caf\xe9.png")).exists()
    assert "caf\\xe9" in capsys.readouterr().out


# Records of other programs


def test_records_are_read_in_any_form(tmp_path):
    image = encoded(picture(5))
    example = tf_example_pb2.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(image)
    example.features.feature["image/class/label"].int64_list.value.append(7)
    records = [image, encoded(picture(5), "JPEG"), example.SerializeToString(),
               pack({"jpg": image, "cls": b"3"}),
               pack({"image": np.asarray(picture(5))})]  # fmt: skip
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    source = make_source(
        data_config(source="array_record", path=str(tmp_path / "a.array_record")), "all"
    )
    assert [source[i]["label"] for i in range(5)] == [0, 0, 7, 3, 0]
    for i in (0, 2, 3):
        assert source[i]["image"] == image
    np.testing.assert_array_equal(source[4]["image"], picture(5))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (msgpack.packb({"x": 1}), "a record without an image: a msgpack map with x; looked for"),
        (msgpack.packb({"image": None}), "a record without an image"),
        (b"\x82\xa1x", "a record that is no msgpack map"),
    ],
)
def test_records_without_an_image_say_what_they_have(data, message):
    with pytest.raises(BadImageError, match=message):
        read_image(data)


def test_classes_beside_records(tmp_path):
    write_array_record(
        str(tmp_path / "a.array_record"), [{"image": encoded(picture(0)), "label": 1}]
    )
    (tmp_path / "classes.txt").write_text("airplane\nautomobile\n")
    source = make_source(
        data_config(source="array_record", path=str(tmp_path / "a.array_record")), "all"
    )
    assert source.class_names[source[0]["label"]] == "automobile"
    assert source.num_classes == 2
