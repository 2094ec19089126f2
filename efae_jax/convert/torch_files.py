"""State dicts in the files of `torch.save`, of any age, and in bare pickles of arrays.

No code in them is run (see `pickles`), and PyTorch is not needed.
"""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efae_jax.convert import layout, pickles, wrappers
from efae_jax.convert.pickles import Call, DamagedError
from efae_jax.convert.torch_arrays import LEGACY_MAGIC, Arrays, Storages, legacy, require_bounded
from efae_jax.errors import UserError

_REBUILDS = re.compile(r"_rebuild_|_reconstruct$|_frombuffer$")
_MOST_COUNTED = 1_000_000


class Saved(NamedTuple):
    """What was read.

    Attributes:
      tensors: of one dictionary of the file.
      key: what of the user's key does not name a dictionary: a prefix of names, or None.
      outside: start of a path of keys -> tensors that lie elsewhere in the file.
    """

    tensors: dict[str, np.ndarray]
    key: str | None
    outside: dict[str, int]


def read_zip(path: Path, key: str | None = None) -> Saved:
    """Of a zip archive of `torch.save`; memory-mapped where not compressed.

    Args:
      key: of the dictionary that is wanted, as for `wrappers.choose_mapping`.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickled = [name for name in members if name.split("/")[-1] == "data.pkl"]
        if len(pickled) != 1:
            raise UserError(f"{path} holds {len(pickled)} files data.pkl; expected one")
        folder = pickled[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not read")
        # Compressed by someone else than PyTorch: a bomb shows in the sizes.
        require_bounded(sum(m.file_size for m in members.values()), path)

        def storage(number: str) -> np.ndarray:
            if (name := f"{folder}data/{number}") not in members:
                raise DamagedError(f"it lacks {layout.printable(name)}")
            return _member(path, archive, members[name])

        with archive.open(pickled[0]) as file:
            return _saved(pickles.read(file), storage, path, key)


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or not member.file_size:
        return np.frombuffer(archive.read(member), np.uint8)
    with path.open("rb") as file:
        file.seek(member.header_offset)
        signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise DamagedError(f"no member at the stated place of {member.filename!r}")
    offset = member.header_offset + 30 + name + extra
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(member.file_size,))


def read_pickle(path: Path, key: str | None = None) -> Saved:
    """Of a bare pickle, or of `torch.save` before zip archives.

    Args:
      key: as for `read_zip`.
    """
    with path.open("rb") as file:
        value = pickles.read(file)
        if value != LEGACY_MAGIC:
            return _saved(value, _no_storage, path, key)
        value, storages = legacy(file, path)
    return _saved(value, storages, path, key)


def _no_storage(key: str) -> np.ndarray:
    raise DamagedError(f"there is no storage {key!r}")


def _saved(value: Any, storage: Storages, path: Path, key: str | None) -> Saved:
    whole = value
    value, key = wrappers.choose_mapping(value, key, layout.printable(str(path)))
    if not isinstance(value, dict):
        kind = "whole Python object" if isinstance(value, Call) else type(value).__name__
        raise UserError(
            f"{path} holds a {kind}, not a state dict (names and tensors); "
            "torch.save(model.state_dict(), FILE) writes one"
        )
    reader = Arrays(storage, path)
    tensors = {name: reader.array(entry) for name, entry in value.items()}
    strange = [
        # Anything else than text is not shown: a file could make it endless.
        layout.printable(name) if isinstance(name, str) else "(a key that is no text)"
        for name, array in tensors.items()
        if array is None or not isinstance(name, str)
    ]
    if strange and not wrappers.holds_weights(value):
        more = f" and {len(strange) - 10} more" if len(strange) > 10 else ""
        raise UserError(
            f"{path} holds no state dict: {', '.join(strange[:10])}{more}: no tensor; expected "
            "names and tensors, alone or under a key"
        )
    arrays = {n: a for n, a in tensors.items() if a is not None and isinstance(n, str)}
    return Saved(arrays, key, _outside(whole, value))


def _outside(whole: Any, chosen: dict[Any, Any]) -> dict[str, int]:
    """How many tensors lie under each key at the top of a file, but not where the chosen ones do.

    A tensor that several places hold counts once.
    """
    if not isinstance(whole, dict) or whole is chosen:
        return {}
    counts: dict[str, int] = {}
    seen = {id(chosen), *map(id, chosen.values())}
    for key, top in whole.items():
        todo, count = [top], 0
        while todo and len(seen) < _MOST_COUNTED:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, dict):
                todo += node.values()
            elif isinstance(node, list | tuple):
                todo += node
            elif isinstance(node, Call) and _REBUILDS.match(getattr(node.function, "name", "")):
                count += 1
        if count and isinstance(key, str):
            counts[f"{layout.printable(key)}."] = count
    return counts
