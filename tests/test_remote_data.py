"""Data on object storage are read as those on a disk, by few requests; no network is used."""

import itertools
import json
import sys

import fsspec
import numpy as np
import pytest
from data_files import data_config, encoded, picture
from fsspec.implementations.memory import MemoryFileSystem
from ml_collections import ConfigDict
from test_data_tar_shards import sample, write_tar

from efae_jax.data import make_source, make_transform, train_batches
from efae_jax.data.array_records import write_array_record
from efae_jax.data.chosen import choose_images
from efae_jax.data.splits import expand
from efae_jax.errors import UserError


@pytest.fixture
def memory():
    """Copies a folder to memory://bucket, and gives its URL."""
    store = fsspec.filesystem("memory")

    def copied(folder):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store.pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
        return "memory://bucket"

    yield copied
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture
def requests(monkeypatch):
    """What is read of the memory's files: (path, start, end)."""
    found, read = [], MemoryFileSystem.cat_file

    def recorded(self, path, start=None, end=None, **options):
        found.append((self._strip_protocol(path), start, end))
        return read(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", recorded)
    return found


def write_images(folder):
    for number in range(30):
        path = folder / ("train" if number % 3 else "val") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / ".hidden" / "x.png").write_bytes(b"")
    (folder / "train" / "readme.txt").write_text("no image")


def stream(config, **how):
    reader = make_transform(config, train=True)
    found = train_batches(make_source(config, "train"), reader, batch_size=4, seed=0, **how)
    try:
        batches = list(itertools.islice(found, 8))
    finally:
        found.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("path", ["", "/{split}", "/train/a"])
def test_a_folder(tmp_path, memory, path, threads):
    write_images(tmp_path)
    options = {"test_fraction": 0.3, "test_split": "val", "crop": "random"}
    here = data_config(path=f"{tmp_path}{path}", **options)
    there = data_config(path=f"{memory(tmp_path)}{path}", **options)
    assert_same(stream(here), stream(there, num_threads=threads))
    for split in ("train", "test"):
        one, other = (make_source(config, split) for config in (here, there))
        assert [one.key(i) for i in range(len(one))] == [other.key(i) for i in range(len(other))]
        assert other.name(0).startswith("memory://bucket/")


@pytest.mark.parametrize("threads", [0, 3])
def test_tar_shards(tmp_path, memory, threads):
    for shard in range(3):
        numbers = range(7 * shard, 7 * shard + 7)
        members = [file for i in numbers for file in sample(i, json=json.dumps({"label": i}))]
        write_tar(tmp_path / f"{shard:03}.tar", members)
    url = memory(tmp_path)
    for pattern in ("*.tar", "{000..010}.tar", "00{0,2}.tar"):
        here = data_config(source="webdataset", path=f"{tmp_path}/{pattern}")
        there = data_config(source="webdataset", path=f"{url}/{pattern}")
        assert_same(stream(here), stream(there, num_threads=threads))


def test_worker_processes_open_the_storage_anew(tmp_path):
    write_tar(tmp_path / "0.tar", [file for i in range(5) for file in sample(i, cls="3")])
    options = {"source": "webdataset", "crop": "random"}
    here = data_config(path=f"{tmp_path}/0.tar", **options)
    there = data_config(path=f"file://{tmp_path}/0.tar", **options)
    assert_same(stream(here), stream(there, num_workers=1))


def test_requests_are_few(tmp_path, memory, requests, monkeypatch):
    monkeypatch.setattr("efae_jax.data.tar_members.REQUEST", 8192)
    small = [file for i in range(40) for file in sample(i, cls="1")]
    write_tar(tmp_path / "a.tar", [*small, ("big.png", bytes(10**6)), *sample(41, cls="7")])
    url = memory(tmp_path)
    source = make_source(data_config(source="webdataset", path=f"{url}/a.tar"), "train")
    # One for several small members; of a large one, the header only.
    assert len(requests) <= 41 * 2560 / 8192 + 2
    assert sum(end - start for _, start, end in requests) < 150_000
    requests.clear()
    assert source[41]["label"] == 7
    assert source[41]["image"] == encoded(picture(41))
    assert len(requests) == 2  # image and label together, twice


def test_ranges_far_apart_are_two_requests(tmp_path, memory, requests):
    one, label = sample(0, cls="5")
    write_tar(tmp_path / "a.tar", [one, ("00000.npy", bytes(10**6)), label])
    url = memory(tmp_path)
    source = make_source(data_config(source="webdataset", path=f"{url}/a.tar"), "train")
    requests.clear()
    assert source[0] == {"image": one[1], "label": 5}
    assert len(requests) == 2
    assert sum(end - start for _, start, end in requests) < 1000


def test_patterns(tmp_path, memory):
    for name in ("a0", "a1", "a2", "b/c1", "b/d/c2"):
        path = tmp_path / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    url = memory(tmp_path)
    for pattern in ("/a*.tar", "/a{1..3}.tar", "/b/*.tar", "/{a0,b/c1}.tar", "/**/*.tar", "/x.tar"):
        here = [path.removeprefix(str(tmp_path)) for path in expand(f"{tmp_path}{pattern}")]
        assert [path.removeprefix(url) for path in expand(f"{url}{pattern}")] == here


def test_images_chosen_on_the_command_line(tmp_path, memory):
    write_images(tmp_path)
    config = ConfigDict(data_config())
    found = choose_images(config, memory(tmp_path))
    assert found.described == {
        **choose_images(config, str(tmp_path)).described,
        "path": "memory://bucket",
    }


def test_what_cannot_be_is_one_line(tmp_path, memory, monkeypatch):
    def refused(match, **where):
        with pytest.raises(UserError, match=match) as error:
            make_source(data_config(**where), "train")
        assert "\n" not in str(error.value)

    refused("'memory://bucket/x' is not a folder", path="memory://bucket/x")
    refused("no tar shard matches", source="webdataset", path="memory://none/{0..3}.tar")
    refused("floppy://a/b.*: no such kind of storage", path="floppy://a/b")
    write_array_record(str(tmp_path / "a.array_record"), [{"image": encoded(picture(0))}])
    url = memory(tmp_path)
    refused("from disks only", source="array_record", path=f"{url}/*.array_record")
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda *_: 1 / 0)
    refused("memory://bucket/train cannot be reached: division by zero", path=url)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    refused("gs://b/x.*: gs:// needs pip install -r requirements-gcs.txt", path="gs://b/x")


def test_an_unreachable_shard_is_not_a_damaged_one(tmp_path, memory, monkeypatch):
    write_tar(tmp_path / "a.tar", sample(0))
    url = memory(tmp_path)

    def fails(*_, **__):
        raise OSError("the network is down")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    with pytest.raises(UserError, match=r"a\.tar cannot be reached: the network is down"):
        make_source(data_config(source="webdataset", path=f"{url}/*.tar", max_bad=5), "train")
