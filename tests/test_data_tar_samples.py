"""What a sample of a tar shard is: no image is lost or swapped, and what is left out is counted."""

import io
import json
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
from data_files import data_config, encoded, picture, write_tar
from PIL import Image

from efae_jax.data import make_source
from efae_jax.data.left_out import LeftOut
from efae_jax.data.tar_members import Member
from efae_jax.data.tar_samples import BARE, FURTHER, samples
from efae_jax.data.transforms import read_picture
from efae_jax.errors import UserError


def group(*names, companions=(".cls", ".json")):
    """({key: (image, companion)}, what was left out) of files of these names."""
    left_out = LeftOut()
    found = samples([Member(name, 0, 1) for name in names], companions, left_out)
    shown = {s.key: (s.image.name, s.companion and s.companion[1].name) for s in found}
    assert len(shown) == len(found)
    return shown, dict(left_out.counts())


def source(path, split="all", **changes):
    return make_source(data_config(source="webdataset", path=str(path), **changes), split)


def size_of(record):
    return Image.open(io.BytesIO(record["image"])).size


def test_dots_in_names_are_no_endings(tmp_path):
    names = [f"shot at 10.00.{i:02}.png" for i in range(20)]
    write_tar(tmp_path / "0.tar", [(n, encoded(picture(i))) for i, n in enumerate(names)])
    found = source(tmp_path / "0.tar")
    assert len(found) == 20
    assert [found.key(i) for i in range(20)] == [f"0.tar/{n[:-4]}" for n in names]
    pixels = [np.asarray(Image.open(io.BytesIO(found[i]["image"]))) for i in range(20)]
    for i, x in enumerate(pixels):
        np.testing.assert_array_equal(x, picture(i))
    assert not found.left_out


def test_each_name_with_dots_has_its_own_companion():
    found, _ = group("s 1.0.png", "s 1.0.json", "s 1.1.png", "s 1.1.json")
    assert found == {"s 1.0": ("s 1.0.png", "s 1.0.json"), "s 1.1": ("s 1.1.png", "s 1.1.json")}


def test_images_of_one_sample_without_a_plain_one_share_what_is_said_of_it():
    found, left = group("7.left.png", "7.right.png", "7.cls")
    assert found == {"7.left": ("7.left.png", "7.cls"), "7.right": ("7.right.png", "7.cls")}
    assert not left


@pytest.mark.parametrize("names", [("7.jpg", "7.seg.png"), ("7.seg.png", "7.JPG")])
def test_the_plain_image_is_the_samples_and_others_are_counted(names):
    found, left = group(*names, "7.cls")
    assert found == {"7": (next(n for n in names if "seg" not in n), "7.cls")}
    assert left == {FURTHER: 1}


def test_two_plain_images_of_a_sample():
    found, left = group("a/7.jpg", "a/7.png", "b/7.png")
    assert found == {"a/7": ("a/7.jpg", None), "b/7": ("b/7.png", None)}
    assert left == {FURTHER: 1}


def test_members_apart_from_each_other():
    found, _ = group("1.png", "2.png", "3.png", "3.cls", "1.cls", "2.json", "2.cls")
    assert found == {
        "1": ("1.png", "1.cls"),
        "2": ("2.png", "2.cls"),  # by the order of the endings, not of the shard
        "3": ("3.png", "3.cls"),
    }


def test_a_name_that_comes_again_is_another_sample():
    found, _ = group("1.png", "1.cls", "1.png", "1.cls", "1.png")
    assert found == {
        "1": ("1.png", "1.cls"),
        "1#2": ("1.png", "1.cls"),
        "1#3": ("1.png", None),
    }


def test_what_has_no_image_is_counted_by_kind():
    _, left = group("1.txt", "2.heic", "2.json", "3.png", "._3.png", "4.mp4", "5.dng")
    assert left == {
        BARE: 1,
        "of type .heic, which is not read here": 1,
        "hidden files (their names begin with a dot)": 1,
        "videos (.mp4)": 1,
        "of type .dng, which is not read here": 1,
    }


def test_numbers_behind_a_dot_are_no_parts_of_a_sample():
    found, left = group("0.png", "0.5.png", "0.5.cls", "1.png", "1.5.png", "1.seg.png", "1.cls")
    assert found == {
        "0": ("0.png", None),
        "0.5": ("0.5.png", "0.5.cls"),
        "1": ("1.png", "1.cls"),
        "1.5": ("1.5.png", "1.cls"),
    }
    assert left == {FURTHER: 1}


def test_keys_differ():
    found, _ = group("a#b.png", "a#b.png", "a#b.png", "c.d.jpg", "c.d.png", "a#b#2.png")
    assert len(found) == 6
    many = [Member(f"{i % 3000}.png", 0, 1) for i in range(30_000)]
    assert len({s.key for s in samples(many, (), LeftOut())}) == 30_000  # and in no time


def test_sparse_members_are_counted(tmp_path):
    (tmp_path / "hole.png").write_bytes(encoded(picture(0)))
    with (tmp_path / "hole.png").open("r+b") as file:
        file.truncate(10_000_000)
    write_tar(tmp_path / "0.tar", [("1.png", encoded(picture(1)))])
    out = tmp_path / "1.tar"
    command = ["tar", "--sparse", "-H", "pax", "-C", tmp_path, "-cf", out, "hole.png"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no GNU tar")
    found = source(tmp_path / "*.tar")
    assert len(found) == 1
    assert found.left_out.count("sparse members, which are no plain files") == 1


def test_links_are_what_they_lead_to(tmp_path):
    data = encoded(picture(1, 9, 7))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a/1.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        for name, kind, target in (
            ("b/2.png", tarfile.LNKTYPE, "a/1.png"),
            ("b/3.png", tarfile.SYMTYPE, "../a/1.png"),
            ("b/4.png", tarfile.SYMTYPE, "nowhere.png"),
            ("x" * 120 + ".png", tarfile.LNKTYPE, "a/1.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 0
            tar.addfile(info)
        info = tarfile.TarInfo("c/5.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    found = source(tmp_path / "0.tar")
    assert [size_of(found[i]) for i in range(len(found))] == 5 * [(9, 7)]
    assert found.left_out.count("links to what the shard does not hold before them") == 1


def test_archives_one_behind_the_other(tmp_path):
    """`cat a.tar b.tar`: a reader that stops at the first end mark loses the second."""
    for name, number in (("a", 0), ("b", 1)):
        write_tar(tmp_path / f"{name}.tar", [(f"{number}.png", encoded(picture(number)))])
    both = b"".join((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    (tmp_path / "both.tar").write_bytes(both)
    assert len(source(tmp_path / "both.tar")) == 2


@pytest.mark.parametrize("pattern", ["s-{00000..00004}.tar", "s-*-of-00005.tar"])
def test_missing_shards_are_counted(tmp_path, pattern):
    name = "s-{:05}.tar" if ".." in pattern else "s-{:05}-of-00005.tar"
    for i in (0, 1, 3):
        write_tar(tmp_path / name.format(i), [(f"{i}.png", encoded(picture(i)))])
    found = source(tmp_path / pattern)
    assert len(found) == 3
    entry = found.left_out.as_json()["files that are named and not there"]
    assert entry == {"count": 2, "example": str(tmp_path / name.format(2))}


# Labels


WORDS = ["n01440764", "n01443537", "n01440764", ""]


def labelled(path, labels, ending="cls"):
    files = []
    for i, label in enumerate(labels):
        files.append((f"{i}.png", encoded(picture(i))))
        if label != "":
            text = json.dumps({"label": label}) if ending == "json" else str(label)
            files.append((f"{i}.{ending}", text.encode()))
    write_tar(path, files)


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_texts_are_numbered_by_a_table_in_their_order(tmp_path, ending):
    labelled(tmp_path / "0.tar", WORDS, ending)
    found = source(tmp_path / "0.tar")
    assert found.class_names == ("n01440764", "n01443537")
    assert found.num_classes == 2
    assert [found[i]["label"] for i in range(4)] == [0, 1, 0, 0]
    assert "label_text" not in found[0]


def test_a_table_beside_the_shards_comes_first(tmp_path):
    labelled(tmp_path / "0.tar", ["dog", "cat", "whale"])
    (tmp_path / "classes.txt").write_text("whale\ncat\n")
    found = source(tmp_path / "0.tar")
    assert [found[i]["label"] for i in range(3)] == [0, 1, 0]
    assert [found[i].get("label_text") for i in range(3)] == ["dog", None, None]


def test_both_splits_have_one_table(tmp_path):
    labelled(tmp_path / "train.tar", ["b", "c"])
    labelled(tmp_path / "test.tar", ["c", "a"])
    train, test = (source(tmp_path / "{split}.tar", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert [train[i]["label"] for i in range(2)] == [1, 2]
    assert [test[i]["label"] for i in range(2)] == [2, 0]


def test_numbers_and_texts_together_are_no_classes(tmp_path):
    labelled(tmp_path / "0.tar", [3, "dog"])
    found = source(tmp_path / "0.tar")
    assert [found[i]["label"] for i in range(2)] == [3, 0]
    assert found[1]["label_text"] == "dog"
    assert "labels that are texts, among 1 numbers" in found.left_out.counts()[0][0]


@pytest.mark.parametrize("label", [None, [1, 2], {"id": 3}, 1.5, True, "7", [4], 2**40, "ä"])
def test_no_label_makes_an_image_unreadable(tmp_path, label):
    labelled(tmp_path / "0.tar", [label], "json")
    record = source(tmp_path / "0.tar")[0]
    assert size_of(record) == (12, 10)
    assert record["label"] == {"True": 1, "7": 7, "[4]": 4}.get(str(label), 0)


def test_few_texts_among_empty_labels_are_found(tmp_path):
    labelled(tmp_path / "0.tar", ["cat" if i in (1, 4) else " " for i in range(12)])
    found = source(tmp_path / "0.tar")
    assert found.class_names == ("cat",)


def test_names_that_the_table_lacks_are_counted(tmp_path):
    labelled(tmp_path / "0.tar", ["cat", "dog", "cow", "cow"])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    found = source(tmp_path / "0.tar")
    entry = found.left_out.as_json()["labels that the table of class names lacks (numbered 0)"]
    assert entry == {"count": 2, "example": "'cow' of 0.tar/2"}


def test_numbers_in_one_split_and_texts_in_the_other_do_not_mix(tmp_path):
    labelled(tmp_path / "train.tar", [0, 1, 2])
    labelled(tmp_path / "test.tar", ["n0", "n1"])
    train, test = (source(tmp_path / "{split}.tar", split) for split in ("train", "test"))
    assert not train.class_names
    assert not test.class_names
    assert [test[i] | {"image": b""} for i in range(2)] == [
        {"image": b"", "label": 0, "label_text": "n0"},
        {"image": b"", "label": 0, "label_text": "n1"},
    ]
    assert "where the other split's are not" in test.left_out.counts()[0][0]


def test_a_companion_that_is_no_json_says_nothing(tmp_path):
    for i, content in enumerate((b"{", b"\xff\xfe", b"[1]", b"null", b"")):
        write_tar(tmp_path / f"{i}.tar", [("0.png", encoded(picture(i))), ("0.json", content)])
    found = source(tmp_path / "*.tar")
    assert [found[i]["label"] for i in range(5)] == 5 * [0]


def test_a_table_that_names_a_class_twice_is_refused(tmp_path):
    labelled(tmp_path / "0.tar", ["dog"])
    (tmp_path / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(UserError, match=r"classes\.txt must name the classes, each once"):
        source(tmp_path / "0.tar")


def test_types_that_only_a_name_tells(tmp_path):
    files = [("0.png", encoded(picture(0))), ("1.tga", encoded(picture(1), "TGA"))]
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", files)
    found = pickle.loads(pickle.dumps(source(tmp_path / "*.tar")))
    for i in range(4):
        np.testing.assert_array_equal(read_picture(found[i]["image"]), picture(i % 2))
