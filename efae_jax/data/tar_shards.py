"""Webdataset tar shards (img2dataset's layout) with random access.

A sample (`tar_samples`) has an image and, if there is one, a label: `.cls` (a number or a text) or
`.json` with "label" or "cls". One pass over the headers, never the images, finds where every file
lies. Labels that are texts are numbered by a table (`labels`): `classes.txt` or `classes.json`
beside the shards, else all texts there are, sorted, for which the labels are read once.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from efae_jax.data import labels
from efae_jax.data.image_types import is_unsigned, listed_extensions, stored
from efae_jax.data.labels import Label, Table, Tabled
from efae_jax.data.left_out import LeftOut
from efae_jax.data.remote import Remote
from efae_jax.data.splits import expand, files_of, hold_out, with_absent
from efae_jax.data.tar_members import Member, ShardError, Unusable, members, opened
from efae_jax.data.tar_samples import samples
from efae_jax.errors import UserError
from efae_jax.logs import track
from efae_jax.paths import is_remote, printable

log = logging.getLogger(__name__)
SHARDS_AT_A_TIME = 16
LOOKS = 256  # labels of a shard, by which it shows that labels are texts
_NUMBERS = 6  # of a sample in `_where`


class _Index(NamedTuple):
    """What a shard holds: of each sample its key, and numbers as in `_where` but for the shard; the
    names of images whose type only the name tells, by the sample's number; what it leaves out; what
    ended it too early."""

    keys: list[str]
    where: array
    unsigned: dict[int, str]
    left_out: LeftOut
    error: Exception | None


class TarShards(Tabled):
    """The samples of several shards, one shard after the other.

    A shard that is damaged or cut short is named in a warning, and its samples up to there are
    used; more than max_bad such shards raise UserError.

    Args:
      files: the shards, in order.
      max_bad: damaged ones that are borne.
      table: of the class names; what lies beside the shards, or is found in them, unless given.
    """

    companions = (".cls", ".json")  # of a sample, the first of these that it has is read too

    def __init__(self, files: list[str], max_bad: int, table: Table | None = None):
        self.files = files
        self.left_out = LeftOut()
        self._keys: list[str] = []
        self._unsigned: dict[int, str] = {}
        # Of each sample: shard; offset and size of the image; number (out of `companions`, or
        # their count for none), offset and size of the companion.
        self._where = array("q")
        self._remote = Remote(files[0]) if is_remote(files[0]) else None
        damaged, why = [], None
        shown = track(self._indices(), len(files), "indexing", " shards", transient=True)
        with closing(shown):  # what went wrong is told when the bar is gone
            for number, (path, index) in enumerate(zip(files, shown, strict=True)):
                self._unsigned |= {len(self) + i: name for i, name in index.unsigned.items()}
                self._keys += index.keys
                self.left_out.merge(index.left_out)
                for start in range(0, len(index.where), _NUMBERS - 1):
                    self._where.append(number)
                    self._where += index.where[start : start + _NUMBERS - 1]
                if index.error is not None:
                    damaged.append(f"{path}: {index.error}")
                    why = index.error
                    self.left_out.add("shards that are damaged or cut short", damaged[-1])
                    if len(damaged) > max_bad:
                        break
        for shard in damaged:
            log.warning("data: shard %s (its samples up to there are used)", printable(shard))
        if len(damaged) > max_bad:
            raise UserError(
                f"data: {len(damaged)} damaged shards are more than data.max_bad="
                f"{max_bad}; the last: {printable('; '.join(damaged[-3:]))}"
            ) from why
        if not self._keys:
            found = f"; {printable(damaged[0])}" if damaged else ""
            raise UserError(
                f"data.path: no image in {len(files)} tar shards, the first "
                f"'{printable(files[0])}'{found}; allowed members: {listed_extensions()}"
            )
        self.table = self._table() if table is None else table

    def _indices(self) -> Iterator[_Index]:
        """Of each shard, in order; on object storage, of many at a time."""
        if self._remote is None:
            yield from map(self._index, self.files)
            return
        with ThreadPoolExecutor(SHARDS_AT_A_TIME) as pool:
            yield from pool.map(self._index, self.files)

    def _index(self, path: str) -> _Index:
        found: list[Member | Unusable] = []
        left_out, error = LeftOut(), None
        try:
            with opened(path) as (pread, length):
                found.extend(members(pread, length))
        except IsADirectoryError:
            error = ShardError(f"it is a folder; give its shards: '{path}/*.tar'")
        except OSError as problem:
            error = ShardError(problem.strerror or str(problem))
        except ShardError as problem:
            error = problem
        keys, where, unsigned = [], array("q"), {}
        for sample in samples(found, self.companions, left_out, os.path.basename(path)):
            kind, file = sample.companion or (len(self.companions), Member("", 0, 0))
            if is_unsigned(sample.image.name):
                unsigned[len(keys)] = sample.image.name
            keys.append(sample.key)
            where.extend((sample.image.offset, sample.image.size, kind, file.offset, file.size))
        return _Index(keys, where, unsigned, left_out, error)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> tuple[Any, str, bytes]:
        """The image, and the ending and content of its companion, empty where it has none."""
        content, kind, companion = self._read(index)
        if index in self._unsigned:
            return stored(content, self._unsigned[index]), kind, companion
        return content, kind, companion

    def _read(self, index: int, image: bool = True) -> tuple[bytes, str, bytes]:
        shard, offset, size, number, *place = self._where[_NUMBERS * index : _NUMBERS * (index + 1)]
        kind = self.companions[number] if number < len(self.companions) else ""
        if self._remote is not None:
            return self._read_remote(self.files[shard], (offset, size), kind, tuple(place))
        # Opened anew each time: thousands of shards would exceed the limit of open files.
        with open(self.files[shard], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset) if image else b""
            return content, kind, os.pread(file.fileno(), place[1], place[0]) if kind else b""

    def _read_remote(
        self, url: str, image: tuple[int, int], kind: str, companion: tuple[int, int]
    ) -> tuple[bytes, str, bytes]:
        if not kind:
            return self._remote.read(url, image[0], sum(image)), "", b""
        content, beside = self._remote.read_two(url, image, companion)
        return content, kind, beside

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, kind, content = self.read(index)
        return {"image": image, **self.table.record(_label(kind, content))}

    def _table(self) -> Table:
        """What lies beside the shards, else the texts among the labels, if there are any.

        A shard shows by a few of its labels whether they are texts. Only then all are read: never
        on object storage, where each would be a request.
        """
        if self._remote is not None or ".cls" not in self.companions:
            return Table()
        beside = labels.read_table(Path(self.files[0]).parent)
        some = [i for first, last in self._ranges() for i in _spread(first, last, LOOKS)]
        if not any(self._label(i).text for i in some):
            return beside or Table()
        everything = track(range(len(self)), len(self), "reading labels", " labels", transient=True)
        found = [self._label(i) for i in everything]
        texts, numbers = (sum(bool(label[place]) for label in found) for place in (1, 0))
        if beside is not None:
            lacking = "labels that the table of class names lacks (numbered 0)"
            for i, label in enumerate(found):
                if beside.numbered(label).text:
                    self.left_out.add(lacking, f"{label.text!r} of {self.key(i)}")
            return beside
        example = next(self.key(i) for i, label in enumerate(found) if label.text)
        if numbers:
            self.left_out.add(
                f"labels that are texts, among {numbers:,} numbers (numbered 0; classes.txt beside "
                "the shards would number them)",
                example,
                texts,
            )
            return Table()
        table = labels.table_of(found)
        if not table.names:
            self.left_out.add(
                f"labels that are texts, more than {labels.MOST_CLASSES:,} different ones "
                "(numbered 0)",
                example,
                texts,
            )
        return table

    def _label(self, index: int) -> Label:
        return _label(*self._read(index, image=False)[1:])

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) sample of each shard."""
        first = 0
        for index in range(1, len(self) + 1):
            last = index == len(self)
            if last or self._where[_NUMBERS * index] != self._where[_NUMBERS * first]:
                yield first, index
                first = index

    def key(self, index: int) -> str:
        shard = os.path.basename(self.files[self._where[_NUMBERS * index]])
        return f"{shard}/{self._keys[index]}"

    def name(self, index: int) -> str:
        shard = self.files[self._where[_NUMBERS * index]]
        return f"{shard}/{self._keys[index]}"


def _label(kind: str, content: bytes) -> Label:
    if not kind:
        return Label()
    return labels.of_json(content) if kind == ".json" else labels.parse(content)


def _spread(first: int, last: int, count: int) -> list[int]:
    """So many numbers of a range, far apart."""
    return sorted({first + (last - first) * i // count for i in range(count)})


def has_splits(config: Any) -> bool:
    """Whether the path names the splits apart."""
    return "{split}" in config.path


def open_tar_shards(config: Any, split: str):
    """The shards data.path for a split; '{split}' in it stands for the split's name."""
    if not has_splits(config):
        return hold_out(_opened(config.path, config.max_bad), split, config.test_fraction)
    named = {"train": config.train_split, "test": config.test_split}
    source = _opened(config.path.replace("{split}", named.pop(split)), config.max_bad)
    other = config.path.replace("{split}", *named.values())
    if source.table.names and expand(other):
        # One table for both splits, so that a class has one number in both.
        names = _opened(other, config.max_bad).table.names
        if not names:  # the other's are numbers, with which those of texts must not be mixed
            source.left_out.add(
                "labels that are texts, where the other split's are not (numbered 0)",
                source.key(0),
                len(source),
            )
        source.table = Table(sorted({*source.table.names, *names}) if names else ())
    return source


def _opened(path: str, max_bad: int) -> TarShards:
    return with_absent(TarShards(files_of(path, "tar shard"), max_bad), path)
