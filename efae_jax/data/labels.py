"""Labels of any kind: a number where there is one, else a text with its number in a table.

A label never decides whether an image can be used. Texts (class names, WordNet ids) are numbered
by a table: the class names of the data in their order. Where there is no table, the number is 0
and the text is kept beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efae_jax.errors import UserError

# More texts than this are no classes, but captions or addresses.
MOST_CLASSES = 65_536
TABLES = ("classes.txt", "classes.json")
_INT32 = np.iinfo(np.int32)


class Label(NamedTuple):
    """number: int32, 0 where there is none. text: the label, where it is no such number."""

    number: int = 0
    text: str = ""


def parse(value: Any) -> Label:
    """The label that a value of a JSON, msgpack, `.cls` file or data set means.

    Whole numbers that int32 holds are numbers, also as text or float; nothing is 0; a list with
    one entry is that entry; all else is text.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        # Half of a surrogate pair, which JSON allows, cannot be stored.
        value = value.encode("utf-8", "backslashreplace").decode()
        return _of_text(value.strip().lstrip("\ufeff"))
    if value is None:
        return Label()
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        number = int(value)
        return Label(number) if _fits(number) else Label(0, str(number))
    try:
        return Label(0, json.dumps(value, ensure_ascii=False, sort_keys=True))
    except (TypeError, ValueError):
        return Label(0, str(value))


def _of_text(text: str) -> Label:
    if not re.fullmatch(r"[+-]?\d{1,20}(\.0*)?", text, re.ASCII):
        return Label(0, text)
    number = int(text.partition(".")[0])
    return Label(number) if _fits(number) else Label(0, text)


def _fits(number: int) -> bool:
    return _INT32.min <= number <= _INT32.max


def of_json(content: bytes) -> Label:
    """The label in a sample's JSON: its field "label", else "cls"; none in anything else."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return Label()
    if not isinstance(fields, dict):
        return Label()
    label = fields.get("label")
    return parse(fields.get("cls") if label is None else label)


class Table:
    """Class names; the number of one is its place.

    Attributes:
      names: of the classes; empty where there is no table.
    """

    def __init__(self, names: Sequence[str] = ()):
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def numbered(self, label: Label) -> Label:
        """The label with its number: of a text in the table its place, and no text."""
        if label.text in self._numbers and label.text:
            return Label(self._numbers[label.text])
        return label

    def record(self, label: Label) -> dict[str, Any]:
        """{"label": int}, and "label_text" where the label is a text without a number."""
        number, text = self.numbered(label)
        return {"label": number, "label_text": text} if text else {"label": number}


class Tabled:
    """A data source whose classes a table names.

    Attributes:
      table: of the class names.
    """

    table: Table

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels, by number; empty where the labels are numbers, or there are none."""
        return self.table.names

    @property
    def num_classes(self) -> int:
        """As many as there are names; 0 where the source does not tell."""
        return len(self.table.names)


def table_of(labels: Iterable[Label]) -> Table:
    """The table of the texts among labels, sorted; none where they are too many for classes."""
    names: set[str] = set()
    for label in labels:
        if label.text:
            names.add(label.text)
            if len(names) > MOST_CLASSES:
                return Table()
    return Table(sorted(names))


def read_table(folder: Path) -> Table | None:
    """The table that lies beside data: `classes.txt`, a name a line, or `classes.json`, a list of
    names or {name: number}; None where there is neither.

    Raises:
      UserError: for a file of another form.
    """
    for name in TABLES:
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} must name the classes, each once, in UTF-8; byte {error.start:,} is none"
            ) from error
        names = _of_json_table(text) if path.suffix == ".json" else text.rstrip().splitlines()
        names = names and [entry.strip() for entry in names]
        if not names or len(set(names)) < len(names) or "\0" in text:
            raise UserError(
                f"{path} must name the classes, each once: "
                + ('["cat", "dog"] or {"cat": 0, "dog": 1}' if name.endswith("json") else "a line")
            )
        return Table(names)
    return None


def _of_json_table(text: str) -> list[str] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        if sorted(map(str, value.values())) != sorted(map(str, range(len(value)))):
            return None
        value = sorted(value, key=lambda name: int(value[name]))
    good = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value if good else None
