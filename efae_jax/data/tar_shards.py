"""Webdataset tar shards (img2dataset's layout) with random access.

A sample is the members of one shard that share a name up to the first dot: an image (.jpg, .png,
.webp, ...) and, if there is one, a label: `.cls` (a number) or `.json` with "label" or "cls".
One pass over the headers, never the contents, finds where every member lies.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

from efae_jax.data.folder import EXTENSIONS
from efae_jax.data.remote import Remote, reached
from efae_jax.data.splits import files_of, hold_out
from efae_jax.errors import UserError
from efae_jax.logs import track
from efae_jax.paths import is_remote

log = logging.getLogger(__name__)
REQUEST = 2**20  # bytes of an object that a request fetches while headers are looked for
SHARDS_AT_A_TIME = 16
_BLOCK = 512


class ShardError(Exception):
    """A tar file that cannot be read to its end."""


def members(pread: Callable[[int, int], bytes], length: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files in an uncompressed tar file, from its headers.

    pread: gives so many bytes of the file from an offset on. length: of the file.

    Reads ustar, GNU and pax names. Raises ShardError where the file is damaged or cut short.
    """
    position, long_name = 0, None
    while position < length:
        header = pread(_BLOCK, position)
        if not header.strip(b"\0"):
            return
        kind, size = _check(header), _number(header[124:136])
        start, position = (
            position + _BLOCK,
            position + _BLOCK + -(-size // _BLOCK) * _BLOCK,
        )
        if start + size > length:
            raise ShardError("it ends inside a member")
        if kind == b"L":
            long_name = pread(size, start).rstrip(b"\0")
        elif kind == b"x":
            long_name = _pax_path(pread(size, start)) or long_name
        elif kind in b"0\0":
            prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
            name = header[:100].split(b"\0")[0]
            name = long_name or (prefix + b"/" + name if prefix else name)
            long_name = None
            yield name.decode("utf-8", "surrogateescape"), start, size
        elif kind != b"g":
            long_name = None


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


def _check(header: bytes) -> bytes:
    """The member's type, after a look at the header's checksum."""
    try:
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if len(header) == _BLOCK and int(header[148:156].strip(b" \0"), 8) == total:
            return header[156:157]
    except ValueError:
        pass
    if header[:2] == b"\x1f\x8b":
        raise ShardError("it is compressed, which random access does not allow; gunzip it")
    raise ShardError("a header is damaged, or it is no tar file")


def _number(field: bytes) -> int:
    """A size: octal digits, or GNU's big-endian binary where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise ShardError("a header's size is no number") from error


def _pax_path(records: bytes) -> bytes | None:
    """The path in a pax header, a sequence of '<length> <key>=<value>\\n'."""
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            raise ShardError("a pax header is damaged")
        record, records = records[: int(length)], records[int(length) :]
        if record[len(length) + 1 :].startswith(b"path="):
            return record[len(length) + 6 : -1]
    return None


class TarShards:
    """The samples of several shards, one shard after the other.

    A shard that is damaged or cut short is named in a warning, and its samples up to there are
    used; more than max_bad such shards raise UserError.
    """

    num_classes = 0
    companions = (".cls", ".json")  # of a sample, the first of these that it has is read too

    def __init__(self, files: list[str], max_bad: int):
        self.files = files
        self._keys: list[str] = []
        # Of each sample: shard; offset and size of the image; number (out of `companions`, or
        # their count for none), offset and size of the companion.
        self._where = array("q")
        self._remote = Remote(files[0]) if is_remote(files[0]) else None
        damaged, why = [], None
        shown = track(self._indices(), len(files), "indexing", " shards", transient=True)
        with closing(shown):  # what went wrong is told when the bar is gone
            for number, (path, (keys, where, error)) in enumerate(zip(files, shown, strict=True)):
                self._keys += keys
                for start in range(0, len(where), 5):
                    self._where.append(number)
                    self._where += where[start : start + 5]
                if error is not None:
                    damaged.append(f"{path}: {error}")
                    why = error
                    if len(damaged) > max_bad:
                        break
        for shard in damaged:
            log.warning("data: shard %s (its samples up to there are used)", shard)
        if len(damaged) > max_bad:
            raise UserError(
                f"data: {len(damaged)} damaged shards are more than data.max_bad="
                f"{max_bad}; the last: {'; '.join(damaged[-3:])}"
            ) from why
        if not self._keys:
            raise UserError(
                f"data.path: no image in {len(files)} tar shards, the first {files[0]!r}; "
                f"allowed members: {' '.join(EXTENSIONS)}"
            )

    def _indices(self) -> Iterator[tuple[list[str], array, Exception | None]]:
        """`_index` of each shard, in order; on object storage, of many at a time."""
        if self._remote is None:
            yield from map(self._index, self.files)
            return
        with ThreadPoolExecutor(SHARDS_AT_A_TIME) as pool:
            yield from pool.map(self._index, self.files)

    def _index(self, path: str) -> tuple[list[str], array, Exception | None]:
        """(keys, numbers as in `_where` but for the shard, what ended it too early)."""
        nothing = (len(self.companions), 0, 0)
        key, image, companion = None, None, nothing
        keys, where = [], array("q")

        def finish() -> None:
            if image is not None:
                keys.append(key)
                where.extend((*image, *companion))

        try:
            with opened(path) as (pread, length):
                for name, offset, size in members(pread, length):
                    folder, slash, base = name.rpartition("/")
                    stem = base.partition(".")[0]
                    if folder + slash + stem != key:
                        finish()
                        key, image, companion = folder + slash + stem, None, nothing
                    extension = os.path.splitext(base)[1].lower()
                    if extension in EXTENSIONS and image is None:
                        image = (offset, size)
                    elif extension in self.companions[: companion[0]]:
                        companion = (self.companions.index(extension), offset, size)
        except (ShardError, OSError) as error:
            finish()
            return keys, where, error
        finish()
        return keys, where, None

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> tuple[bytes, str, bytes]:
        """The image, and the extension and content of its companion, empty where it has none."""
        shard, offset, size, number, *place = self._where[6 * index : 6 * index + 6]
        if self._remote is not None:
            return self._read_remote(self.files[shard], (offset, size), number, tuple(place))
        # Opened anew each time: thousands of shards would exceed the limit of open files.
        with open(self.files[shard], "rb", buffering=0) as file:
            image = os.pread(file.fileno(), size, offset)
            if number == len(self.companions):
                return image, "", b""
            return image, self.companions[number], os.pread(file.fileno(), place[1], place[0])

    def _read_remote(
        self, url: str, image: tuple[int, int], number: int, companion: tuple[int, int]
    ) -> tuple[bytes, str, bytes]:
        if number == len(self.companions):
            return self._remote.read(url, image[0], sum(image)), "", b""
        content, beside = self._remote.read_two(url, image, companion)
        return content, self.companions[number], beside

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, kind, label = self.read(index)
        if kind == ".json":
            fields = json.loads(label)
            label = fields.get("label", fields.get("cls", 0))
        return {"image": image, "label": int(label) if kind else 0}

    def key(self, index: int) -> str:
        return f"{os.path.basename(self.files[self._where[6 * index]])}/{self._keys[index]}"

    def name(self, index: int) -> str:
        return f"{self.files[self._where[6 * index]]}/{self._keys[index]}"


def open_tar_shards(config: Any, split: str):
    """The shards data.path for a split; '{split}' in it stands for the split's name."""
    if "{split}" in config.path:
        name = config.train_split if split == "train" else config.test_split
        return TarShards(
            files_of(config.path.replace("{split}", name), "tar shard"), config.max_bad
        )
    source = TarShards(files_of(config.path, "tar shard"), config.max_bad)
    return hold_out(source, split, config.test_fraction)
