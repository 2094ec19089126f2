"""Image files of a folder whose captions stand in one table."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from efae_jax.data.captions.texts import clean, record
from efae_jax.data.image_types import stored
from efae_jax.data.left_out import LeftOut
from efae_jax.errors import UserError
from efae_jax.paths import user_path

log = logging.getLogger(__name__)
WITHOUT = "images without a caption"
_LOOKED_FOR = 10  # files, before a folder is taken for the wrong one


class CaptionedFiles:
    """The image files `files` below `root`; `texts` holds the captions of each, one a line.

    (One string an image takes a third of the memory that five take.)
    """

    num_classes = 0
    class_names = ()

    def __init__(self, root: str, files: Sequence[str], texts: Sequence[str], left_out: LeftOut):
        self.root = root
        self.files = files
        self.texts = texts
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.name(index)
        with open(name, "rb") as file:
            return record(stored(file.read(), name), tuple(self.texts[index].split("\n")))

    def key(self, index: int) -> str:
        return self.files[index]

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])


def captioned_files(
    root: str, images: Iterable[tuple[str, Sequence[str]]], table: str
) -> CaptionedFiles:
    """The (file, captions) of a table; those without captions are left out, with a warning.

    Raises:
      UserError: if none is left, or the first ten files are not below `root`.
    """
    root, left_out = user_path(root), LeftOut()
    files, texts, without = [], [], 0
    for file, captions in images:
        if captions := clean(captions):
            files.append(file)
            texts.append("\n".join(captions))
        else:
            without += 1
            left_out.add(WITHOUT, file)
    if not files:
        raise UserError(f"{table}: no image with a caption")
    if without:
        log.warning("data: %s: images without a caption, left out: %d", table, without)
    if not os.path.isdir(root):
        raise UserError(f"{root!r} is not a folder; it should hold the images of {table}")
    first = files[:_LOOKED_FOR]
    if not any(os.path.exists(os.path.join(root, file)) for file in first):
        raise UserError(
            f"{os.path.join(root, first[0])!r}, named by {table}, is not there"
            + (f", nor are the next {len(first) - 1} images" if len(first) > 1 else "")
            + "; --images FOLDER says where they are"
        )
    return CaptionedFiles(root, files, texts, left_out)
