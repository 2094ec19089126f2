"""Cached images are those of the data, in order; a cache that was stopped goes on."""

import itertools
import json
from random import Random

import numpy as np
import pytest
from data_files import data_config, encoded, picture

from efae_jax import cache
from efae_jax.__main__ import main
from efae_jax.cache import Settings, write_cache
from efae_jax.data import Transform, make_source, make_transform, train_batches
from efae_jax.data.transforms import fit
from efae_jax.errors import RunError, UserError

SIZES = ((40, 24), (24, 41), (33, 31), (24, 24), (90, 50), (17, 35), (133, 79))


@pytest.fixture
def folder(tmp_path):
    for number in range(24):
        image = picture(number, *SIZES[number % len(SIZES)])
        path = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image.convert("L") if number == 5 else image))
    return tmp_path / "data"


def batches(config, count=5):
    reader = make_transform(config, train=True)
    found = train_batches(make_source(config, "train"), reader, batch_size=8, seed=3)
    try:
        return list(itertools.islice(found, count))
    finally:
        found.close()


def cached_config(out, **changes):
    return data_config(source="array_record", path=f"{out}/{{split}}-*.array_record", **changes)


@pytest.mark.parametrize("form", ["raw", "png"])
@pytest.mark.parametrize("stored", ["center", "none"])
def test_training_reads_the_same_stream_from_a_cache(folder, tmp_path, form, stored):
    options = {"flip": True, "size": (24, 24)}
    settings = Settings(size=24, crop=stored, format=form)
    write_cache(tmp_path / "c", str(folder), settings=settings, test_fraction=0.3, shards=3)
    expected = batches(data_config(path=str(folder), test_fraction=0.3, **options))
    found = batches(cached_config(tmp_path / "c", **options))
    # A crop of the whole is computed on the same grid, which rounds otherwise now and then.
    allowed = 0 if stored == "center" else 1
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        difference = one.pop("image").astype(int) - other.pop("image")
        assert abs(difference).max() <= allowed
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("size", [*SIZES, (77, 24), (24, 1001)])
def test_random_crops_of_the_whole_are_those_of_the_image(size):
    # No black and no white: between its two passes Pillow clips, in either order.
    random = np.random.default_rng(0).integers(80, 176, (size[1], size[0], 3), np.uint8)
    whole = fit(random, 24, square=False)
    longer = max(whole.size)
    assert min(whole.size) == 24
    assert longer == round(max(size) * 24 / min(size))
    transform, differences = Transform((24, 24), crop="random"), []
    for place in (0.0, 0.1, 0.3, 0.5, 0.8):
        one, other = (transform(image, _Fixed(place)) for image in (random, np.asarray(whole)))
        differences.append(abs(one.astype(int) - other).max())
    # But for the last window, which the image's end moves by less than a pixel.
    assert max(differences[: 5 if longer > 30 else 1]) <= 1


class _Fixed:
    """Draws that are the same each time."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def test_what_is_stored(folder, tmp_path):
    settings = Settings(size=20, format="jpeg")
    assert write_cache(tmp_path / "c", str(folder), settings=settings, split="train", shards=2)
    source = make_source(cached_config(tmp_path / "c"), "train")
    original = make_source(data_config(path=str(folder), test_fraction=0.02), "train")
    plain = make_transform(data_config(size=(20, 20)), train=False)
    assert len(source) == len(original)
    for index in range(len(source)):
        record, wanted = source[index], original[index]
        assert record["image"].startswith(b"\xff\xd8")
        assert record["label"] == wanted["label"]
        assert (
            abs(plain(record["image"], Random(0)) - 1.0 * plain(wanted["image"], Random(0))).mean()
            < 2
        )
    assert not list((tmp_path / "c").glob("test*"))


def test_a_stopped_cache_goes_on(folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "c"
    options = {"settings": Settings(size=8), "split": "train", "shards": 4, "test_fraction": 0.0}
    write_cache(whole, str(folder), **options)

    def full(path, records, **_):
        path.write_bytes(b"half of a shard")
        raise OSError(28, "No space left on device")

    write, calls = cache.write_records, []

    def third_fails(path, records, **how):
        calls.append(path)
        return (full if len(calls) == 3 else write)(path, records, **how)

    monkeypatch.setattr(cache, "write_records", third_fails)
    with pytest.raises(OSError, match="No space left"):
        write_cache(out, str(folder), **options)
    names = [f"train-{i:05}-of-00004.array_record" for i in range(4)]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names[:2], "train.json"])
    before = (out / names[0]).stat().st_mtime_ns
    assert write_cache(out, str(folder), **options) == {"train": 24}
    assert len(calls) == 5
    assert (out / names[0]).stat().st_mtime_ns == before
    assert "2 of 4 shards are there already" in capsys.readouterr().out
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match=r"holds images made otherwise \(size: 8 there, 9 given\)"):
        write_cache(out, str(folder), **{**options, "settings": Settings(size=9)})


def test_processes_share_the_shards(folder, tmp_path, monkeypatch):
    options = {"settings": Settings(size=8), "split": "train", "shards": 3, "test_fraction": 0.0}
    monkeypatch.setattr(cache.jax, "process_count", lambda: 2)
    for index, expected in ((0, 2), (1, 3)):
        monkeypatch.setattr(cache.jax, "process_index", lambda index=index: index)
        write_cache(tmp_path / "c", str(folder), **options)
        assert len(list((tmp_path / "c").glob("*.array_record"))) == expected


def test_unreadable_images_are_named_counted_and_left_out(folder, tmp_path, caplog):
    (folder / "b" / "03.png").write_bytes(b"not an image")
    options = {"settings": Settings(size=8), "split": "train", "shards": 2, "test_fraction": 0.0}
    with pytest.raises(RunError, match="1 unreadable images are more than .*03.png"):
        write_cache(tmp_path / "c", str(folder), max_bad=0, **options)
    assert write_cache(tmp_path / "c", str(folder), max_bad=1, **options) == {"train": 23}
    assert "03.png: no image that Pillow reads here: a file that begins with" in caplog.text


def test_the_command(folder, tmp_path, capsys):
    out = str(tmp_path / "c")
    command = [
        "cache",
        "--data",
        str(folder),
        "--out",
        out,
        "--size",
        "8",
        "--test-fraction",
        "0.3",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "KiB an image" in printed
    assert "--config.data.path='" + out + "/{split}-*.array_record'" in printed.replace("\n", "")
    images = [
        json.loads((tmp_path / "c" / f"{s}.json").read_text())["data"] for s in ("train", "test")
    ]
    assert sum(data["images"] for data in images) == 24
    assert main([*command, "--format", "webp"]) == 2
    assert "--format webp: allowed are raw, png, jpeg" in capsys.readouterr().err
    for option, value in (("--size", "0"), ("--threads", "0"), ("--shards", "0"), ("--crop", "no")):
        assert main([*command, option, value]) == 2
        assert f"error: {option} {value}: " in capsys.readouterr().err
