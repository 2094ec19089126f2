"""The captioned data that a user names."""

from __future__ import annotations

import difflib
import os

from efae_jax.data.captioned_glyphs import CaptionedGlyphs
from efae_jax.data.captions.coco import open_coco
from efae_jax.data.captions.folder import open_captioned_folder
from efae_jax.data.captions.hub import open_hub
from efae_jax.data.captions.shards import open_captioned_shards
from efae_jax.data.captions.table import open_table
from efae_jax.data.splits import SPLITS, Source, first
from efae_jax.errors import UserError
from efae_jax.paths import user_path

GLYPHS = "captioned_glyphs"
FORMS = {
    GLYPHS: GLYPHS,
    "coco": "coco:ANNOTATIONS.json (with --images FOLDER)",
    "folder": "folder:PATH",
    "webdataset": "webdataset:SHARDS.tar",
    "csv": "csv:FILE",
    "hub": "hub:OWNER/NAME",
}
_SUFFIXES = {".json": "coco", ".csv": "csv", ".tsv": "csv", ".tar": "webdataset"}
_NUM_GLYPHS = 10_000


def open_captioned(
    data: str,
    *,
    size: tuple[int, int],
    images: str | None = None,
    split: str | None = None,
    num_images: int | None = None,
    max_bad: int = 100,
) -> Source:
    """Images with captions, by name.

    Records are {"image": encoded bytes or a Pillow image, "label": int, "captions": 1 to 5 strings
    without line breaks, "factors": Factors of a built-in image, else None}. An image without any
    caption is left out here, or where only reading tells, raises CaptionError then.

    Args:
      data: one of FORMS, or a folder.
      size: (height, width) of the built-in images; all others have their own.
      images: the folder of images that a COCO or CSV file's names are relative to.
      split: of the built-in images ("train" unless given) or of a hub's data set.
      num_images: how many built-in images (10,000 unless given); of other data, the first so
        many.
      max_bad: damaged tar shards that are only warned of.

    Raises:
      UserError: for what is unknown, not there or does not fit.
    """
    name, _, path = data.partition(":")
    if name not in FORMS and os.path.isdir(user_path(data)):
        name, path = "folder", user_path(data)
    if name not in FORMS or bool(path) == (name == GLYPHS):
        raise UserError(_unknown(data, name))
    if images is not None and name not in ("coco", "csv"):
        raise UserError(f"--images {images} belongs to --data coco: or csv:, not to {data}")
    if split is not None and name not in (GLYPHS, "hub"):
        raise UserError(f"--split {split}: --data {data} has no splits")
    if num_images is not None and num_images < 1:
        raise UserError(f"--num-images {num_images}: it must be at least 1")
    if name == GLYPHS:
        return _open_glyphs(split or "train", num_images or _NUM_GLYPHS, size)
    source = _open(name, user_path(path), images, split, max_bad)
    if num_images is not None and num_images < len(source):
        return first(source, num_images)
    return source


def _open(name: str, path: str, images: str | None, split: str | None, max_bad: int) -> Source:
    match name:
        case "coco":
            return open_coco(path, images)
        case "csv":
            return open_table(path, images)
        case "folder":
            return open_captioned_folder(path)
        case "webdataset":
            return open_captioned_shards(path, max_bad)
        case _:
            return open_hub(path, split)


def _open_glyphs(split: str, number: int, size: tuple[int, int]) -> CaptionedGlyphs:
    if split not in SPLITS:
        raise UserError(f"--split {split}: {GLYPHS} has {', '.join(SPLITS)}")
    if min(size) < 8:
        raise UserError(f"--size {min(size)}: {GLYPHS} needs at least 8")
    return CaptionedGlyphs(split, number, size)


def _unknown(data: str, name: str) -> str:
    if name in FORMS:
        return f"--data {data}: the form is {FORMS[name]}; a folder of that name is ./{name}"
    close = difflib.get_close_matches(name, FORMS, 1)
    guess = FORMS[close[0]] if close else ""
    if form := _SUFFIXES.get(os.path.splitext(data)[1].lower()):
        guess = f"{form}:{data}"
    hint = f" (did you mean {guess}?)" if guess and guess != data else ""
    return f"--data {data}: no such folder; allowed: a folder, {', '.join(FORMS.values())}{hint}"
