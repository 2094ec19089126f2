"""The images that a user names on the command line, in the stead of the config's."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, NamedTuple

from efae_jax.data.folder import EXTENSIONS, Folder, class_of, image_files, is_folder, make_folder
from efae_jax.data.sources import SOURCES, make_source
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
    data: str | None = None,
    *,
    data_dir: str | None = None,
    split: str | None = None,
    size: int | None = None,
    default_split: str = "train",
) -> Chosen:
    """Opens the images that are given, or the config's.

    Args:
      config: `config.data`, for what is not given.
      data: a folder, for every image in it, at any depth; or SOURCE:PATH, as `config.data.source`
        and `config.data.path` name a split of a data set ("glyphs" has no path).
      data_dir: as `config.data.data_dir`.
      split: "train" or "test"; `default_split` unless given.
      size: of the square that they are resized (shorter side) and cropped to (centre).

    Raises:
      UserError: for what is not there or does not fit.
    """
    config = config.copy_and_resolve_references()
    source, _, path = (data or "").partition(":")
    if data == "" or (source == "glyphs" and path):
        raise UserError(
            f"--data {data!r}: give a folder (./glyphs, should it be called so), SOURCE:PATH, or "
            "glyphs, which has no path"
        )
    whole = data is not None and (source not in SOURCES or not (path or source == "glyphs"))
    if whole and (split is not None or data_dir is not None):
        raise UserError(
            f"--data {data} takes every image of a folder; --split and --data-dir belong to "
            f"--data SOURCE:PATH, SOURCE one of {', '.join(SOURCES)}"
        )
    with config.unlocked():
        if whole:
            config.source, config.path = "folder", str(data)
        elif data is not None:
            config.source, config.path = source, path
        if data_dir is not None:
            config.data_dir = data_dir
        if size is not None:
            config.size, config.pad = (size, size), 0
    split = "" if whole else split or default_split
    try:
        found = _whole_folder(str(data)) if whole else make_source(config, split)
    except UserError as error:
        if data is not None:
            raise
        raise UserError(f"{error}; --data FOLDER or --data SOURCE:PATH names others") from error
    where = {"source": config.source, "path": config.path, "split": split}
    return Chosen(found, config, {**where, **describe(found)})


def describe(source: Source) -> dict[str, Any]:
    """{images: their number, keys: a hash of their names}: what tells images from others."""
    keys = sha256()
    for i in range(len(source)):
        keys.update(source.key(i).encode("utf-8", "surrogateescape") + b"\0")
    return {"images": len(source), "keys": keys.hexdigest()}


def _whole_folder(root: str) -> Folder:
    if not is_folder(root):
        raise UserError(
            f"--data {root}: no such folder, nor SOURCE:PATH with SOURCE one of "
            f"{', '.join(SOURCES)}"
        )
    files = image_files(root)
    if not files:
        raise UserError(f"--data {root}: no image there; allowed: {' '.join(EXTENSIONS)}")
    return make_folder(root, files, sorted({class_of(file) for file in files}))
