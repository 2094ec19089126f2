"""Captions as COCO has them: one JSON file, and a folder of images."""

from __future__ import annotations

from itertools import product
from typing import Any

from efae_jax import json_files
from efae_jax.data.captions.files import CaptionedFiles, captioned_files
from efae_jax.errors import UserError

_ID = (int, str)
_FIELDS = {
    "images": {"id": _ID, "file_name": str},
    "annotations": {"image_id": _ID, "caption": str},
}


def open_coco(path: str, images: str | None) -> CaptionedFiles:
    """The images of an annotations file, ordered by id, with their captions, ordered by id.

    Raises:
      UserError: for what is not there, or is no file of COCO captions.
    """
    if images is None:
        raise UserError(f"--data coco:{path} needs --images FOLDER, where its images are")
    tables = _read(path)
    captions: dict[Any, list[str]] = {}
    for annotation in sorted(tables["annotations"], key=lambda a: _order(a.get("id") or 0)):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    rows = sorted(tables["images"], key=lambda row: _order(row["id"]))
    return captioned_files(
        images, ((r["file_name"], captions.get(r["id"], ())) for r in rows), path
    )


def _order(number: Any) -> tuple[bool, Any]:
    """A key that sorts the ids of any file: numbers, then strings."""
    return isinstance(number, str), number


def _read(path: str) -> dict[str, list[dict[str, Any]]]:
    try:
        with open(path, "rb") as file:
            content = json_files.parse(file.read())
    except OSError as error:
        raise UserError(f"--data coco:{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"--data coco:{path}: no COCO captions: {error}; a file such as "
            "captions_val2017.json is meant"
        ) from error
    for table, fields in _FIELDS.items():
        rows = content.get(table) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(
                f'--data coco:{path}: no COCO captions: it has no list "{table}"; a file such as '
                "captions_val2017.json is meant"
            )
        for (number, row), (field, kind) in product(enumerate(rows), fields.items()):
            if not isinstance(row.get(field) if isinstance(row, dict) else None, kind):
                raise UserError(
                    f'--data coco:{path}: no COCO captions: {table}[{number}] has no "{field}"; '
                    "a file such as captions_val2017.json is meant"
                )
    return content
