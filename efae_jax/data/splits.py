"""Which records are held out, and which files a pattern names."""

from __future__ import annotations

import glob
import re
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import product
from typing import Any, Protocol

from efae_jax.data.remote import Remote
from efae_jax.errors import UserError
from efae_jax.paths import is_remote

SPLITS = ("train", "test")


class Source(Protocol):
    """Random access to images. Reading a record may raise anything; the pipeline handles it."""

    num_classes: int  # 0 where the source does not tell

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{'image': encoded bytes, uint8 [H, W(, C)] or a Pillow image, 'label': int}."""

    def key(self, index: int) -> str:
        """The record's name inside the source: the same wherever the data lie."""

    def name(self, index: int) -> str:
        """Where to find the record, for messages."""


class Subset:
    """Some records of a source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source = source
        self.indices = indices
        self.num_classes = source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


def hold_out(source: Source, split: str, test_fraction: float) -> Subset:
    """The part of a source for a split, where the source itself has none.

    A record is held out if the hash of its key, as a number in [0, 1), is below test_fraction,
    so that adding or removing files moves no other record between the splits.
    """
    if not 0 <= test_fraction < 1:
        raise UserError(f"data.test_fraction: {test_fraction}; allowed: 0 <= fraction < 1")
    test = split == "test"
    numbers = range(len(source))
    indices = array("q", (i for i in numbers if is_held_out(source.key(i), test_fraction) == test))
    if not indices:
        raise UserError(
            f"data: none of the {len(source)} images falls to split {split!r} with "
            f"data.test_fraction={test_fraction}; choose another fraction or give the source "
            "separate train and test parts"
        )
    return Subset(source, indices)


def is_held_out(key: str, test_fraction: float) -> bool:
    """Whether the hash of a record's key puts it into the test split."""
    digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(test_fraction * 2**64)


def expand(pattern: str) -> list[str]:
    """The existing files that a pattern names, sorted: wildcards and {00..12} or {a,b} braces.

    Raises UserError where a pattern names object storage that cannot be reached.
    """

    def choices(part: str) -> list[str]:
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        if part.startswith("{") and part.endswith("}"):
            return part[1:-1].split(",")
        return [part]

    parts = [choices(part) for part in re.split(r"(\{[^{}]*\})", pattern)]
    patterns = ["".join(p) for p in product(*parts)]
    if is_remote(pattern):
        return sorted(set(Remote(pattern).matching(patterns)))
    return sorted({path for p in patterns for path in glob.glob(p, recursive=True)})


def files_of(path: str, what: str) -> list[str]:
    """The files that data.path names; at least one."""
    files = expand(path)
    if not files:
        raise UserError(
            f"data.path: no {what} matches {path!r}; allowed: one file, wildcards such as "
            "'shards/*.tar', ranges such as 'shards/{00000..00010}.tar'"
        )
    return files
