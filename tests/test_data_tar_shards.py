"""Tar shards: any tar file's members are found from the headers alone, damage is named."""

import gzip
import io
import json
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from data_files import data_config, encoded, picture, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from efae_jax import logs
from efae_jax.data import make_source
from efae_jax.data.tar_members import members, opened
from efae_jax.errors import UserError


def sample(number, **labels):
    """An image and its companions, as img2dataset writes them."""
    files = [(f"{number:05}.png", encoded(picture(number)))]
    return files + [(f"{number:05}.{kind}", data.encode()) for kind, data in labels.items()]


def shards(path, split="train", **changes):
    return make_source(data_config(source="webdataset", path=str(path), **changes), split)


def pixels(record):
    return np.asarray(Image.open(io.BytesIO(record["image"])))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    names=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    sizes=st.lists(st.integers(0, 1100), min_size=6, max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    letter=st.sampled_from("aé"),
)
def test_members_agree_with_tarfile(tmp_path, names, sizes, form, letter):
    path = tmp_path / "a.tar"
    # Long names take another form of header in each format, ustar's at a folder's border.
    files = [
        (
            f"{i}/" + letter * min(n, 90 // len(letter.encode())) + "/" + "b" * (n // 2 + 1),
            os.urandom(s),
        )
        for i, (n, s) in enumerate(zip(names, sizes, strict=False))
    ]
    write_tar(path, files, form)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    with opened(str(path)) as (pread, length):
        assert list(members(pread, length)) == expected
    assert [name for name, _, _ in expected] == [name for name, _ in files]


def test_samples_of_several_shards(tmp_path):
    one = sample(0, cls="4", txt="a dog") + sample(1, json=json.dumps({"label": 7, "url": "x"}))
    write_tar(tmp_path / "00000.tar", one)
    two = [("sub/x.v1.JPG", encoded(picture(2), "JPEG")), ("sub/x.json", b'{"cls": 2}')]
    two += [("sub/x.v2.png", encoded(picture(9, 5, 5)))]
    two += [("lonely.txt", b"no image"), *sample(3, json="{}"), *sample(4)]
    write_tar(tmp_path / "00001.tar", two)
    source = pickle.loads(pickle.dumps(shards(tmp_path / "{00000..00005}.tar")))
    assert len(source) == 6
    assert [source[i]["label"] for i in range(6)] == [4, 7, 2, 2, 0, 0]
    for index, number in ((5, 4), (1, 1), (4, 3), (0, 0)):
        np.testing.assert_array_equal(pixels(source[index]), picture(number))
    assert [pixels(source[i]).shape for i in (2, 3)] == [(10, 12, 3), (5, 5, 3)]
    assert [source.key(i) for i in (2, 3)] == ["00001.tar/sub/x.v1", "00001.tar/sub/x.v2"]
    assert source.name(0) == f"{tmp_path}/00000.tar/00000"


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    big = b"\0" * 1_000_000
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(picture(i)) + big) for i in range(20)])
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: (read.append(n), pread(fd, n, at))[1])
    source = shards(tmp_path / "a.tar")
    assert sum(read) <= 512 * 21 + 10240  # and the padding at the end
    assert pixels(source[19]).shape == (10, 12, 3)


def test_splits(tmp_path):
    write_tar(tmp_path / "train-0.tar", [file for i in range(40) for file in sample(i)])
    write_tar(tmp_path / "val-0.tar", sample(40))
    path = tmp_path / "{split}-0.tar"
    assert len(shards(path, test_split="val")) == 40
    assert len(shards(path, "test", test_split="val")) == 1
    parts = [shards(tmp_path / "train-0.tar", s, test_fraction=0.3) for s in ("train", "test")]
    keys = [{part.key(i) for i in range(len(part))} for part in parts]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 40


@pytest.mark.parametrize("cut", ["member", "header", "garbage", "flipped bit"])
def test_a_damaged_shard_is_named_and_used_so_far(tmp_path, caplog, cut):
    write_tar(tmp_path / "good.tar", sample(3))
    write_tar(tmp_path / "torn.tar", sample(0) + sample(1) + sample(2))
    data = (tmp_path / "torn.tar").read_bytes()
    member = 512 + -(-len(encoded(picture(0))) // 512) * 512
    third = 2 * member
    damaged = {
        "member": data[: third + 600],
        "header": data[: third + 100],
        "garbage": data[:third] + b"garbage" * 300,
        "flipped bit": data[:third] + bytes([data[third] ^ 1]) + data[third + 1 :],
    }
    (tmp_path / "torn.tar").write_bytes(damaged[cut])
    with caplog.at_level(logging.WARNING):
        source = shards(tmp_path / "*.tar", max_bad=1)
    assert len(source) == 3
    assert "torn.tar" in caplog.text
    with pytest.raises(UserError, match=r"1 damaged shards .* data.max_bad=0.*torn\.tar"):
        shards(tmp_path / "*.tar")


def test_a_shard_that_ends_without_its_end_mark_is_whole(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", sample(0))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 512 + -(-len(encoded(picture(0))) // 512) * 512])
    assert len(shards(tmp_path / "a.tar")) == 1
    assert not caplog.text


def test_compressed_and_foreign_files_say_so(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0))
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write((tmp_path / "a.tar").read_bytes())
    with pytest.raises(UserError, match="compressed"):
        shards(tmp_path / "a.tgz")
    (tmp_path / "page.tar").write_text("<html>404</html>" * 100)
    with pytest.raises(UserError, match="no tar file"):
        shards(tmp_path / "page.tar")
    write_tar(tmp_path / "texts.tar", [("a.txt", b"x")])
    with pytest.raises(UserError, match="no image in 1 tar shards"):
        shards(tmp_path / "texts.tar")


@pytest.mark.parametrize("records", [b"0 path=a\n", b"x path=a\n", b" path=a\n", b"-3 path=a\n"])
def test_a_damaged_pax_header_is_named_and_never_hangs(tmp_path, records):
    header = tarfile.TarInfo("pax")
    header.size, header.type = len(records), tarfile.XHDTYPE
    block = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    path = tmp_path / "0.tar"
    write_tar(path, sample(1))
    path.write_bytes(path.read_bytes()[: -tarfile.RECORDSIZE] + block + bytes(1024))
    with pytest.raises(UserError, match="a pax header is damaged"):
        shards(path, max_bad=0)


def test_indexing_shows_itself(tmp_path, monkeypatch):
    """Thousands of shards, or shards on object storage, take minutes."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sample(number))
    out = io.StringIO()
    monkeypatch.setattr(logs, "console", Console(file=out, force_terminal=False, width=80))
    monkeypatch.setattr(logs, "LINE_EVERY", -1.0)
    assert len(shards(tmp_path / "*.tar", test_fraction=0.0)) == 3
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"indexing: {i}/3 shards" for i in (1, 2)]


def test_an_error_is_told_after_the_bar_of_indexing(tmp_path, monkeypatch):
    (tmp_path / "0.tar").write_bytes(bytes(range(256)) * 4)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(logs, "console", console)
    with pytest.raises(UserError, match="damaged shards are more") as caught:
        shards(tmp_path / "*.tar", max_bad=0)
    assert caught.traceback  # keeps the frame, and with it the bar, as main.py's does
    hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"
    shown = console.file.getvalue()
    assert shown.rfind(hide_cursor) < shown.rfind(show_cursor)
