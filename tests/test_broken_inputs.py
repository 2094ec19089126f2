"""Every reader of users' files, a dozen broken files each: the last line says what and where.

Weights are in `test_broken_weights.py`.
"""

import io
import os
import re

import numpy as np
import pytest
from data_files import data_config, encoded, picture, write_tar

from efae_jax.api import load
from efae_jax.checkpoint import read_config
from efae_jax.convert.feature_statistics import read_statistics
from efae_jax.data import make_source
from efae_jax.data.array_records import write_records
from efae_jax.data.bad_image import reason_of
from efae_jax.data.captions import open_captioned
from efae_jax.data.labels import read_table
from efae_jax.data.latents import Latents
from efae_jax.data.pairs import Pairs
from efae_jax.data.transforms import read_picture
from efae_jax.disentangled import read_basis
from efae_jax.embedders.supplied import supplied_embedders
from efae_jax.errors import UserError
from efae_jax.exits import ended_by
from efae_jax.report.records import read_record


def _npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(5))
    return buffer.getvalue()


BROKEN = {
    "empty": b"",
    "zeros": bytes(4096),
    "bytes": bytes(range(256)) * 8,
    "web page": b"<!doctype html><html>404</html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "null": b"null",
    "list": b"[1, 2]",
    "number": b"3",
    "brace": b"{",
    "other object": b'{"a": 1}',
    "nested": b"[" * 100_000,
    "latin-1": b"caf\xe9,\xff\n",
    "npz": _npz(),
    "half an npz": _npz()[:100],
    "image": encoded(picture(0)),
    "text": b"hello world\n",
    "half a pickle": b"\x80\x04\x95\xff\xff",
}


def _source(kind):
    def read(path):
        source = make_source(data_config(source=kind, path=str(path)), "all")
        for i in range(len(source)):
            read_picture(source[i]["image"])

    return read


def _inside(name, read):
    """`read` of a folder with the file under that name."""

    def inside(path):
        folder = path.with_name(path.name + ".d")
        folder.mkdir()
        (folder / name).write_bytes(path.read_bytes())
        read(folder)

    return inside


def _captions(form):
    return lambda path: open_captioned(f"{form}:{path}", size=(8, 8), images=_images(form, path))


def _images(form, path):
    return str(path.parent) if form in ("coco", "csv") else None


READERS = {
    "folder": _source("folder"),
    "webdataset": _source("webdataset"),
    "array_record": _source("array_record"),
    "coco": _captions("coco"),
    "csv": _captions("csv"),
    "captioned shards": _captions("webdataset"),
    "captioned folder": _captions("folder"),
    "classes.txt": _inside("classes.txt", read_table),
    "classes.json": _inside("classes.json", read_table),
    "latents": _inside("latents.json", Latents),
    "pairs": _inside("pairs.json", Pairs),
    "statistics": lambda path: read_statistics(path, "vgg16", 8),
    "record": read_record,
    "record of a folder": _inside("evaluation.json", read_record),
    "basis": read_basis,
    "basis of a folder": _inside("basis.safetensors", read_basis),
    "model": _inside("config.json", load),
    "config": _inside("config.json", read_config),
    "embeddings.npz": lambda path: supplied_embedders(_named(path, ".npz")),
    "embeddings.parquet": lambda path: supplied_embedders(_named(path, ".parquet")),
}
# Broken for all others, and just what these take.
FINE = {("classes.txt", content) for content in BROKEN} | {("classes.json", "list")}
REFUSED = {("classes.txt", "empty"), ("classes.txt", "bytes"), ("classes.txt", "latin-1")}


def _named(path, ending):
    named = path.with_name(path.name + ending)
    return path.rename(named) if path.exists() else named


def check(message, path):
    """One line, which names the file and says more than an inner exception."""
    assert "\n" not in message
    assert path.name.split(".")[0] in message
    assert not re.search(r"\b\w+(Error|Exception)\b|Traceback|codec|char 0", message), message
    said = message.replace(str(path), "").split()
    assert len(said) >= 4, message
    # What is allowed, or what to do, or what it is instead.
    assert re.search(
        r"allowed|must|give|needs|meant|is not|holds|neither|no such|damaged|it is"
        r"|no (table|column)",
        message,
    ), message


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, reader, content):
    path = tmp_path / "broken"
    path.write_bytes(BROKEN[content])
    if (reader, content) in FINE - REFUSED:
        return
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    check(str(caught.value), path)


# Of a file in a folder, what reads the folder.
FOLDERS = {
    "latents": Latents,
    "pairs": Pairs,
    "record of a folder": read_record,
    "basis of a folder": read_basis,
    "model": load,
    "config": read_config,
}


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"classes.txt", "classes.json"}))
@pytest.mark.parametrize("there", [False, True])
def test_what_is_not_there_is_one_line(tmp_path, reader, there):
    """No file, and no folder; or a folder with nothing in it."""
    path = tmp_path / "broken"
    if there:
        path.mkdir()
    with pytest.raises(UserError) as caught:
        FOLDERS.get(reader, READERS[reader])(path)
    assert "broken" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", BROKEN)
def test_broken_images_have_a_reason_in_words(content):
    if content == "image":
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011  (decoders raise a dozen kinds)
        read_picture(BROKEN[content])
    reason = reason_of(caught.value)
    assert "\n" not in reason
    assert not re.search(r"\w+Error", reason)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_an_image_that_is_cut_anywhere_has_a_reason_or_is_read(form):
    """Never a traceback, never an empty reason."""
    whole = encoded(picture(1, 40, 30), form)
    for end in range(0, len(whole), max(len(whole) // 12, 1)):
        try:
            read_picture(whole[:end])
        except Exception as error:  # decoders raise a dozen kinds
            reason = reason_of(error)
            assert len(reason) > 4
            assert "\n" not in reason


def test_a_record_that_cannot_be_unpacked_costs_itself_only(tmp_path):
    good = {"image": encoded(picture(0)), "label": 1}
    write_records(tmp_path / "a.array_record", [good, {"picture": b"x"}, good])
    source = make_source(
        data_config(source="array_record", path=str(tmp_path / "a.array_record")), "all"
    )
    assert source[0]["label"] == source[2]["label"] == 1
    with pytest.raises(Exception, match="a record without an image: a msgpack map with picture"):
        source[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folders_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    (tmp_path / "closed").mkdir(mode=0)
    source = make_source(data_config(path=str(tmp_path)), "all")
    assert source.left_out.count("folders that cannot be read (Permission denied)") == 1


def test_names_that_are_no_utf8_in_messages(tmp_path, capsys):
    strange = tmp_path / os.fsdecode(b"caf\xe9")
    write_tar(tmp_path / os.fsdecode(b"\xff.tar"), [("1.txt", b"")])
    for read, path, shown in (
        (_source("folder"), strange, "caf\\xe9"),
        (_source("webdataset"), strange, "caf\\xe9"),
        (_source("webdataset"), tmp_path / "*.tar", "\\xff.tar"),
        (read_record, strange, "caf\\xe9"),
        (Latents, strange, "caf\\xe9"),
        (read_basis, strange, "caf\\xe9"),
    ):
        assert ended_by(lambda read=read, path=path: read(path), "") == 2
        line = capsys.readouterr().err
        assert shown in line
        assert line.count("\n") == 1
