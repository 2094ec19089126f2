"""Which records are held out, and which files a pattern names."""

from __future__ import annotations

import glob
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate, product
from typing import Any, Protocol

from efae_jax.data.left_out import LeftOut
from efae_jax.data.remote import Remote
from efae_jax.errors import UserError
from efae_jax.paths import is_remote, printable, user_path

SPLITS = ("train", "test")
ALL = "all"  # images of a source, whatever split they fall to


class Source(Protocol):
    """Random access to images. Reading a record may raise anything; the pipeline handles it."""

    num_classes: int  # 0 where the source does not tell
    class_names: Sequence[str]  # of the labels, by number; empty where the source does not tell
    left_out: LeftOut  # what lies there and is not in the source

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{'image': encoded bytes, uint8 [H, W(, C)] or a Pillow image, 'label': int}, and
        'label_text' where the label is a text without a number."""

    def key(self, index: int) -> str:
        """The record's name inside the source: the same wherever the data lie."""

    def name(self, index: int) -> str:
        """Where to find the record, for messages."""


class Subset:
    """Some records of a source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int], left_out: LeftOut | None = None):
        self.source = source
        self.indices = indices
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.left_out = source.left_out if left_out is None else left_out

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


def first(source: Source, count: int) -> Source:
    """The first so many records of a source; what is left is counted."""
    if count >= len(source):
        return source
    left_out = source.left_out.copy()
    left_out.add("beyond the number asked for", source.key(count), len(source) - count)
    return Subset(source, range(count), left_out)


class Joined:
    """The records of several sources of one kind, one source after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self._ends = list(accumulate(map(len, sources)))
        self.num_classes = max(source.num_classes for source in sources)
        self.class_names = max((source.class_names for source in sources), key=len)
        self.left_out = LeftOut()
        for source in sources:
            self.left_out.merge(source.left_out)

    def _locate(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, place = self._locate(index)
        return source[place]

    def key(self, index: int) -> str:
        source, place = self._locate(index)
        return source.key(place)

    def name(self, index: int) -> str:
        source, place = self._locate(index)
        return source.name(place)


def hold_out(source: Source, split: str, test_fraction: float) -> Source:
    """The part of a source for a split, where the source itself has none; "all": the source.

    A record is held out if the hash of its key, as a number in [0, 1), is below test_fraction,
    so that adding or removing files moves no other record between the splits.

    Raises:
      UserError: a fraction that is none, or a split that would be empty (EmptySplitError).
    """
    if not 0 <= test_fraction < 1:
        raise UserError(
            f"data.test_fraction (--test-fraction): {test_fraction}; allowed: 0 <= fraction < 1"
        )
    if split == ALL:
        return source
    test = split == "test"
    numbers = range(len(source))
    indices = array("q", (i for i in numbers if is_held_out(source.key(i), test_fraction) == test))
    if not indices:
        raise EmptySplitError(
            f"data: none of the {len(source)} images falls to split {split!r} with "
            f"data.test_fraction={test_fraction}; choose another fraction "
            "(--config.data.test_fraction in training, else --test-fraction), --split all for "
            "every image outside training, or give the source separate train and test parts"
        )
    left_out = source.left_out.copy()
    if len(indices) < len(source):
        other = next(i for i in numbers if is_held_out(source.key(i), test_fraction) != test)
        kind = "for training, not held out" if test else "held out for testing"
        left_out.add(
            f"{kind} (data.test_fraction={test_fraction:g})",
            source.key(other),
            len(source) - len(indices),
        )
    return Subset(source, indices, left_out)


class EmptySplitError(UserError):
    """A source too small for one of its images to fall to a split."""


def is_held_out(key: str, test_fraction: float) -> bool:
    """Whether the hash of a record's key puts it into the test split."""
    digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(test_fraction * 2**64)


def expand(pattern: str) -> list[str]:
    """The existing files that a pattern names, sorted: wildcards and {00..12} or {a,b} braces.

    Raises UserError where a pattern names object storage that cannot be reached.
    """
    if os.path.lexists(user_path(pattern)):  # a file that is called so
        return [user_path(pattern)]
    patterns = _alternatives(pattern)
    if is_remote(pattern):
        return sorted(set(Remote(pattern).matching(patterns)))
    return sorted({path for p in patterns for path in glob.glob(p, recursive=True)})


def absent(pattern: str, files: Sequence[str]) -> list[str]:
    """Files that should be there and are not: of a range {00..12}, or of NAME-00003-of-00010.

    Args:
      pattern: that names the files.
      files: that `expand` found.
    """
    there = {*files}
    if os.path.lexists(user_path(pattern)):
        return []
    wanted = {p for p in _alternatives(pattern) if not glob.has_magic(p)}
    for file in files:
        if parts := _OF.fullmatch(file):
            start, number, count, end = parts.groups()
            # A range that leaves some out on purpose is taken at its word.
            if glob.has_magic(pattern) and int(count) <= _MOST_SHARDS:
                wanted |= {f"{start}{i:0{len(number)}d}-of-{count}{end}" for i in range(int(count))}
    return sorted(wanted - there)


def with_absent(source: Any, pattern: str) -> Any:
    """The source of the files that a pattern names, with those counted that are not there."""
    for missing in absent(pattern, source.files):
        source.left_out.add("files that are named and not there", missing)
    return source


_OF = re.compile(r"(.*-)(\d{2,})-of-(\d{2,})([^/]*)", re.DOTALL)
_MOST_SHARDS = 1_000_000


def _alternatives(pattern: str) -> list[str]:
    """A pattern for every choice in its braces."""

    def choices(part: str) -> list[str]:
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        if part.startswith("{") and part.endswith("}"):
            return part[1:-1].split(",")
        return [part]

    parts = [choices(part) for part in re.split(r"(\{[^{}]*\})", user_path(pattern))]
    return ["".join(p) for p in product(*parts)]


def files_of(path: str, what: str) -> list[str]:
    """The files that data.path names; at least one."""
    files = expand(path)
    if not files:
        raise UserError(
            f"data.path: no {what} matches '{printable(path)}'; allowed: one file, wildcards such "
            "as 'shards/*.tar', ranges such as 'shards/{00000..00010}.tar'"
        )
    return files
