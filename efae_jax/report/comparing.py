"""Several evaluations beside one another: their names, and what keeps figures from comparing."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from efae_jax.report.records import Record

UNSTATED = "not stated"
# Choices of a protocol that bear on some figures only. Those of latents have no best, and a
# sampler's noise is a model's matter.
_SPOILED = {
    "equivariance error": "error",
    "transformed": "transformed",
    "latent space": "",
    "noise": "",
}


def letters(count: int) -> list[str]:
    """A, B, ..., Z, A2, B2, ...: what models are called in plots."""
    alphabet = string.ascii_uppercase
    return [
        alphabet[i % 26] + (str(1 + i // 26) if i >= len(alphabet) else "") for i in range(count)
    ]


def named_apart(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The same records; models of one name get behind it what tells them apart.

    That is the step, the weights' hash, the protocol or the images' path, whichever comes first
    of those that differ; else a number.
    """
    names = [record["name"] for record in records]
    taken = {name for name in names if names.count(name) == 1}
    named = []
    for record in records:
        name = record["name"]
        if names.count(name) > 1:
            same = [other for other in records if other["name"] == name]
            numbers = (str(n) for n in itertools.count(1))
            marks = itertools.chain(_mark(record, same), numbers)
            name = next(new for mark in marks if (new := f"{name} ({mark})") not in taken)
            taken.add(name)
        named.append({**record, "name": name})
    return named


def _mark(record: Record, same: Sequence[Record]) -> list[str]:
    """What tells a record from others, if one thing does."""
    marks: tuple[Callable[[Record], str], ...] = (
        lambda r: f"step {r['model'].get('step')}",
        lambda r: str(r["model"].get("sha256"))[:8],
        lambda r: str(r["protocol"].get("name")),
        lambda r: str(r["data"].get("path")),
    )
    telling = (mark for mark in marks if len({mark(r) for r in same}) == len(same))
    return [mark(record) for mark in itertools.islice(telling, 1)]


def short(name: str, most: int = 30) -> str:
    """A name for a narrow column: its beginning and its end."""
    if len(name) <= most:
        return name
    return f"{name[: most // 3]}…{name[most // 3 - most + 1 :]}"


class Difference(NamedTuple):
    """Something that evaluations did not do alike.

    what: in words. values: one a record, in words. spoils: the figures that do not compare for
    it: "all"; "transformed", those of transformed latents; "means", those over transformations;
    the name of a figure; or "" for none.
    """

    what: str
    values: tuple[str, ...]
    spoils: str

    def groups(self) -> list[tuple[str, list[str]]]:
        """Every value, with the letters of the models that have it."""
        found: dict[str, list[str]] = {}
        for letter, value in zip(letters(len(self.values)), self.values, strict=True):
            found.setdefault(value, []).append(letter)
        return list(found.items())

    def __str__(self) -> str:
        groups = (f"{', '.join(models)}: {value}" for value, models in self.groups())
        return f"{self.what} ({'; '.join(groups)})"


def differences(records: Sequence[Record]) -> list[Difference]:
    """What keeps figures of these evaluations from being compared; empty for a single one."""
    keys = {record["data"].get("keys") for record in records}
    same_names = len(keys) == 1 and None not in keys
    transformations = [
        ", ".join(t["name"] for t in record["transformations"]) for record in records
    ]
    asked: list[tuple[str, list[Any], str]] = [
        ("source of the images", _of(records, "data", "source"), "all"),
        # The same names elsewhere are taken for the same images.
        ("path of the images", _of(records, "data", "path"), "" if same_names else "all"),
        ("split", _of(records, "data", "split"), "all"),
        ("names of the images", _of(records, "data", "keys"), "all"),
        ("size of the images", _of(records, "data", "size"), "all"),
        ("number of images", [record.get("images") for record in records], "all"),
        ("features of the Fréchet distance", [r.get("frechet") for r in records], "frechet"),
        ("transformations", transformations, "means"),
    ]
    for key in dict.fromkeys(key for record in records for key in record["protocol"]):
        what = "protocol" if key == "name" else f"protocol: {key}"
        asked.append((what, _of(records, "protocol", key), _spoiled(key)))
    return [
        Difference(what, values, spoils)
        for what, values, spoils in ((w, tuple(map(words, v)), s) for w, v, s in asked)
        if len(set(values)) > 1
    ]


def comparable(found: Sequence[Difference], name: str, transformed: str = "") -> bool:
    """Whether a figure means the same for all, so that a best one may be marked.

    Args:
      found: the differences.
      name: of the figure.
      transformed: "one" for a figure of one transformation, "mean" for one over a kind.
    """
    spoiling = {"all", name}
    if transformed:
        spoiling.add("transformed")
    if transformed == "mean":
        spoiling.add("means")
    return not any(difference.spoils in spoiling for difference in found)


def _of(records: Sequence[Record], part: str, key: str) -> list[Any]:
    return [record[part].get(key) for record in records]


def _spoiled(key: str) -> str:
    """Which figures a choice of the protocol bears on."""
    if key in ("psnr", "ssim", "lpips", "frechet"):
        return key
    return _SPOILED.get(key, "all")


def words(value: Any) -> str:
    """A value of a record in words: [256, 256] is 256×256, 1000 is 1,000."""
    if value is None or value == "":
        return UNSTATED
    if isinstance(value, list | tuple):
        return "×".join(map(words, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
