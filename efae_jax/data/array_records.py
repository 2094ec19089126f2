"""ArrayRecord files of images.

A record is a msgpack map: 'image', the bytes of an image file (any format that Pillow reads) or
of an .npy file with a uint8 array [H, W, C]; 'label', a number, or a text that the table of class
names beside the files numbers (0 if missing). Other keys are ignored. Records of other programs
are read as well: the bytes of an image file alone, and TensorFlow's `tf.train.Example` with an
image under one of `IMAGE_KEYS`.
"""

from __future__ import annotations

import io
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from efae_jax.data import labels
from efae_jax.data.bad_image import BadImageError
from efae_jax.data.labels import Table, Tabled
from efae_jax.data.left_out import LeftOut
from efae_jax.data.splits import Source, files_of, hold_out, with_absent
from efae_jax.errors import UserError
from efae_jax.paths import is_remote, printable

_NPY = b"\x93NUMPY"
_PNG = b"\x89PNG\r\n\x1a\n"  # its first byte begins a map in msgpack, too
IMAGE_KEYS = ("image", "image/encoded", "image_raw", "encoded", "jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "image/class/label", "cls", "class")
CLASSES = "classes"  # under this name the JSON beside a cache keeps the table
# What np.save writes of an array of numbers in C order.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][a-z]\d+)', 'fortran_order': False, "
    rb"'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)


def pack(record: Mapping[str, Any]) -> bytes:
    """A record as a msgpack map, its arrays as the bytes of .npy files.

    Texts may hold bytes that are no UTF-8, as names of files do, as Python's surrogate escapes.
    """
    return msgpack.packb(
        {k: _npy(v) if isinstance(v, np.ndarray) else v for k, v in record.items()},
        unicode_errors="surrogateescape",
    )


def unpack(data: bytes) -> dict[str, Any]:
    """The record that `pack` was given."""
    record = msgpack.unpackb(data, unicode_errors="surrogateescape")
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


def read_image(data: bytes) -> dict[str, Any]:
    """{"image", "label"} of a record of any of the forms above.

    Raises:
      BadImageError: a record of another form, or without an image.
    """
    if data.startswith(_PNG) or not data:
        return {"image": data, "label": None}
    first = data[0]
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        try:
            record = unpack(data)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise BadImageError(f"a record that is no msgpack map: {error}") from error
        return _picked(record, "msgpack map")
    if data[:1] == b"\n" and (record := _tf_example(data)) is not None:
        return _picked(record, "tf.train.Example")
    return {"image": data, "label": None}  # whether it is an image, Pillow says


def _picked(record: Mapping[str, Any], form: str) -> dict[str, Any]:
    image = next((record[key] for key in IMAGE_KEYS if record.get(key) is not None), None)
    if image is None:
        names = ", ".join(map(str, [*record][:8]))
        raise BadImageError(
            f"a record without an image: a {form} with {names or 'nothing'}; looked for "
            f"{', '.join(IMAGE_KEYS)}"
        )
    label = next((record[key] for key in LABEL_KEYS if record.get(key) is not None), None)
    label = record.get("label_text") or label  # of a cache: a text without a number
    if not isinstance(image, bytes | np.ndarray):
        raise BadImageError(f"a record whose image is no bytes: {type(image).__name__}")
    return {"image": image, "label": label}


def _tf_example(data: bytes) -> dict[str, Any] | None:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # which needs no TensorFlow

    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError:
        return None
    found = {}
    for name, feature in features.items():
        if kind := feature.WhichOneof("kind"):
            values = list(getattr(feature, kind).value)
            found[name] = values[0] if len(values) == 1 else values
    return found or None


class ArrayRecords(Tabled):
    """The records of several files, one file after the other.

    Args:
      files: in order.
      table: of the class names; what lies beside the files unless given.
    """

    def __init__(self, files: list[str], table: Table | None = None):
        for file in files:
            _check(file)
        self.files = files
        self.left_out = LeftOut()
        self.table = _table(files[0]) if table is None else table
        self._readers = [ArrayRecordDataSource([file]) for file in files]
        self._ends = list(accumulate(len(reader) for reader in self._readers))

    def _locate(self, index: int) -> tuple[int, int]:
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, position = self._locate(index)
        record = read_image(self._readers[file][position])
        return {"image": record["image"], **self.table.record(labels.parse(record["label"]))}

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
    if os.path.isdir(file):
        raise UserError(
            f"data.path: {printable(file)} is a folder; give its files: "
            f"'{printable(file)}/*.array_record'"
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


def _table(file: str) -> Table:
    """The class names that `cache` keeps in SPLIT.json beside its shards, or those of another
    table beside the file (`labels.read_table`)."""
    path = Path(file)
    cached = path.with_name(re.sub(r"-\d+-of-\d+$", "", path.stem) + ".json")
    if cached.stem != path.stem and cached.exists():
        try:
            names = json.loads(cached.read_text(encoding="utf-8")).get(CLASSES, [])
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{cached}: the description of a cache, damaged ({error}); write the cache again"
            ) from error
        if names:
            return Table(names)
    return labels.read_table(path.parent) or Table()


def has_splits(config: Any) -> bool:
    """Whether the path names the splits apart."""
    return "{split}" in config.path


def open_array_records(config: Any, split: str) -> Source:
    """The files data.path for a split; '{split}' in it stands for the split's name."""
    if not has_splits(config):
        return hold_out(_opened(config.path), split, config.test_fraction)
    name = config.train_split if split == "train" else config.test_split
    return _opened(config.path.replace("{split}", name))


def _opened(path: str) -> ArrayRecords:
    return with_absent(ArrayRecords(files_of(path, "ArrayRecord file")), path)
