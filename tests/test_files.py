"""Files of weights: recognised by content, refused when damaged, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import assert_same_bytes, error_of

from efae_jax.convert import files, torch_arrays
from efae_jax.errors import UserError


def small():
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "n": np.array(3.0, np.float32),
    }


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npz_compressed", "npz_prefixed"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_files_are_recognised_by_content(kind, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    with path.open("wb") as file:
        if kind == "safetensors":
            file.write(
                safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in small().items()})
            )
        elif kind == "npz":
            np.savez(file, **small())
        elif kind == "npz_compressed":
            np.savez_compressed(file, **small())
        else:
            named = {f"sd/{k}": v for k, v in small().items()}
            np.savez(file, **named, **{"in/x": np.zeros(3), "out/y": np.zeros(4)})
    read = files.read_state_dict(path)
    assert read.keys() == small().keys()
    for name, value in small().items():
        np.testing.assert_array_equal(read[name], value)
        assert read[name].dtype == value.dtype


def test_arrays_are_written_by_value_however_they_lie_in_memory(tmp_path):
    files.write_model(tmp_path / "small.safetensors", small(), {})
    read = files.read_state_dict(tmp_path / "small.safetensors")
    assert_same_bytes(read, small())


def test_strangers_among_prefixed_names_are_kept_to_be_reported(tmp_path):
    np.savez(tmp_path / "x.npz", **{"sd/a": np.zeros(1), "b": np.zeros(1), "in/c": np.zeros(1)})
    assert files.read_state_dict(tmp_path / "x.npz").keys() == {"a", "b"}


def npy(shape, data, dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def promises_more_than_there_is():
    """An archive whose member states, as its array does, 4,000 bytes more than follow."""
    whole = zipped([("a.npy", npy("(1000,)", b""))], zipfile.ZIP_STORED)
    place = whole.index(b"PK\x01\x02") + 20
    size = struct.unpack_from("<I", whole, place)[0] + 4000
    return whole[:place] + struct.pack("<II", size, size) + whole[place + 8 :]


def tensors_file(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "(0 bytes) is neither"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is neither a safetensors, npz nor pickle file"),
        (struct.pack("<Q", 2**62) + b"{}", "safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "safetensors file"),
        (struct.pack("<Q", 9) + b"{not json", "safetensors file"),
        (
            tensors_file({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            "safetensors file",
        ),
        (
            tensors_file({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
            "safetensors file",
        ),
        (
            tensors_file({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}) + b"0",
            "a is of type F4, which is not read; allowed: F64,",
        ),
        (zipped([("a.npy", npy("(1000000000000,)", b"0000"))]), "states 4000000000000 bytes"),
        (zipped([("a.npy", npy("(-2, -2)", bytes(16)))]), "zip file"),
        (zipped([("a.npy", npy("(2,)", bytes(12)))]), "states 8 bytes"),
        (zipped([("a.npy", b"\x93NUMPY\x03\x00" + bytes(20))]), "npy version"),
        (zipped([("a.npy", b"not an array")]), "zip file"),
        (zipped([("a.npy", npy("(2,", bytes(8)))]), "zip file"),
        (promises_more_than_there_is(), "damaged zip file"),
        (zipped([("a.npy", npy("(2,)", bytes(8)).replace(b"{", b"{{"))]), "zip file"),
        (zipped([("a.npy", npy("(2,)", bytes(8)))])[:-30] + bytes(30), "zip file"),
        (zipped([("read.me", b"hello")]), "1 files (read.me), none of them an array"),
        (
            zipped([("read.me", b"hello"), ("a.npy", npy("(1,)", bytes(4)))]),
            "'read.me', which is no array",
        ),
        (zipped([("a.npy", npy("(1,)", bytes(4))), ("a", b"")]), "two arrays of the same name"),
    ],
)
def test_damaged_and_foreign_files_end_in_one_clear_line(content, expected, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    message = error_of(files.read_state_dict, path)
    assert expected in message
    assert str(path) in message


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    path.write_bytes(zipped([("a.npy", npy("(1000000,)", bytes(4_000_000)))]))
    assert files.read_state_dict(path)["a"].shape == (1_000_000,)
    monkeypatch.setattr(torch_arrays, "FREE", 10**6)
    assert "refused" in error_of(files.read_state_dict, path)


def test_missing_files_and_folders_are_named(tmp_path):
    assert "No such file" in error_of(files.read_state_dict, tmp_path / "nothing.npz")
    assert "is a folder" in error_of(files.read_state_dict, tmp_path)


WHOLE = {
    "safetensors": safetensors.numpy.save({"a": np.arange(40, dtype=np.float32)}),
    "npz": zipped([("a.npy", npy("(40,)", np.arange(40, dtype=np.float32).tobytes()))]),
}


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_any_truncation_is_an_error(kind, data, tmp_path_factory):
    whole = WHOLE[kind]
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    error_of(files.read_state_dict, path)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_damage_anywhere_raises_nothing_but_a_user_error(kind, data, tmp_path_factory):
    content = bytearray(WHOLE[kind])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        tensors = files.read_state_dict(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 160
