"""Reading the records of evaluations."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efae_jax import json_files
from efae_jax.errors import UserError

FORMAT = "efae_jax evaluation 1"
FILE = "evaluation.json"
KINDS = {"rotation": "rotations", "flip": "flips", "scale": "scales"}

Record = Mapping[str, Any]

_PARTS: dict[str, type] = {
    "name": str,
    "model": dict,
    "data": dict,
    "protocol": dict,
    "reconstruction": dict,
    "transformations": list,
    "errors": dict,
    "latent": dict,
    "missing": dict,
    "versions": dict,
}
_NAME = {*string.ascii_letters, *string.digits, *"_.+-"}  # names become names of files and columns


def read_record(path: Path | str) -> dict[str, Any]:
    """What an evaluation wrote into a file.

    Args:
      path: of the JSON, or of the folder that holds `evaluation.json`.

    Raises:
      UserError: when there is no such file, or it is something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        record = json_files.read(path, "the record of an evaluation")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist; `python -m efae_jax evaluate` writes such a file"
        ) from None
    check_record(record, str(path))
    return record


def check_record(record: Any, where: str) -> None:
    """Checks the parts of a record, so that what reads it may rely on them.

    Args:
      record: what the JSON holds.
      where: named in the message.

    Raises:
      UserError: for another format, or a part that is missing or of another type.
    """
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{where} is not the record of an evaluation: its format is {found!r}, not {FORMAT!r}"
        )
    for part, kind in _PARTS.items():
        if not isinstance(record.get(part), kind):
            raise UserError(f"{where}: {part!r} is missing or not a {kind.__name__}")
    names = set()
    for row in record["transformations"]:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name or set(name) - _NAME or name in names:
            raise UserError(
                f"{where}: a transformation is named {name!r}; allowed is a name of its own of "
                "letters, digits and _.+-"
            )
        if row.get("kind") not in KINDS:
            raise UserError(
                f"{where}: {name} is a transformation of kind {row.get('kind')!r}; allowed: "
                f"{', '.join(KINDS)}"
            )
        names.add(name)


def figure(record: Record, *keys: str) -> float | None:
    """A figure of a record, None where it is missing: `figure(record, "reconstruction", "psnr")`.

    Raises:
      UserError: when there is something else than a number.
    """
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    where = f" of {record['name']}" if "name" in record else ""
    raise UserError(f"{'.'.join(keys)}{where} is {value!r}, not a number")


def rows_of(record: Record, kind: str) -> list[Record]:
    """The transformations of a kind."""
    return [row for row in record["transformations"] if row["kind"] == kind]


def label_of(row: Record) -> str:
    """What a transformation is called in a table."""
    return str(row.get("label") or row["name"])


def mean_of(record: Record, kind: str, name: str) -> float | None:
    """The mean of a figure over the transformations of a kind; None where any is missing.

    That of the equivariance errors is in the record.
    """
    if name == "error":
        return figure(record, "errors", kind)
    values = [figure(row, name) for row in rows_of(record, kind)]
    if not values or None in values:
        return None
    return sum(values) / len(values)
