"""Arrays of the calls that rebuild tensors in pickles, PyTorch's and NumPy's.

What a file states about a tensor is checked against the bytes that are there before anything is
made of it.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from efae_jax.convert import pickles
from efae_jax.convert.pickles import Call, DamagedError, Name, Persistent
from efae_jax.errors import UserError

# The first pickle of the format before zip archives, and its version.
LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
# Weights hardly compress, and few share memory: stated sizes beyond this are a bomb.
FREE, RATIO = 2**30, 100
_MAX_DIMENSIONS = 32

_TYPES = {
    "float64": np.float64,
    "double": np.float64,
    "float32": np.float32,
    "float": np.float32,
    "float16": np.float16,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int64": np.int64,
    "long": np.int64,
    "int32": np.int32,
    "int": np.int32,
    "int16": np.int16,
    "short": np.int16,
    "int8": np.int8,
    "char": np.int8,
    "uint8": np.uint8,
    "byte": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complexfloat": np.complex64,
    "complex128": np.complex128,
    "complexdouble": np.complex128,
}
# key of a storage -> its bytes
Storages = Callable[[str], np.ndarray]


class Arrays:
    """Makes arrays of calls that rebuild tensors, and of nothing else."""

    def __init__(self, storage: Storages, path: Path):
        self._storage, self._path = storage, path
        self._bytes: dict[Any, np.ndarray] = {}
        self._inner: dict[int, tuple[Call, Persistent]] = {}
        self._total = 0

    def array(self, value: Any) -> np.ndarray | None:
        """The array, or None if the value is none."""
        if not isinstance(value, Call) or not isinstance(value.function, Name):
            return None
        module, name, args = value.function.module, value.function.name, value.args
        if module == "torch._utils":
            if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
                return self._tensor(*args[:4], *(args[6:7] if name.endswith("3") else ()))
            if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return self.array(args[0])
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return self.array(Call(args[0], args[2]))
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct" and value.state is not None:
                _, shape, kind, fortran, data = value.state
                return self._numpy(shape, kind, data, "F" if fortran else "C")
            if name == "scalar":
                return self._numpy((), *args, "C")
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            data, kind, shape, order = args
            return self._numpy(shape, kind, data, order)
        return None

    def _tensor(
        self, where: Any, offset: Any, shape: Any, strides: Any, kind: Any = None
    ) -> np.ndarray:
        if isinstance(where, Call) and _is(where.function, "torch.storage", "_load_from_bytes"):
            where = self._pickled_storage(where)
        if not isinstance(where, Persistent):
            raise DamagedError("a tensor's storage is none")
        _, storage_kind, key, _, count, *view = where.id
        if any(part is not None for part in view):
            raise DamagedError("a storage is a view of another, which is not supported")
        if _key(key) not in self._bytes:
            self._bytes[key] = self._storage(key)
        dtype = _storage_type(storage_kind) if kind is None else _dtype(kind.name)
        data = self._bytes[key]
        numbers = (offset, count, *shape, *strides)
        if any(not _is_size(n) for n in numbers):
            raise DamagedError("a tensor states sizes that are no sizes")
        if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
            raise DamagedError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * dtype.itemsize > data.size:
            raise DamagedError(f"a tensor reaches beyond the {data.size} bytes of its storage")
        self._count(shape, dtype)
        if 0 in shape:
            return np.zeros(shape, dtype)
        flat = data[: data.size // dtype.itemsize * dtype.itemsize]
        if dtype.itemsize == 1:  # whose strides NumPy knows of types of its own only
            steps = np.lib.stride_tricks.as_strided(flat[offset:], shape, strides, writeable=False)
            return steps.view(dtype)
        flat, steps = flat.view(dtype), [s * dtype.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)

    def _pickled_storage(self, call: Call) -> Persistent:
        """A storage in a file of its own, as Python's pickle takes tensors."""
        if id(call) not in self._inner:
            data = io.BytesIO(_bytes(call.args[0]))
            if pickles.read(data) != LEGACY_MAGIC:
                raise DamagedError("a storage is not as torch.save writes it")
            value, storages = legacy(data, self._path)
            if not isinstance(value, Persistent):
                raise DamagedError("a storage is none")
            kind, key, *others = value.id[1:]
            mine = f"inner/{len(self._inner)}"
            self._bytes[mine] = storages(_key(key))
            # The call is kept, so that its id stays its own.
            self._inner[id(call)] = (call, Persistent(("storage", kind, mine, *others)))
        return self._inner[id(call)][1]

    def _numpy(self, shape: Any, kind: Any, data: Any, order: str) -> np.ndarray:
        dtype = _numpy_type(kind)
        data = _bytes(data)
        if len(shape) > _MAX_DIMENSIONS or any(not _is_size(n) for n in shape):
            raise DamagedError("an array states sizes that are no sizes")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise DamagedError(f"an array states {math.prod(shape)} numbers and has another amount")
        self._count(shape, dtype)
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    def _count(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._total += math.prod(shape) * dtype.itemsize
        require_bounded(self._total, self._path)


def legacy(file: IO[bytes], path: Path) -> tuple[Any, Storages]:
    """The value, and the storages, of the format before zip archives, behind its magic."""
    version, system = pickles.read(file), pickles.read(file)
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise DamagedError("of an unknown version")
    if system.get("little_endian") is not True:
        raise UserError(f"{path} was written on a big-endian machine, which is not read")
    value = pickles.read(file)
    keys = pickles.read(file)
    sizes = dict(_legacy_storages(value))
    storages = {_key(key): _legacy_storage(file, sizes[key]) for key in keys}
    return value, storages.__getitem__


def _legacy_storages(value: Any) -> list[tuple[Any, int]]:
    """(key, bytes per number) of every storage that a value refers to."""
    found, todo, seen = [], [value], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Persistent):
            _, kind, key, *_ = node.id
            found.append((_key(key), _storage_type(kind).itemsize))
        elif isinstance(node, dict):
            todo += [*node, *node.values()]
        elif isinstance(node, list | tuple):
            todo += node
        elif isinstance(node, Call):
            todo += [node.function, node.args, node.state]
    return found


def _legacy_storage(file: IO[bytes], itemsize: int) -> np.ndarray:
    (count,) = struct.unpack("<q", file.read(8))
    size = count * itemsize
    here = file.tell()
    if not 0 <= size <= file.seek(0, 2) - here:
        raise DamagedError(f"a storage states {size} bytes, beyond the end of the file")
    file.seek(here)
    return np.frombuffer(file.read(size), np.uint8)


def _key(key: Any) -> str:
    # Looked up in dictionaries: see `pickles` on what is hashed.
    if not isinstance(key, str):
        raise DamagedError("a storage's key is no text")
    return key


def _bytes(data: Any) -> bytes:
    """Bytes in the forms that pickles of all protocols give them."""
    if isinstance(data, Call) and _is(data.function, "_codecs", "encode"):
        data = data.args[0]  # as protocols 0 to 2 write them
    elif isinstance(data, Call) and getattr(data.function, "name", "") in ("bytes", "bytearray"):
        data = data.args[0] if data.args else b""
        if isinstance(data, Call):
            return _bytes(data)
    if isinstance(data, str):
        data = data.encode("latin-1")  # which also is a string of Python 2
    if not isinstance(data, bytes | bytearray):
        raise DamagedError("numbers that are no bytes")
    return bytes(data)


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**62


def require_bounded(size: int, path: Path) -> None:
    """Raises `UserError` for a file that would unpack to far more than weights do."""
    packed = path.stat().st_size
    if size > FREE + RATIO * packed:
        raise UserError(f"{path} would unpack {packed} bytes to {size}: refused")


def _is(value: Any, module: str, name: str) -> bool:
    return isinstance(value, Name) and (value.module, value.name) == (module, name)


def _storage_type(kind: Any) -> np.dtype:
    """`torch.FloatStorage`, or untyped bytes (whose tensors state their type)."""
    if kind.name == "UntypedStorage":
        return np.dtype(np.uint8)
    return _dtype(kind.name.removesuffix("Storage").lower())


def _dtype(name: str) -> np.dtype:
    if name not in _TYPES:
        raise DamagedError(f"tensors of type {name} are not read")
    return np.dtype(_TYPES[name])


def _numpy_type(kind: Any) -> np.dtype:
    """dtype("f4") with the state (version, byte order, ...)."""
    if not isinstance(kind, Call) or not _is(kind.function, "numpy", "dtype"):
        raise DamagedError("an array without a type")
    name, order = kind.args[0], (kind.state or (None, "|"))[1]
    if not isinstance(name, str) or not isinstance(order, str):
        raise DamagedError("an array whose type has no name")
    if name[:1] not in "fiubc" or order not in ("<", "|", "="):
        raise DamagedError(f"arrays of type {order}{name} are not read")
    return np.dtype(name)
