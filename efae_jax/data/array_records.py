"""ArrayRecord files of images.

A record is a msgpack map: 'image', the bytes of an image file (any format that Pillow reads) or
of an .npy file with a uint8 array [H, W, C]; 'label', an integer (0 if missing). Other keys are
ignored.
"""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from efae_jax.data.splits import files_of, hold_out
from efae_jax.errors import UserError
from efae_jax.paths import is_remote

_NPY = b"\x93NUMPY"
# What np.save writes of an array of numbers in C order.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][a-z]\d+)', 'fortran_order': False, "
    rb"'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)


def pack(record: Mapping[str, Any]) -> bytes:
    """A record as a msgpack map, its arrays as the bytes of .npy files."""
    return msgpack.packb(
        {k: _npy(v) if isinstance(v, np.ndarray) else v for k, v in record.items()}
    )


def unpack(data: bytes) -> dict[str, Any]:
    """The record that `pack` was given."""
    record = msgpack.unpackb(data)
    return {
        k: _from_npy(v) if isinstance(v, bytes) and v.startswith(_NPY) else v
        for k, v in record.items()
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _from_npy(data: bytes) -> np.ndarray:
    # np.load parses the header as Python, for which Python 3.11 fails now and then in threads
    # ("AST constructor recursion depth mismatch").
    if header := _HEADER.match(data):
        shape = tuple(int(n) for n in header[2].split(b",") if n.strip())
        values = np.frombuffer(data, header[1].decode(), offset=header.end())
        return values.reshape(shape).copy()
    return np.load(io.BytesIO(data), allow_pickle=False)


def write_records(
    path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]], *, compress: bool = True
) -> int:
    """Writes packed records to a file, each readable on its own; returns their number."""
    count = 0
    options = "group_size:1" if compress else "group_size:1,uncompressed"
    writer = ArrayRecordWriter(os.fspath(path), options)
    try:
        for record in records:
            writer.write(pack(record))
            count += 1
    finally:
        writer.close()
    return count


def write_array_record(path: str, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records {'image': encoded bytes or uint8 array [H, W, C], 'label': int} to a file.

    The file appears under its name when it is complete. Returns the number of records.
    """
    partial = f"{path}.partial"
    count = write_records(
        partial, ({"image": r["image"], "label": int(r.get("label", 0))} for r in records)
    )
    os.replace(partial, path)
    return count


class ArrayRecords:
    """The records of several files, one file after the other."""

    num_classes = 0

    def __init__(self, files: list[str]):
        for file in files:
            _check(file)
        self.files = files
        self._readers = [ArrayRecordDataSource([file]) for file in files]
        self._ends = list(accumulate(len(reader) for reader in self._readers))

    def _locate(self, index: int) -> tuple[int, int]:
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, position = self._locate(index)
        record = unpack(self._readers[file][position])
        return {"image": record["image"], "label": record.get("label", 0)}

    def key(self, index: int) -> str:
        file, position = self._locate(index)
        return f"{os.path.basename(self.files[file])}[{position}]"

    def name(self, index: int) -> str:
        file, position = self._locate(index)
        return f"{self.files[file]}[{position}]"


def _check(file: str) -> None:
    if is_remote(file):  # on which its reader hangs
        raise UserError(
            f"data.path: {file}: ArrayRecord files are read from disks only; copy them (gcloud "
            "storage cp) or mount the bucket (gcsfuse); folders and tar shards are read from there"
        )
    reader = ArrayRecordReader(file)
    empty = reader.num_records() == 0  # so it says of a damaged file, too
    try:
        reader.close()
    except RuntimeError as error:
        raise UserError(
            f"data.path: {file!r} is damaged or no ArrayRecord file: {error}"
        ) from error
    if empty:
        raise UserError(f"data.path: {file!r} is empty, damaged or no ArrayRecord file")


def open_array_records(config: Any, split: str):
    """The files data.path for a split; '{split}' in it stands for the split's name."""
    if "{split}" in config.path:
        name = config.train_split if split == "train" else config.test_split
        return ArrayRecords(files_of(config.path.replace("{split}", name), "ArrayRecord file"))
    source = ArrayRecords(files_of(config.path, "ArrayRecord file"))
    return hold_out(source, split, config.test_fraction)
