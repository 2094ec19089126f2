"""NumPy's npz and npy files, checked before anything is allocated."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from efae_jax.convert.pickles import DamagedError
from efae_jax.convert.torch_arrays import require_bounded
from efae_jax.errors import UserError

_PREFIX = "sd/"
_NOT_WEIGHTS = ("in/", "out/")


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz; of one with names `sd/...`, those, without that."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        require_bounded(sum(member.file_size for member in members), path)
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise UserError(f"{path} holds two arrays of the same name")
        tensors = {
            name: _read_member(archive, member, path)
            for name, member in zip(names, members, strict=True)
        }
    if any(name.startswith(_PREFIX) for name in tensors):
        return {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in tensors.items()
            if not name.startswith(_NOT_WEIGHTS)
        }
    return tensors


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(member) as file:
        if not member.filename.endswith(".npy"):
            raise UserError(f"{path} holds {member.filename!r}, which is no array")
        return read_array(file, member.filename, member.file_size, path)


def read_array(file: IO[bytes], name: str, file_size: int, path: Path) -> np.ndarray:
    """The array of an npy file of so many bytes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(file)
    else:
        raise DamagedError(f"{name!r} has npy version {version}")
    shape, fortran_order, dtype = header
    if dtype.hasobject:
        raise UserError(f"{path} holds Python objects in {name!r}; only arrays are read")
    # Compared before anything is allocated: the header may state any size.
    size = math.prod(shape) * dtype.itemsize
    if size != file_size - file.tell():
        raise DamagedError(f"{name!r} states {size} bytes and has another number")
    order = "F" if fortran_order else "C"
    return np.frombuffer(file.read(), dtype).reshape(shape, order=order)
