"""Files of weights: what they are is read from their content, never from their name.

Read: safetensors, NumPy's npz, and pickles (those of `torch.save`, and of plain arrays).
Written: safetensors, with a small JSON beside it that says how to build the model. No code
in a file is ever run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes  # noqa: F401  (gives NumPy the type name bfloat16, which safetensors asks for)
import numpy as np
import safetensors
import safetensors.numpy

from efae_jax.convert import torch_files
from efae_jax.errors import UserError

# The first instruction of a pickle of protocol 2 and later says so.
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5))
_NPZ_PREFIX = "sd/"
_NPZ_NOT_WEIGHTS = ("in/", "out/")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict, in PyTorch's layout, from a safetensors, npz or pickle file.

    Where names of an npz start with `sd/`, those are the weights, without the
    prefix, and `in/...` and `out/...` (inputs and outputs for tests) are not.

    Raises:
      UserError: the file is missing, unreadable, truncated, of another kind, or
        holds anything but plain arrays of the sizes that it states.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the file in it")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if start[8:9] == b"{":
        kind, read = "safetensors", _read_safetensors
    elif start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        kind, read = "zip", _read_zip
    elif start[:2] in _PICKLES:
        kind, read = "pickle", torch_files.read_pickle
    else:
        size = path.stat().st_size
        raise UserError(f"{path} ({size} bytes) is neither a safetensors, npz nor pickle file")
    try:
        return read(path)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    # Damaged bytes make the parsers of zip, npy and safetensors raise a dozen kinds of errors.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is a truncated or damaged {kind} file: {reason}") from error


def read_npy(path: str | Path) -> np.ndarray:
    """Reads the array of a .npy file.

    Raises:
      UserError: the file is missing, unreadable, truncated, or holds Python objects.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_npy(file, path.name, path.stat().st_size, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # as in `read_state_dict`
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is a truncated or damaged npy file: {reason}") from error


def description_path(path: str | Path) -> Path:
    """Where the JSON lies that travels with the weights file `path`."""
    return Path(path).with_suffix(".json")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Raises:
      UserError: it is not a JSON object.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(description).__name__}")
    return description


def json_text(value: Mapping[str, Any]) -> bytes:
    """A JSON file's content."""
    return (json.dumps(value, indent=2) + "\n").encode()


def safetensors_bytes(tensors: Mapping[str, np.ndarray], **metadata: str) -> bytes:
    """A safetensors file's content."""
    # The writer takes each array's memory as it lies.
    return safetensors.numpy.save(
        {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()},
        metadata={"format": "pt", **metadata},
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_state_dict` has read; of others, none."""
    with Path(path).open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def write_model(
    path: str | Path, tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]
) -> None:
    """Writes a safetensors file and the JSON beside it.

    Both are written in full under temporary names before either is renamed: no reader ever
    sees half a file.

    Raises:
      UserError: the name does not end in .safetensors, one of the two is there already, or the
        disk refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"cannot write {path}: the name must end in .safetensors")
    for place in (path, description_path(path)):
        if place.exists():
            raise UserError(f"cannot write {path}: {place} is there already; give another name")
    weights, text = safetensors_bytes(tensors), json_text(description)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _atomic(path) as weights_file, _atomic(description_path(path)) as json_file:
            weights_file.write_bytes(weights)
            json_file.write_bytes(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_new(path: str | Path, content: bytes) -> None:
    """Writes a new file, whole or not at all.

    Raises:
      UserError: it is there already, or the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"cannot write {path}: it is there already; give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _atomic(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_folder(path: str | Path, contents: Mapping[str, bytes]) -> None:
    """Writes a new folder of files, whole or not at all.

    Raises:
      UserError: it is there already and not empty, or the disk refuses.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"cannot write {path}: it is there already; give another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        pickled = any(name.split("/")[-1] == "data.pkl" for name in archive.namelist())
    return torch_files.read_zip(path) if pickled else _read_npz(path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        torch_files.require_bounded(sum(member.file_size for member in members), path)
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise UserError(f"{path} holds two arrays of the same name")
        tensors = {
            name: _read_member(archive, member, path)
            for name, member in zip(names, members, strict=True)
        }
    if any(name.startswith(_NPZ_PREFIX) for name in tensors):
        return {
            name.removeprefix(_NPZ_PREFIX): tensor
            for name, tensor in tensors.items()
            if not name.startswith(_NPZ_NOT_WEIGHTS)
        }
    return tensors


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(member) as file:
        if not member.filename.endswith(".npy"):
            raise UserError(f"{path} holds {member.filename!r}, which is no array")
        return _read_npy(file, member.filename, member.file_size, path)


def _read_npy(file: IO[bytes], name: str, file_size: int, path: Path) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"{name!r} has npy version {version}")
    shape, fortran_order, dtype = header
    if dtype.hasobject:
        raise UserError(f"{path} holds Python objects in {name!r}; only arrays are read")
    # Compared before anything is allocated: the header may state any size.
    size = math.prod(shape) * dtype.itemsize
    if size != file_size - file.tell():
        raise ValueError(f"{name!r} states {size} bytes and has another number")
    order = "F" if fortran_order else "C"
    return np.frombuffer(file.read(), dtype).reshape(shape, order=order)
