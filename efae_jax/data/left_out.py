"""What of a data set is not used, by kind: how many, and an example of each.

No image disappears without a word: sources note what they leave out as they open, reading notes
what it cannot read, and a command says all of it at its end and keeps it in the JSON that it
writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from efae_jax.paths import printable


class LeftOut:
    """Counts by kind. A kind is words such as "held out"; its example is the first that came."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Counts things of a kind; nothing where count is 0."""
        if count:
            before, first = self._kinds.get(kind, (0, example))
            self._kinds[kind] = (before + count, first)

    def merge(self, other: LeftOut) -> None:
        """Adds another's counts."""
        for kind, (count, example) in other._kinds.items():
            self.add(kind, example, count)

    def copy(self) -> LeftOut:
        """Counts that go on apart from these."""
        new = LeftOut()
        new.merge(self)
        return new

    def count(self, kind: str) -> int:
        """How many of a kind."""
        return self._kinds.get(kind, (0, ""))[0]

    def counts(self) -> list[tuple[str, int]]:
        """(kind, how many), in the order in which the kinds came."""
        return [(kind, count) for kind, (count, _) in self._kinds.items()]

    def as_json(self) -> dict[str, dict[str, Any]]:
        """{kind: {"count": 3, "example": "a/1.png"}}."""
        return {
            kind: {"count": count, "example": printable(example)}
            for kind, (count, example) in self._kinds.items()
        }

    def __bool__(self) -> bool:
        return bool(self._kinds)


def account(source: Any, unreadable: Mapping[str, str], used: int | None = None) -> dict[str, Any]:
    """What was read of a source: {"images": in it, "used": of them, "left_out": the rest, by kind}.

    Args:
      source: a `data.splits.Source`.
      unreadable: name of an image -> why it could not be read, as "kind: detail".
      used: how many were asked for and read; all but the unreadable unless given.
    """
    left_out = source.left_out.copy()
    for name, reason in unreadable.items():
        # Kinds count together: the numbers in a reason belong to its example.
        kind, _, detail = reason.partition(": ")
        left_out.add(
            f"unreadable ({re.sub(r'[0-9][0-9,.x]*', 'N', kind)})",
            f"{name}: {detail or kind}",
        )
    used = len(source) - len(unreadable) if used is None else used
    return {"images": len(source), "used": used, "left_out": left_out.as_json()}


def account_lines(found: Mapping[str, Any]) -> list[str]:
    """`account` in words."""
    lines = [f"used {found['used']:,} of {found['images']:,} images"]
    if found["left_out"]:
        lines[0] += "; left out, or of note:"
    for kind, entry in found["left_out"].items():
        such_as = "such as " if entry["count"] > 1 else ""
        lines.append(f"  {kind}: {entry['count']:,} ({such_as}{entry['example']})")
    return lines
