"""The images that a user names on the command line, in the stead of the config's."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from efae_jax.data.folder import EXTENSIONS, Folder, class_of, image_files
from efae_jax.data.sources import make_source
from efae_jax.data.splits import Source
from efae_jax.errors import UserError


class Chosen(NamedTuple):
    """Images to work on.

    Attributes:
      source: of the images.
      config: `config.data`, changed to them.
      described: {source, path, split, images: their number, keys: a hash of their names}.
    """

    source: Source
    config: Any
    described: dict[str, Any]


def choose_images(
    config: Any,
    images: str | None = None,
    *,
    source: str | None = None,
    path: str | None = None,
    data_dir: str | None = None,
    split: str | None = None,
    size: int | None = None,
    default_split: str = "train",
) -> Chosen:
    """Opens the images that are given, or the config's.

    Args:
      config: `config.data`, for what is not given.
      images: a folder: every image in it, at any depth; instead of source, path, data_dir, split.
      source, path, data_dir: as `config.data` names them.
      split: "train" or "test"; `default_split` unless given.
      size: of the square that they are resized (shorter side) and cropped to (centre).

    Raises:
      UserError: for what is not there or does not fit.
    """
    config = config.copy_and_resolve_references()
    given = {"source": source, "path": path, "data_dir": data_dir}
    given = {name: value for name, value in given.items() if value is not None}
    if images is not None and (given or split):
        raise UserError(
            "--images takes every image of a folder; leave out --source, --path, --data-dir and "
            "--split"
        )
    split = split or default_split
    with config.unlocked():
        config.update(given)
        if images is not None:
            config.source, config.path, split = "folder", str(images), ""
    try:
        found = _whole_folder(images) if images is not None else make_source(config, split)
    except UserError as error:
        if images is not None or given:
            raise
        raise UserError(f"{error}; --images FOLDER, or --source and --path, name others") from error
    if size is not None:
        with config.unlocked():
            config.size, config.pad = (size, size), 0
    keys = sha256()
    for i in range(len(found)):
        keys.update(found.key(i).encode("utf-8", "surrogateescape") + b"\0")
    where = {"source": config.source, "path": config.path, "split": split}
    return Chosen(found, config, {**where, "images": len(found), "keys": keys.hexdigest()})


def _whole_folder(root: str) -> Folder:
    if not Path(root).is_dir():
        raise UserError(f"--images {root}: no such folder")
    files = image_files(str(root))
    if not files:
        raise UserError(f"--images {root}: no image there; allowed: {' '.join(EXTENSIONS)}")
    return Folder(str(root), files, sorted({class_of(file) for file in files}))
