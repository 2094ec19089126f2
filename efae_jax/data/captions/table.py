"""Captions in a CSV file, or a TSV file, with a column of image files."""

from __future__ import annotations

import csv
import os

from efae_jax.data.captions.files import CaptionedFiles, captioned_files
from efae_jax.errors import UserError
from efae_jax.paths import printable

IMAGE_COLUMNS = ("image", "file", "file_name", "filename", "path", "filepath")
CAPTION_COLUMNS = ("caption", "text", "title", "description")  # how their names start


def open_table(path: str, images: str | None) -> CaptionedFiles:
    """The images of a table, in the order of their first rows, with the captions of all rows.

    Columns go by name, in any case. Files are relative to `images`, or else to the table's
    folder.

    Raises:
      UserError: for what is not there, and for a table that lacks a column or has ragged rows.
    """
    captions: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, "excel-tab" if path.lower().endswith(".tsv") else "excel")
            header = next(rows, [])
            image, texts = _columns(path, header)
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(
                        f"--data csv:{path}: line {rows.line_num} has {len(row)} columns, the "
                        f"header {len(header)}; a text with the separator in it needs quotes"
                    )
                if row and not row[image].strip():
                    raise UserError(f"--data csv:{path}: line {rows.line_num} names no image")
                if row:
                    captions.setdefault(row[image].strip(), []).extend(row[i] for i in texts)
    except OSError as error:
        raise UserError(f"--data csv:{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        what = f"byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(
            f"--data csv:{path}: no table in UTF-8 ({what}); a text file with a header and a line "
            "an image is meant"
        ) from error
    return captioned_files(images or os.path.dirname(path) or ".", captions.items(), path)


def _columns(path: str, header: list[str]) -> tuple[int, list[int]]:
    names = [name.strip().lower() for name in header]
    images = [names.index(name) for name in IMAGE_COLUMNS if name in names]
    captions = [i for i, name in enumerate(names) if name.startswith(CAPTION_COLUMNS)]
    if not images or not captions:
        what, shown = "captions" if images else "images", printable(", ".join(header)[:100])
        raise UserError(
            f"--data csv:{path}: no column of {what} in its header ({shown}); images: "
            f"{', '.join(IMAGE_COLUMNS)}; captions: "
            f"names that start with {', '.join(CAPTION_COLUMNS)}"
        )
    return images[0], captions
