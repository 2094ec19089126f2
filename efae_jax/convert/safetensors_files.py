"""safetensors files: every number that the header states is checked before memory is touched.

A file is 8 bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape,
data_offsets), and the numbers. https://github.com/huggingface/safetensors describes it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from efae_jax.convert.pickles import DamagedError
from efae_jax.paths import printable

METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000  # the format's own limit
_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, memory-mapped.

    Raises:
      DamagedError: saying what is wrong with the file.
    """
    header, start = _header(path)
    header.pop(METADATA, None)
    size = path.stat().st_size - start
    data = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.zeros(0, np.uint8)
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        if not 0 <= begin <= end <= size:
            raise DamagedError(
                f"{printable(name)} reaches to byte {end:,} of the {size:,} that are there"
            )
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise DamagedError(
                f"{printable(name)} of {dtype.name} {shape} states {end - begin:,} bytes"
            )
        spans.append((begin, end))
        array = np.asarray(data[begin:end]).view(dtype).reshape(shape)
        tensors[name] = array if array.flags.aligned else array.copy()
    here = 0
    for begin, end in sorted(spans):
        if begin != here:
            raise DamagedError("its tensors overlap or leave gaps")
        here = end
    if here != size:
        raise DamagedError(f"its tensors take {here:,} of {size:,} bytes")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file carries beside its arrays.

    Raises:
      DamagedError: as `read`.
    """
    metadata = _header(path)[0].get(METADATA) or {}
    return {name: value for name, value in metadata.items() if isinstance(value, str)}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers start."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        there = path.stat().st_size - 8
        if length > min(there, _LARGEST_HEADER):
            raise DamagedError(f"it states a header of {length:,} bytes and has {there:,} in all")
        content = file.read(length)
    try:
        header = json.loads(content.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise DamagedError("its header is no text in UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise DamagedError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise DamagedError("its header is no JSON object")
    if not isinstance(header.get(METADATA) or {}, dict):
        raise DamagedError(f"{METADATA} is no JSON object")
    return header, 8 + length


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise DamagedError(f"its header names {printable(twice[:100])} twice")
    return made


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    shown = printable(name[:100])
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise DamagedError(f"{shown} needs dtype, shape and data_offsets in the header") from None
    if not isinstance(shape, list) or len(shape) > 32:
        raise DamagedError(f"{shown} has a shape that is none")
    if any(type(n) is not int or not 0 <= n < 2**62 for n in sizes):
        raise DamagedError(f"{shown} states sizes that are no sizes")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise DamagedError(
            f"{shown} is of type {printable(str(kind)[:40])}, which is not read; allowed: "
            f"{', '.join(_TYPES)}"
        )
    return np.dtype(_TYPES[kind]), tuple(shape), begin, end
