"""Files of weights: what they are is read from their content, never from their name.

Read: safetensors, NumPy's npz, and pickles (those of `torch.save`, and of plain arrays).
Written: safetensors, with a small JSON beside it that says how to build the model. No code
in a file is ever run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the type name bfloat16)
import numpy as np
import safetensors.numpy

from efae_jax.convert import npz_files, safetensors_files, torch_files, wrappers, wrong_files
from efae_jax.convert.pickles import DamagedError
from efae_jax.errors import UserError
from efae_jax.paths import printable

# The first instruction of a pickle of protocol 2 and later says so; before, what may be there.
_PICKLES = (
    *(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5)),
    b"}q\0",
    b"(dp",
    b"(lp",
    b"ccollections\nOrderedDict\n",
)
# What files of float8 with scales beside them call the scales.
_SCALES = re.compile(r"(?:.*[._])?(?:scale_weight|weight_scale|scale_input|input_scale|scaled_fp8)")


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: the state dict, in PyTorch's layout.
      ignored: how many tensors lay beside it, by the start of their names.
    """

    tensors: dict[str, np.ndarray]
    ignored: dict[str, int]


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict, in PyTorch's layout, from a safetensors, npz or pickle file.

    Where names of an npz start with `sd/`, those are the weights, without the
    prefix, and `in/...` and `out/...` (inputs and outputs for tests) are not.
    Numbers of 8 bits are widened to float32.

    Raises:
      UserError: the file is missing, unreadable, truncated, of another kind, or
        holds anything but plain arrays of the sizes that it states.
    """
    return _read(Path(path), None).tensors


def read_weights(path: str | Path, key: str | None = None) -> Weights:
    """Reads a model's state dict, without what is wrapped around it (`wrappers`).

    Args:
      path: of a file as for `read_state_dict`.
      key: under which the model lies, where the file holds several.

    Raises:
      UserError: as for `read_state_dict`, or several models, or no such key.
    """
    tensors, rest, outside = _read(Path(path), key)
    tensors, ignored = wrappers.choose_names(tensors, rest, printable(str(path)))
    return Weights(tensors, outside | ignored)


def _read(path: Path, key: str | None) -> torch_files.Saved:
    shown = printable(str(path))
    if path.is_dir():
        raise UserError(f"{shown} is a folder; give the file in it")
    try:
        with path.open("rb") as file:
            head = file.read(wrong_files.HEAD)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror}") from error
    if head[8:9] == b"{" and not head.startswith(b"version "):
        kind, read = "safetensors", lambda: _plain(safetensors_files.read(path), key)
    elif head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        kind, read = "zip", lambda: _read_zip(path, key)
    elif head.startswith(_PICKLES):
        kind, read = "pickle", lambda: torch_files.read_pickle(path, key)
    else:
        what, advice = wrong_files.describe(head, len(head) == size)
        raise UserError(
            f"{shown} ({size} bytes) is neither a safetensors, npz nor pickle file, but {what}: "
            f"{advice}"
        )
    try:
        saved = read()
    except UserError as error:
        known = str(path) in str(error) or shown in str(error)
        raise error if known else UserError(f"{shown}: {error}") from error
    except DamagedError as error:
        raise UserError(f"{shown} is a truncated or damaged {kind} file: {error}") from error
    except MemoryError as error:
        raise UserError(
            f"{shown} is a truncated or damaged {kind} file, or one that does not fit in this "
            f"machine's memory ({size} bytes)"
        ) from error
    # Damaged bytes make the parsers of zip, npy and pickles raise a dozen kinds of errors.
    except Exception as error:
        raise UserError(
            f"{shown} is a truncated or damaged {kind} file ({size} bytes): fetch it again"
        ) from error
    return saved._replace(tensors=_widened(saved.tensors, shown))


def _plain(tensors: dict[str, np.ndarray], key: str | None) -> torch_files.Saved:
    return torch_files.Saved(tensors, key, {})


def _widened(tensors: dict[str, np.ndarray], shown: str) -> dict[str, np.ndarray]:
    """float32 in the place of float8, which no model computes in."""
    small = [name for name, a in tensors.items() if a.dtype.name.startswith("float8")]
    if not small:
        return tensors
    if scales := [name for name in tensors if _SCALES.fullmatch(name)]:
        raise UserError(
            f"{shown} holds {tensors[small[0]].dtype.name} numbers with scales beside them "
            f"({len(scales)} tensors, such as {printable(scales[0])}), which are not read; give "
            "the model in float16, bfloat16 or float32"
        )
    return tensors | {name: tensors[name].astype(np.float32) for name in small}


def read_npy(path: str | Path) -> np.ndarray:
    """Reads the array of a .npy file.

    Raises:
      UserError: the file is missing, unreadable, truncated, or holds Python objects.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return npz_files.read_array(file, path.name, path.stat().st_size, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError:
        raise
    except DamagedError as error:
        raise UserError(f"{path} is a truncated or damaged npy file: {error}") from error
    except Exception as error:  # as in `_read`
        raise UserError(f"{path} is a truncated or damaged npy file") from error


def description_path(path: str | Path) -> Path:
    """Where the JSON lies that travels with the weights file `path`."""
    return Path(path).with_suffix(".json")


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
    return safetensors_files.read_metadata(Path(path))


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


def _read_zip(path: Path, key: str | None) -> torch_files.Saved:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        return torch_files.read_zip(path, key)
    if names and not any(name.endswith(".npy") for name in names):
        some = ", ".join(printable(name[:60]) for name in names[:3])
        raise UserError(
            f"{path} is a zip archive of {len(names)} files ({some}), none of them an array: "
            "unpack it, and give the file in it"
        )
    return _plain(npz_files.read(path), key)
