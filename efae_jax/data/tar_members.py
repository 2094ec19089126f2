"""The files in a tar archive, found from its headers alone, here or on object storage."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from efae_jax.data.bad_image import looks_like
from efae_jax.data.remote import Remote, reached
from efae_jax.paths import is_remote

REQUEST = 2**20  # bytes of an object that a request fetches while headers are looked for
_BLOCK = 512
_RECORD = 20 * _BLOCK  # what archives are padded to
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ\0": "unxz",
    b"BZh": "bunzip2",
}
_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_HARD_LINK, _SYMBOLIC_LINK, _FOLDER = b"1", b"2", b"5"


class ShardError(Exception):
    """A tar file that cannot be read to its end."""


class Member(NamedTuple):
    """A file in an archive: its name, and where its content lies."""

    name: str
    offset: int
    size: int


class Unusable(NamedTuple):
    """What an archive names and holds no content of: a link to nowhere, a device, a sparse file."""

    name: str
    why: str


def members(pread: Callable[[int, int], bytes], length: int) -> Iterator[Member | Unusable]:
    """The files in an uncompressed tar archive, from its headers.

    Reads ustar, GNU and pax names and sizes. A link is a file with the content that it leads to.
    Archives that were put one behind the other (`cat`, `tar -A`) are read to the end of the last.

    Args:
      pread: gives so many bytes of the file from an offset on.
      length: of the file.

    Raises:
      ShardError: where the file is damaged or cut short.
    """
    position, long_name, long_link, long_size = 0, None, None, None
    known, sparse = _Known(), False
    while position < length:
        header = pread(_BLOCK, position)
        if not header.strip(b"\0"):  # an end mark, or padding before another archive
            position = _after_zeros(pread, position + _BLOCK, length)
            continue
        kind, size = _check(header, position), _number(header[124:136])
        if long_size is not None and kind not in (_PAX, _GNU_LONG_NAME, _GNU_LONG_LINK):
            size, long_size = long_size, None
        start = position + _BLOCK
        if kind in (_HARD_LINK, _SYMBOLIC_LINK, _FOLDER):
            size = 0  # some writers state that of the target
        position = start + -(-size // _BLOCK) * _BLOCK
        if start + size > length:
            raise ShardError("it ends inside a member")
        if kind == _GNU_LONG_NAME:
            long_name = pread(size, start).rstrip(b"\0")
        elif kind == _GNU_LONG_LINK:
            long_link = pread(size, start).rstrip(b"\0")
        elif kind == _PAX:
            fields = _pax(pread(size, start))
            long_name, long_link = (
                fields.get(b"path", long_name),
                fields.get(b"linkpath", long_link),
            )
            sparse = any(field.startswith(b"GNU.sparse.") for field in fields)
            if b"size" in fields:
                long_size = _decimal(fields[b"size"])
        elif kind != _PAX_GLOBAL:
            prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
            name = header[:100].split(b"\0")[0]
            name = long_name or (prefix + b"/" + name if prefix else name)
            link, long_name, long_link = long_link, None, None
            text = name.decode("utf-8", "surrogateescape")
            if sparse:  # its content begins with a map of the holes
                sparse = False
                yield Unusable(text, "sparse members, which are no plain files")
            elif kind in b"0\0" + b"7":
                known.add(name, start, size)
                yield Member(text, start, size)
            elif kind in (_HARD_LINK, _SYMBOLIC_LINK):
                yield known.linked(kind, name, link or header[157:257].split(b"\0")[0])
            elif kind != _FOLDER:
                kind_name = kind.decode("latin-1")
                yield Unusable(text, f"members of type {kind_name!r}, which are no plain files")


class _Known:
    """Where the files of an archive lie, for the links that come after them."""

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._added: list[tuple[bytes, int, int]] = []

    def add(self, name: bytes, start: int, size: int) -> None:
        self._added.append((name, start, size))

    def linked(self, kind: bytes, name: bytes, link: bytes) -> Member | Unusable:
        # Paths are worked out where there is a link: hardly any archive has one.
        for known, start, size in self._added:
            self._places[posixpath.normpath(known)] = start, size
        self._added.clear()
        # The target of a symbolic link is relative to its own folder; of a hard link, to the root.
        folder = posixpath.dirname(name) if kind == _SYMBOLIC_LINK else b""
        place = self._places.get(posixpath.normpath(posixpath.join(folder, link)))
        text = name.decode("utf-8", "surrogateescape")
        if place is None:
            return Unusable(text, "links to what the shard does not hold before them")
        self.add(name, *place)
        return Member(text, *place)


def _after_zeros(pread: Callable[[int, int], bytes], position: int, length: int) -> int:
    """The first block from a position on that is not zeros, or the end."""
    while position < length:
        block = pread(min(_RECORD, length - position), position)
        if rest := block.lstrip(b"\0"):
            return position + (len(block) - len(rest)) // _BLOCK * _BLOCK
        position += len(block) or length
    return length


@contextmanager
def opened(path: str) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """What `members` takes of a file, here or on object storage."""
    if is_remote(path):
        remote = Remote(path)
        length = remote.size(path)
        block = [0, b""]

        def pread(size: int, offset: int) -> bytes:
            # A request takes as long as to read some 100 kB, so that each fetches more.
            start, content = block
            if not start <= offset <= offset + size <= start + len(content):
                end = min(offset + max(size, REQUEST), length)
                with reached(path):  # no damage to the shard, whose other samples were lost
                    block[:] = start, content = offset, remote.read(path, offset, end)
            return content[offset - start :][:size]

        yield pread, length
        return
    with open(path, "rb", buffering=0) as file:
        yield (
            lambda size, offset: os.pread(file.fileno(), size, offset),
            os.fstat(file.fileno()).st_size,
        )


def _check(header: bytes, position: int) -> bytes:
    """The member's type, after a look at the header's checksum."""
    try:
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if len(header) == _BLOCK and int(header[148:156].strip(b" \0"), 8) == total:
            return header[156:157]
    except ValueError:
        pass
    for magic, command in _COMPRESSED.items():
        if header.startswith(magic):
            raise ShardError(f"it is compressed, which random access does not allow; {command} it")
    if not position:
        raise ShardError(f"it is no tar file, but {looks_like(header)}")
    raise ShardError(f"a header is damaged, at byte {position:,}")


def _number(field: bytes) -> int:
    """A size: octal digits, or GNU's big-endian binary where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise ShardError("a header's size is no number") from error


def _decimal(field: bytes) -> int:
    if not field.isdigit() or len(field) > 18:
        raise ShardError("a pax header's size is no number")
    return int(field)


def _pax(records: bytes) -> dict[bytes, bytes]:
    """The fields of a pax header, a sequence of '<length> <key>=<value>\\n'."""
    fields = {}
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            raise ShardError("a pax header is damaged")
        record, records = records[: int(length)], records[int(length) :]
        key, _, value = record[len(length) + 1 :].partition(b"=")
        fields[key] = value.removesuffix(b"\n")
    return fields
