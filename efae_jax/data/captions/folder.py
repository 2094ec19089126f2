"""A folder of images, at any depth, with a file of captions beside each."""

from __future__ import annotations

import logging
import os
from typing import Any

from efae_jax.data.captions.files import WITHOUT
from efae_jax.data.captions.texts import captions_of_text
from efae_jax.data.folder import Folder, class_of, image_files
from efae_jax.data.left_out import LeftOut
from efae_jax.errors import UserError

log = logging.getLogger(__name__)
EXTENSIONS = (".txt", ".caption")


class CaptionedFolder(Folder):
    """`Folder` with captions: the lines of the file beside the image."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        stem = os.path.splitext(self.name(index))[0]
        path = next(stem + e for e in EXTENSIONS if os.path.exists(stem + e))
        with open(path, "rb") as file:
            captions = captions_of_text(file.read(), path)
        return {**super().__getitem__(index), "captions": captions, "factors": None}


def open_captioned_folder(root: str) -> CaptionedFolder:
    """Every image below root that has a caption file; how many have none is a warning.

    Raises:
      UserError: when no image has one.
    """
    if not os.path.isdir(root):
        raise UserError(f"--data folder:{root}: no such folder")
    left_out = LeftOut()
    found = image_files(root, left_out)
    beside = {
        folder: set(os.listdir(os.path.join(root, folder)))
        for folder in {os.path.dirname(file) for file in found}
    }

    def has_captions(file: str) -> bool:
        folder, name = os.path.split(file)
        return any(os.path.splitext(name)[0] + e in beside[folder] for e in EXTENSIONS)

    files = [file for file in found if has_captions(file)]
    without = {*found} - {*files}
    left_out.add(WITHOUT, min(without, default=""), len(without))
    if not files:
        raise UserError(
            f"--data {root}: {len(found)} images, none with captions; beside dog.jpg belongs "
            f"{' or '.join('dog' + e for e in EXTENSIONS)}, a caption a line"
        )
    if len(files) < len(found):
        log.warning(
            "data: %s: %d of %d images have no caption file and are left out",
            root,
            len(found) - len(files),
            len(found),
        )
    return CaptionedFolder(root, files, sorted({class_of(file) for file in files}), left_out)
