"""Folders, ArrayRecord files and tensorflow-datasets as sources; names, splits and mistakes."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
from data_files import Numbers, data_config, encoded, picture
from PIL import Image
from rich.console import Console

from efae_jax import logs
from efae_jax.data import make_source, write_array_record
from efae_jax.data.folder import image_files
from efae_jax.data.splits import absent, expand, hold_out
from efae_jax.errors import UserError


def write_images(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:].lower())
        path.write_bytes(encoded(picture(number), form or path.suffix[1:]))


def folder(root, split="train", **changes):
    return make_source(data_config(path=str(root), **changes), split)


def pixels(record):
    image = record["image"]
    return np.asarray(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)


# Folders


def test_folder_finds_images_at_any_depth(tmp_path):
    names = ["b/2.jpg", "b/deep/er/1.PNG", "a/1.webp", "a/x.bmp", "c/y.gif", "c/z.tif", "root.jpeg"]
    write_images(tmp_path, *names)
    write_images(tmp_path, "a/.hidden.png", ".cache/1.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = folder(tmp_path)
    assert [source.key(i) for i in range(len(source))] == sorted(names)
    assert source.name(0) == str(tmp_path / "a/1.webp")
    assert source.num_classes == 4  # the root itself, a, b, c
    assert [source[i]["label"] for i in range(7)] == [1, 1, 2, 2, 3, 3, 0]
    expected = picture(names.index("b/deep/er/1.PNG"))
    np.testing.assert_array_equal(pixels(source[sorted(names).index("b/deep/er/1.PNG")]), expected)


@pytest.mark.parametrize("name", ["images", "[/a]", os.fsdecode(b"b\xff")])
def test_looking_for_images_shows_itself(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "a.png").write_bytes(encoded(picture(0)))
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(logs, "console", console)
    assert image_files(str(tmp_path / name)) == ["a.png"]
    shown = str(tmp_path / name).encode("utf-8", "replace").decode()
    assert f"looking for images in {shown}" in console.file.getvalue()


def test_folder_follows_links_but_not_in_circles(tmp_path):
    write_images(tmp_path / "elsewhere", "1.png")
    write_images(tmp_path / "data", "a/2.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    source = folder(tmp_path / "data")
    assert [source.key(i) for i in range(len(source))] == ["a/2.png", "linked/1.png"]


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_train_and_test_folders(tmp_path, test_name):
    write_images(tmp_path, "train/b/1.png", "train/c/2.png", f"{test_name}/a/3.png")
    train, test = folder(tmp_path), folder(tmp_path, "test")
    assert [train.key(i) for i in range(len(train))] == ["b/1.png", "c/2.png"]
    assert [test.key(i) for i in range(len(test))] == ["a/3.png"]
    # One numbering of the classes for both: a, b, c.
    assert [train[0]["label"], train[1]["label"], test[0]["label"]] == [1, 2, 0]


def test_folder_with_the_split_in_its_path(tmp_path):
    write_images(tmp_path, "fit/images/a/1.png", "check/images/a/2.png", "check/images/a/3.png")
    changes = {"train_split": "fit", "test_split": "check"}
    path = tmp_path / "{split}" / "images"
    assert len(folder(path, **changes)) == 1
    assert len(folder(path, "test", **changes)) == 2


def test_held_out_part_is_fixed_by_the_names(tmp_path):
    write_images(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(30)))

    def keys(split):
        source = folder(tmp_path, split, test_fraction=0.3)
        return {source.key(i) for i in range(len(source))}

    train, test = keys("train"), keys("test")
    assert not train & test
    assert len(train | test) == 60
    assert 8 < len(test) < 30
    write_images(tmp_path, *(f"new/{i}.png" for i in range(30)))
    (tmp_path / sorted(train)[0]).unlink()
    assert {k for k in keys("test") if not k.startswith("new")} == test
    assert len(folder(tmp_path, test_fraction=0.3)[0]) == 2  # a record: image and label


def test_held_out_part_has_the_size_asked_for():
    source = Numbers(4000)
    assert 300 < len(hold_out(source, "test", 0.1)) < 500
    assert len(hold_out(source, "train", 0.0)) == 4000
    subset = hold_out(source, "test", 0.1)
    assert subset[3]["image"][0, 0, 0] == subset.indices[3] % 256
    assert subset.name(3) == f"number {subset.indices[3]}"


# Names and mistakes


def test_a_misspelt_source_lists_what_is_allowed():
    with pytest.raises(UserError, match=r"'foldr'; allowed: glyphs, folder, tfds.*mean 'folder'"):
        make_source(data_config(source="foldr"), "train")
    with pytest.raises(UserError, match="'valid'; allowed: train, test"):
        make_source(data_config(source="glyphs"), "valid")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="gone' is not a folder"):
        folder(tmp_path / "gone")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no image in .*empty.* allowed: .jpg"):
        folder(tmp_path / "empty")
    write_images(tmp_path / "full", "1.png")
    with pytest.raises(UserError, match=r"none of the 1 images .*'test'.*test_fraction=0"):
        folder(tmp_path / "full", "test")
    with pytest.raises(UserError, match=r"test_fraction.*: 1.5"):
        folder(tmp_path / "full", "test", test_fraction=1.5)


@pytest.mark.parametrize("source", ["array_record", "webdataset"])
def test_missing_files(tmp_path, source):
    with pytest.raises(UserError, match=r"no .* matches .*none-\*"):
        make_source(data_config(source=source, path=str(tmp_path / "none-*")), "train")


@pytest.mark.parametrize("name", ["a[1].tar", "b{0,1}.tar", "c{0..3}.tar", "d*.tar", "e?.tar"])
def test_a_file_that_is_called_like_a_pattern(tmp_path, name):
    (tmp_path / name).touch()
    assert expand(str(tmp_path / name)) == [str(tmp_path / name)]
    assert absent(str(tmp_path / name), [str(tmp_path / name)]) == []


def test_expand(tmp_path):
    for number in (0, 1, 2, 9, 10, 11):
        (tmp_path / f"s{number:03}.tar").touch()

    def names(pattern):
        return [os.path.basename(path) for path in expand(str(tmp_path / pattern))]

    assert names("s{001..010}.tar") == ["s001.tar", "s002.tar", "s009.tar", "s010.tar"]
    assert names("s00*.tar") == ["s000.tar", "s001.tar", "s002.tar", "s009.tar"]
    assert names("s{000,011}.{tar,tgz}") == ["s000.tar", "s011.tar"]
    assert names("s011.tar") == ["s011.tar"]
    assert names("s{20..30}.tar") == []


# ArrayRecord


def test_array_records_hold_files_and_arrays(tmp_path):
    images = [np.asarray(picture(i)) for i in range(5)]
    path = str(tmp_path / "a-{}.array_record")
    first = [{"image": encoded(picture(i)), "label": i + 3} for i in range(3)]
    assert write_array_record(path.format(0), first) == 3
    write_array_record(path.format(1), [{"image": images[i], "label": i} for i in (3, 4)])
    config = data_config(source="array_record", path=path.format("*"))
    source = pickle.loads(pickle.dumps(make_source(config, "train")))
    assert len(source) == 5
    for index, image in enumerate(images):
        np.testing.assert_array_equal(pixels(source[index]), image)
    assert [source[i]["label"] for i in range(5)] == [3, 4, 5, 3, 4]
    assert source.name(4) == f"{path.format(1)}[1]"
    assert source.key(2) == "a-0.array_record[2]"


def test_array_record_splits(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        records = [{"image": encoded(picture(0))}] * count
        write_array_record(str(tmp_path / f"{split}.array_record"), records)
    path = str(tmp_path / "{split}.array_record")
    config = data_config(source="array_record", path=path, test_split="val")
    assert len(make_source(config, "train")) == 3
    assert len(make_source(config, "test")) == 2
    config.path, config.test_fraction = str(tmp_path / "*"), 0.4
    assert len(make_source(config, "train")) + len(make_source(config, "test")) == 5
    assert make_source(config, "train")[0]["label"] == 0


@pytest.mark.parametrize("length", [0, 1000, 70_000])
def test_a_damaged_array_record_file_is_named(tmp_path, length):
    path = tmp_path / "a.array_record"
    write_array_record(str(path), [{"image": encoded(picture(0))}] * 3)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"a\.array_record' is .*damaged"):
        make_source(data_config(source="array_record", path=str(path)), "train")


def test_an_array_record_file_without_records_is_refused(tmp_path):
    assert write_array_record(str(tmp_path / "a.array_record"), []) == 0
    with pytest.raises(UserError, match="is empty"):
        make_source(data_config(source="array_record", path=str(tmp_path / "a*")), "train")


def test_an_unfinished_array_record_file_has_no_name(tmp_path):
    def records():
        yield {"image": encoded(picture(0))}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_array_record(str(tmp_path / "a.array_record"), records())
    assert not (tmp_path / "a.array_record").exists()


# tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of 7 + 3 small PNGs, prepared as a user's would be."""
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            counts = {"train": range(7), "test": range(7, 10)}
            return {name: self._generate_examples(c) for name, c in counts.items()}

        def _generate_examples(self, numbers):
            for i in numbers:
                yield i, {"image": encoded(picture(i)), "label": i % 3}

    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_config(folder, path="tiny_pictures", **changes):
    return data_config(source="tfds", path=path, data_dir=folder, **changes)


def test_tfds_gives_encoded_bytes_and_labels(prepared):
    train, test = (make_source(tfds_config(prepared), split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (7, 3, 3)
    assert train.class_names == ("a", "b", "c")
    records = [s[i] for s in (train, test) for i in range(len(s))]
    assert all(isinstance(record["image"], bytes) for record in records)
    images = {pixels(record).tobytes(): record["label"] for record in records}
    assert images == {np.asarray(picture(i)).tobytes(): i % 3 for i in range(10)}
    assert train.name(2) == "tiny_pictures/train[2]"


def test_tfds_slices_and_pickles(prepared):
    config = tfds_config(prepared, "tiny_pictures:1.0.0", train_split="train[:3]+test[1:]")
    source = pickle.loads(pickle.dumps(make_source(config, "train")))
    assert len(source) == 5
    assert pixels(source[4]).shape == (10, 12, 3)


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("tiny_pictures", "val", "no split 'val'; allowed: .*train.* slices"),
        ("tiny_pictures", "train[", r"no split 'train\['"),
        ("no_such_set", "train", "no 'no_such_set'.* finds none prepared"),
        ("", "train", "data.path"),
    ],
)
def test_tfds_mistakes(prepared, path, split, message):
    with pytest.raises(UserError, match=message) as error:
        make_source(tfds_config(prepared, path, train_split=split), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tiny_pictures", "tiny_pictures:1.0.0"])
def test_a_data_set_in_the_default_form_comes_with_the_way_out(prepared, tmp_path, name):
    """tensorflow-datasets writes TFRecord unless told otherwise."""
    shutil.copytree(prepared, tmp_path / "d")
    (info,) = (tmp_path / "d").glob("*/*/dataset_info.json")
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="prepared in another form than ArrayRecord") as error:
        make_source(tfds_config(str(tmp_path / "d"), name), "train")
    assert "tfds convert_format --root_data_dir=" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unprepared_data_set_comes_with_the_command(tmp_path):
    with pytest.raises(UserError, match="not prepared") as error:
        make_source(tfds_config(str(tmp_path), "mnist"), "train")
    command = f"t.builder('mnist', data_dir='{tmp_path}', file_format='array_record')"
    assert command in str(error.value)
    assert "\n" not in str(error.value)
