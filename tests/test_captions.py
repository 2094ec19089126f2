"""Captioned images from every form that people keep them in, and a line for every mistake."""

import io
import itertools
import json
import logging
import pickle
import sys
import tarfile

import numpy as np
import pytest
from data_files import encoded, picture
from PIL import Image

from efae_jax.data import Transform, eval_batches
from efae_jax.data.captions import CaptionError, open_captioned
from efae_jax.data.captions.texts import captions_of_json
from efae_jax.data.glyphs import TEST_OFFSET
from efae_jax.errors import UserError

SIZE = (16, 16)


def opened(data, **options):
    return open_captioned(str(data), size=SIZE, **options)


def one_line(message, data, **options):
    """The data are refused with this message (a pattern), on one line."""
    with pytest.raises(UserError, match=message) as error:
        opened(data, **options)
    assert "\n" not in str(error.value)


def write_images(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(number), "PNG"))


def pixels(record):
    return np.asarray(Image.open(io.BytesIO(record["image"])))


def shows(source, index, number):
    """Record `index` is the image that write_images wrote as number `number`."""
    record = source[index]
    assert set(record) == {"image", "label", "captions", "factors"}
    assert record["factors"] is None
    np.testing.assert_array_equal(pixels(record), picture(number))


def captions(source):
    return [source[i]["captions"] for i in range(len(source))]


def keys(source):
    return [source.key(i) for i in range(len(source))]


# COCO


def write_coco(path, images, annotations, **changes):
    content = {"info": {}, "images": images, "annotations": annotations, **changes}
    path.write_text(json.dumps(content))
    return f"coco:{path}"


@pytest.fixture
def coco(tmp_path):
    """(--data, --images): images 3, 7 and 20, the last without a caption."""
    write_images(tmp_path / "val", "7.png", "3.png", "20.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 12} for n in (7, 20, 3)]
    texts = [
        (9, 7, "second"),
        (2, 7, " the\tfirst\n one "),
        (5, 3, "x"),
        (6, 3, " \n"),
        (1, 99, "y"),
    ]
    annotations = [{"id": i, "image_id": image, "caption": t} for i, image, t in texts]
    annotations += [{"id": 100 + n, "image_id": 3, "caption": f"c{n}"} for n in range(9, 0, -1)]
    return write_coco(tmp_path / "a.json", images, annotations), str(tmp_path / "val")


def test_coco(coco, caplog):
    with caplog.at_level(logging.WARNING):
        source = opened(coco[0], images=coco[1])
    assert "images without a caption, left out: 1" in caplog.text
    source = pickle.loads(pickle.dumps(source))
    assert keys(source) == ["3.png", "7.png"]
    assert captions(source) == [("x", "c1", "c2", "c3", "c4"), ("the first one", "second")]
    shows(source, 0, 1)
    shows(source, 1, 0)
    assert source.name(1) == f"{coco[1]}/7.png"
    assert source.num_classes == 0


def test_coco_ids_may_be_strings_and_annotations_have_none(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    images = [{"id": "y", "file_name": "a.png"}, {"id": "x", "file_name": "b.png"}]
    annotations = [{"image_id": i, "caption": f"{i}{n}"} for n in (2, 1) for i in "xy"]
    source = opened(write_coco(tmp_path / "a.json", images, annotations), images=str(tmp_path))
    assert keys(source) == ["b.png", "a.png"]
    assert captions(source) == [("x2", "x1"), ("y2", "y1")]


def test_the_pipeline_reads_and_counts_what_is_missing(coco, tmp_path):
    (tmp_path / "val" / "7.png").unlink()
    source = opened(coco[0], images=coco[1])
    (batch,) = eval_batches(source, Transform(SIZE), batch_size=2, num_threads=0, max_bad=1)
    assert batch["mask"].tolist() == [True, False]


def test_mistakes_in_coco(tmp_path, coco):
    images, annotations = [{"id": 1, "file_name": "1.png"}], [{"image_id": 1, "caption": "x"}]
    path = tmp_path / "b.json"
    here = {"images": str(tmp_path)}

    one_line("a.json needs --images FOLDER", coco[0])
    one_line("gone.json: No such file", f"coco:{tmp_path}/gone.json", **here)
    path.write_text('{"images": [')
    one_line("b.json: no COCO captions: it is no JSON .line 1", f"coco:{path}", **here)
    path.write_text("[1]")
    one_line('b.json: no COCO captions: it has no list "images"', f"coco:{path}", **here)
    data = write_coco(path, images, {})
    one_line('no list "annotations"', data, **here)
    write_coco(path, images, [*annotations, {"image_id": 1, "bbox": []}])
    one_line(r'annotations\[1\] has no "caption"; .*captions_val2017', data, **here)
    write_coco(path, [{"id": 1}], annotations)
    one_line(r'images\[0\] has no "file_name"', data, **here)
    write_coco(path, images, [3])
    one_line(r'annotations\[0\] has no "image_id"', data, **here)
    write_coco(path, images, [{"image_id": 2, "caption": "x"}])
    one_line("b.json: no image with a caption", data, **here)
    write_coco(path, images, annotations)
    one_line(r"1.png', named by .*b.json, is not there; --images", data, **here)
    one_line("none' is not a folder; it should hold the images of", data, images="none")


def test_a_wrong_folder_is_noticed_and_a_few_missing_files_are_not(tmp_path):
    rows = [{"id": n, "file_name": f"{n:02}.png"} for n in range(30)]
    annotations = [{"image_id": n, "caption": "x"} for n in range(30)]
    data = write_coco(tmp_path / "a.json", rows, annotations)
    write_images(tmp_path, "10.png")
    one_line("00.png', .* not there, nor are the next 9 images", data, images=str(tmp_path))
    write_images(tmp_path, "09.png")
    assert len(opened(data, images=str(tmp_path))) == 30


# A table


def test_csv(tmp_path, caplog):
    write_images(tmp_path, "sub/a.png", "b.png", "c.png")
    (tmp_path / "t.csv").write_text(
        "\ufeffCaption_1,id, FILENAME ,title,other,caption_2\n"
        '"one, two",1,b.png,"a ""b""",z,last\n'
        "\n"
        "x,2,sub/a.png,,z,y\n"
        "  ,3,c.png,,z,\n"
        "more,4,b.png,,z,\n",
        encoding="utf-8",
    )
    with caplog.at_level(logging.WARNING):
        source = opened(f"csv:{tmp_path}/t.csv")
    assert keys(source) == ["b.png", "sub/a.png"]
    assert captions(source) == [("one, two", 'a "b"', "last", "more"), ("x", "y")]
    shows(source, 0, 1)
    shows(source, 1, 0)
    assert "images without a caption, left out: 1" in caplog.text


def test_tsv_and_a_folder_of_images_elsewhere(tmp_path, monkeypatch):
    write_images(tmp_path / "pictures", "a.png")
    (tmp_path / "t.TSV").write_text("path\ttext\na.png\tone, two\n")
    source = opened(f"csv:{tmp_path}/t.TSV", images=str(tmp_path / "pictures"))
    assert captions(source) == [("one, two",)]
    shows(source, 0, 0)
    monkeypatch.chdir(tmp_path / "pictures")
    (tmp_path / "pictures" / "t.tsv").write_text("path\ttext\na.png\tone\n")
    shows(opened("csv:t.tsv"), 0, 0)


def test_mistakes_in_a_table(tmp_path):
    path = tmp_path / "t.csv"
    data = f"csv:{path}"
    one_line("t.csv: No such file", data)
    path.write_text("id,image\n1,a.png\n")
    one_line(r"no column of captions in its header \(id, image\); images: image, file", data)
    path.write_text("url,caption\n1,a.png\n")
    one_line(r"no column of images in its header \(url, caption\)", data)
    path.write_text("")
    one_line("no column of images", data)
    path.write_text("image,caption\na.png,x\nb.png,a dog, running\n")
    one_line("line 3 has 3 columns, the header 2; .* needs quotes", data)
    path.write_text("image,caption\n ,x\n")
    one_line("line 2 names no image", data)
    path.write_bytes(b"image,caption\na.png,caf\xe9\n")
    one_line("no table in UTF-8", data)
    path.write_text("image,caption\na.png,\n")
    one_line("no image with a caption", data)
    path.write_text("image,caption\na.png,x\n")
    one_line("a.png', named by .*t.csv, is not there; --images", data)


# A folder


def test_a_folder(tmp_path, caplog):
    write_images(tmp_path, "x/1.png", "x/deep/2.v1.png", "3.png", "y/4.PNG", "x/deep/2.v2.png")
    (tmp_path / "x/1.txt").write_text("\ufeff a dog \n\n  runs\tfast\r\nö\n", encoding="utf-8")
    (tmp_path / "x/deep/2.v1.caption").write_text("two")
    (tmp_path / "x/deep/2.txt").write_text("of no image here")
    (tmp_path / "y/4.caption").write_text("second choice")
    (tmp_path / "y/4.txt").write_text("\n".join("abcdefg"))
    with caplog.at_level(logging.WARNING):
        sources = opened(tmp_path), opened(f"folder:{tmp_path}")
    assert "2 of 5 images have no caption file" in caplog.text
    for source in sources:
        assert keys(source) == ["x/1.png", "x/deep/2.v1.png", "y/4.PNG"]
        assert captions(source) == [("a dog", "runs fast", "ö"), ("two",), tuple("abcde")]
        assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
        shows(source, 1, 1)


def test_unusable_caption_files_are_bad_records(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text(" \n\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("fine")
    source = opened(tmp_path)
    for index, why in ((0, "a.txt is empty"), (1, "b.txt is not UTF-8")):
        with pytest.raises(CaptionError, match=why):
            source[index]
    (batch,) = eval_batches(source, Transform(SIZE), batch_size=3, num_threads=0, max_bad=2)
    assert batch["mask"].tolist() == [False, False, True]


def test_mistakes_in_a_folder(tmp_path):
    one_line("gone: no such folder", f"folder:{tmp_path}/gone")
    write_images(tmp_path, "a.png")
    one_line("1 images, none with captions; beside dog.jpg belongs dog.txt", tmp_path)


# Shards


def write_tar(path, *files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number, **members):
    files = [(f"{number:03}.{kind}", data.encode()) for kind, data in members.items()]
    return [*files, (f"{number:03}.png", encoded(picture(number)))]


def test_shards(tmp_path):
    write_tar(tmp_path / "0.tar", *sample(0, cls="4", json='{"caption": "no"}', txt="a\n\nb c\n"))
    fields = [
        {"caption": " one  two ", "text": "no", "label": 3},
        {"captions": ["x", "", *"yzuvw"]},
        {"text": "t"},
    ]
    last = [("9.png", encoded(picture(3))), ("9.txt", b"first"), ("9.json", b'{"text": "no"}')]
    samples = [sample(i, json=json.dumps(f)) for i, f in enumerate(fields)]
    write_tar(tmp_path / "1.tar", *itertools.chain(*samples), *last)
    source = pickle.loads(pickle.dumps(opened(f"webdataset:{tmp_path}/{{0..1}}.tar")))
    assert keys(source) == ["0.tar/000", "1.tar/000", "1.tar/001", "1.tar/002", "1.tar/9"]
    assert captions(source) == [("a", "b c"), ("one two",), tuple("xyzuv"), ("t",), ("first",)]
    for index, number in enumerate((0, 0, 1, 2, 3)):
        shows(source, index, number)
        assert source[index]["label"] == 0


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"cls": "1"}, "neither .txt nor .json"),
        ({"txt": " \n"}, "its .txt is empty"),
        ({"json": "{"}, "its .json is no JSON"),
        ({"json": '["a"]'}, "its .json has none of caption, captions, text"),
        ({"json": '{"caption": null}'}, "its .json is empty"),
        ({"json": '{"caption": [1, "a"]}'}, "its .json holds something else than strings"),
    ],
)
def test_samples_without_captions_are_bad_records(tmp_path, members, why):
    write_tar(tmp_path / "0.tar", *sample(0, **members), *sample(1, txt="fine"))
    source = opened(f"webdataset:{tmp_path}/0.tar")
    with pytest.raises(CaptionError, match=f"no caption: .*{why}"):
        source[0]
    assert source[1]["captions"] == ("fine",)


def test_mistakes_in_shards(tmp_path):
    one_line("no tar shard matches .*none.tar", f"webdataset:{tmp_path}/none.tar")
    (tmp_path / "torn.tar").write_bytes(b"x" * 2000)
    write_tar(tmp_path / "whole.tar", *sample(1, txt="fine"))
    assert len(opened(f"webdataset:{tmp_path}/*.tar", max_bad=1)) == 1
    one_line("1 damaged shards are more than", f"webdataset:{tmp_path}/*.tar", max_bad=0)


# The hub


def hub_rows(datasets, start, count, **changes):
    numbers = range(start, start + count)
    columns = {
        "cocoid": list(numbers),
        "picture": [{"bytes": encoded(picture(n)), "path": None} for n in numbers],
        "en": [[f"a {n}", "", f"the  {n}"] for n in numbers],
        "energy": ["not a caption"] * count,
        "text_length": [3] * count,
        **{name: [value] * count for name, value in changes.items()},
    }
    rows = datasets.Dataset.from_dict(columns)
    return rows.cast_column("picture", datasets.Image())


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture
def saved(datasets, tmp_path):
    parts = {"test": hub_rows(datasets, 5, 1), "train": hub_rows(datasets, 0, 3)}
    parts["val"] = hub_rows(datasets, 3, 2)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return f"hub:{tmp_path}/saved"


def test_hub_on_disk(saved):
    source = pickle.loads(pickle.dumps(opened(saved)))
    assert keys(source) == ["0", "1", "2"]
    assert captions(source) == [(f"a {n}", f"the {n}") for n in range(3)]
    assert isinstance(source[0]["image"], bytes)
    shows(source, 2, 2)
    val = opened(saved, split="val")
    shows(val, 1, 4)
    assert val.name(1) == f"{saved[4:]}/val[1]"
    batches = eval_batches(source, Transform(SIZE), batch_size=3, num_threads=2)
    assert next(iter(batches))["mask"].all()
    batches.close()
    one_line("no split 'dev'; --split allows: test, train, val", saved, split="dev")


def test_hub_by_name(datasets, monkeypatch):
    """Everything but the network itself."""
    parts = {"val": hub_rows(datasets, 0, 2), "test": hub_rows(datasets, 2, 1, text="t", en_US="u")}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(parts))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: parts[split])
    source = opened("hub:owner/name")
    assert captions(source) == [("a 2", "the 2", "t", "u")]
    assert source.name(0) == "owner/name/test[0]"
    assert len(opened("hub:owner/name", split="val")) == 2
    one_line("'train'; --split allows: val, test", "hub:owner/name", split="train")

    def unknown(name):
        raise datasets.exceptions.DatasetNotFoundError(f"{name} does not exist\nor is private")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unknown)
    one_line("hub:owner/nam: .*owner/nam does not exist", "hub:owner/nam")


def test_a_saved_part_without_splits_and_images_in_files(datasets, tmp_path, monkeypatch):
    write_images(tmp_path, "0.png")
    columns = {"image": [str(tmp_path / "0.png"), None], "caption": ["one", "two"]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    shows(opened("hub:owner/name"), 0, 0)  # a path alone
    rows = rows.add_column("thumbnail", [None, None]).cast_column("thumbnail", datasets.Image())
    rows.save_to_disk(tmp_path / "saved")
    source = opened(f"hub:{tmp_path}/saved")
    shows(source, 0, 0)
    assert source[0]["captions"] == ("one",)
    with pytest.raises(Exception, match="'image' is empty"):
        source[1]
    one_line("saved has no splits", f"hub:{tmp_path}/saved", split="train")


def test_mistakes_with_the_hub(datasets, tmp_path):
    (tmp_path / "empty").mkdir()
    one_line("hub:.*empty: FileNotFoundError", f"hub:{tmp_path}/empty")
    texts = datasets.Dataset.from_dict({"caption": ["x"], "image": ["a.png"]})
    texts.save_to_disk(tmp_path / "texts")
    one_line("no column of images among caption, image", f"hub:{tmp_path}/texts")
    rows = hub_rows(datasets, 0, 1).remove_columns("en")
    rows.save_to_disk(tmp_path / "rows")
    one_line("no column of captions among cocoid, picture", f"hub:{tmp_path}/rows")


def test_the_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    one_line("needs the package: pip install datasets", "hub:owner/name")


# The built-in images, and names


def test_built_in_images():
    train = opened("captioned_glyphs")
    assert (len(train), train.key(0)) == (10_000, "0")
    test = opened("captioned_glyphs", split="test", num_images=3)
    assert (len(test), test.key(0)) == (3, str(TEST_OFFSET))
    assert test[0]["image"].size == SIZE
    assert len(test[0]["captions"]) == 5
    one_line("--split val: captioned_glyphs has train, test", "captioned_glyphs", split="val")
    with pytest.raises(UserError, match="--size 4: captioned_glyphs needs at least 8"):
        open_captioned("captioned_glyphs", size=(4, 32))


def test_the_first_images_of_other_data(coco):
    source = opened(coco[0], images=coco[1], num_images=1)
    assert keys(source) == ["3.png"]
    assert len(opened(coco[0], images=coco[1], num_images=5)) == 2
    one_line("--num-images 0: it must be at least 1", coco[0], images=coco[1], num_images=0)


def test_unknown_data(tmp_path, monkeypatch):
    allowed = "no such folder; allowed: a folder, captioned_glyphs, coco:ANNOTATIONS.json .with"
    one_line(f"--data nowhere: {allowed}.* hub:OWNER/NAME$", "nowhere")
    one_line("did you mean coco:ANNOTATIONS.json .*", "cocoo:a")
    one_line("did you mean captioned_glyphs", "captioned_glyph")
    one_line(r"did you mean csv:my/t\.tsv\?", "my/t.tsv")
    one_line("did you mean webdataset:s/0.tar", "s/0.tar")
    one_line("--data coco: the form is coco:ANNOTATIONS.json", "coco")
    one_line("--data captioned_glyphs:3: the form is captioned_glyphs;", "captioned_glyphs:3")
    one_line("--images x belongs to --data coco: or csv:", "captioned_glyphs", images="x")
    one_line("--split test: --data csv:t has no splits", "csv:t", split="test")
    write_images(tmp_path / "coco", "a.png")
    (tmp_path / "coco" / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert keys(opened("./coco")) == ["a.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys(opened("folder:~/coco")) == keys(opened("~/coco")) == ["a.png"]


def test_half_a_surrogate_pair_can_be_written():
    """JSON allows it, UTF-8 does not."""
    (caption,) = captions_of_json(b'{"caption": "dog \\ud83d"}', "x.json")
    assert caption.encode() == b"dog ?"
