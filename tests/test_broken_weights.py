"""Every reader of weights, dozens of broken files each: one line, with what it is and where."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from data_files import encoded, picture
from test_broken_inputs import BROKEN as ANYTHING
from test_broken_inputs import check
from weights import error_of

from efae_jax import load
from efae_jax.__main__ import main
from efae_jax.basis import read_basis_file
from efae_jax.convert import files, read_model, sketch, sources
from efae_jax.convert.inception import read_inception
from efae_jax.convert.perceptual import read_lpips, read_vgg16
from efae_jax.warm_start import read_autoencoder

WHOLE = safetensors.numpy.save({"encoder.mid.x": np.zeros((4, 4), np.float32)})


def header(content, data=b""):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content)) + content + data


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"hello")
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.safetensors"))
    return buffer.getvalue()


# What it is -> (content, a part of the message)
NAMED = {
    "empty": (b"", "an empty file"),
    "lfs": (ANYTHING["lfs pointer"], "a Git LFS pointer: `git lfs pull` fetches"),
    "html": (b"\n<!DOCTYPE html>\n<html><head>x", "a web page: download the file itself"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
    "json": (b'{"a": [1, 2]}', "a JSON file"),
    "large json": (b'{"a": [' + b"1, " * 5000 + b"1]}", "a JSON file"),
    "index": (b'{"weight_map": {"a": "b"}}', "the index of weights in several files"),
    "yaml": (b"model:\n  target: ldm.models.AutoencoderKL\n", "a text file"),
    "text": ("Entry not found: caf\u00e9".encode(), "a text file"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(50), "an ONNX file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "msgpack": (b"\x82\xa6params\x81\xa7encoder" + bytes(50), "a msgpack file"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(50), "a TensorFlow Lite file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip: unpack it"),
    "bzip2": (b"BZh91AY&SY" + bytes(50), "compressed by bzip2"),
    "xz": (b"\xfd7zXZ\0" + bytes(50), "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "compressed by zstd"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive"),
    "rar": (b"Rar!\x1a\x07" + bytes(50), "a RAR archive"),
    "tar": (tar(), "a tar archive"),
    "zip of files": (zipped(["a/x.safetensors", "b.txt"]), "a zip archive of 2 files (a/x.safe"),
    "npy": (b"\x93NUMPY\x01\0v\0{'descr'" + bytes(50), "a .npy file"),
    "image": (encoded(picture(0)), "a file that begins with"),
    "zeros": (bytes(5000), "zeros"),
    "pickled list": (pickle.dumps([1, 2]), "holds a list, not a state dict"),
    "pickled model": (b"\x80\x02cnets\nNet\n)\x81.", "torch.save(model.state_dict(), FILE)"),
    "huge header": (struct.pack("<Q", 2**60) + b"{}", "states a header of 1,152,921"),
    "header beyond the end": (struct.pack("<Q", 900) + b"{}", "a header of 900 bytes"),
    "header no json": (header(b"{a}"), "its header is no JSON"),
    "header nested": (header(b'{"a":' * 50_000), "its header is no JSON"),
    "header no utf-8": (header(b'{"\xff": 1}'), "its header is no text in UTF-8"),
    "name twice": (header(b'{"a": 1, "a": 2}'), "its header names a twice"),
    "entry is a list": (header({"a": [1]}), "a needs dtype, shape and data_offsets"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [2]}}), "a needs dtype, shape"),
    "odd offsets": (header({"a": entry(data_offsets=[0])}, bytes(8)), "a needs dtype, shape"),
    "no type": (header({"a": entry(dtype="X9")}, bytes(8)), "type X9, which is not read; allowed"),
    "type is a list": (header({"a": entry(dtype=["F32"])}, bytes(8)), "which is not read"),
    "shape is a text": (header({"a": entry(shape="2")}, bytes(8)), "a shape that is none"),
    "negative": (header({"a": entry(shape=[-2])}, bytes(8)), "sizes that are no sizes"),
    "true": (header({"a": entry(shape=[True])}, bytes(8)), "sizes that are no sizes"),
    "wrong size": (header({"a": entry(shape=[3])}, bytes(8)), "a of float32 (3,) states 8 bytes"),
    "cut": (header({"a": entry()}, bytes(7)), "a reaches to byte 8 of the 7"),
    "gap": (header({"a": entry(data_offsets=[4, 12])}, bytes(12)), "overlap or leave gaps"),
    "overlap": (
        header({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
        "overlap or leave gaps",
    ),
    "more": (header({"a": entry()}, bytes(9)), "take 8 of 9 bytes"),
    "metadata": (header({"__metadata__": [1]}), "__metadata__ is no JSON object"),
}
SIZES = sorted({*range(0, len(WHOLE), max(len(WHOLE) // 9, 1)), 1, 8, 9, len(WHOLE) - 1})
CUT = {f"cut at {n}": (WHOLE[:n], "") for n in SIZES}
RANDOM = {f"random {seed}": (np.random.default_rng(seed).bytes(3000), "") for seed in range(4)}
OTHERS = {name: (content, "") for name, content in ANYTHING.items() if name != "npz"}
BROKEN = {**OTHERS, **RANDOM, **CUT, **NAMED}


def in_folder(name, read):
    """`read` of a folder with a config, and the file under that name."""

    def inside(path):
        folder = path.with_name(path.name + ".d")
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        (folder / name).write_bytes(path.read_bytes())
        return read(folder)

    return inside


def half(path):
    return sources.read_source(path.rename(path.with_name("broken_decoder.pth")))


READERS = {
    "state dict": files.read_state_dict,
    "source": sources.read_source,
    "model": read_model,
    "load": load,
    "key": lambda path: sources.read_source(f"{path}::ema"),
    "half": half,
    "folder": in_folder("diffusion_pytorch_model.safetensors", sources.read_source),
    "shard": in_folder("diffusion_pytorch_model-00001-of-00001.bin", sources.read_source),
    "start": lambda path: read_autoencoder(None, str(path)),
    "inception": read_inception,
    "vgg16": read_vgg16,
    "lpips": lambda path: read_lpips(path=path),
    "disentangler": sketch.read,
    "basis": read_basis_file,
}
# One file that is good for nothing here has no need to be damaged; and .npy is a basis' own.
SAYS_MORE = {("vgg16", "pickled list"), ("lpips", "pickled list"), ("basis", "npy")}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", BROKEN)
def test_broken_weights_are_one_line(tmp_path, reader, content):
    path = tmp_path / "broken"
    data, expected = BROKEN[content]
    path.write_bytes(data)
    message = error_of(READERS[reader], path)
    check(message, path)
    if (reader, content) not in SAYS_MORE:
        assert expected in message


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"folder", "shard", "half"}))
def test_no_file_and_a_folder(tmp_path, reader):
    assert "broken" in error_of(READERS[reader], tmp_path / "broken")
    (tmp_path / "broken").mkdir()
    assert "broken" in error_of(READERS[reader], tmp_path / "broken")


@pytest.mark.parametrize("path", ["", "a\0b", "~nobody-has-this-name/x", "file://elsewhere/x"])
def test_paths_that_are_none(path):
    for reader in (read_model, load):
        assert error_of(reader, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    (tmp_path / "x.safetensors").chmod(0)
    assert "Permission denied" in error_of(sources.read_source, tmp_path / "x.safetensors")


def test_commands_end_in_one_line(tmp_path, capsys):
    strange = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    strange.write_bytes(WHOLE[:50])
    for args in (["import", str(strange), str(tmp_path / "w")], ["export", str(strange), "x"]):
        assert main(args) == 2
        error = capsys.readouterr().err
        assert "caf\\xe9.safetensors is a truncated or damaged safetensors file" in error
        assert error.count("\n") == 1
        assert not re.search("Error|Traceback", error)
