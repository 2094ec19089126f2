"""The images that a user names on the command line, in the stead of the config's."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, NamedTuple

from efae_jax.data.folder import (
    Folder,
    class_of,
    image_files,
    is_folder,
    make_folder,
    no_image,
)
from efae_jax.data.left_out import LeftOut
from efae_jax.data.sources import SOURCES, has_splits, make_source
from efae_jax.data.splits import ALL, Source
from efae_jax.errors import UserError
from efae_jax.paths import printable, user_path


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
    test_fraction: float | None = None,
    size: int | None = None,
    max_pixels: int | None = None,
    default_split: str = "train",
) -> Chosen:
    """Opens the images that are given, or the config's.

    Args:
      config: `config.data`, for what is not given.
      data: a folder, for every image in it, at any depth; or SOURCE:PATH, as `config.data.source`
        and `config.data.path` name a data set ("glyphs" has no path).
      data_dir: as `config.data.data_dir`.
      split: "train", "test" or "all". Unless given: of data without splits of their own, all; of
        others and of the config's, `default_split`.
      test_fraction: as `config.data.test_fraction`, where some images are held out.
      size: of the square that they are resized (shorter side) and cropped to (centre).
      max_pixels: as `config.data.max_pixels`.

    Raises:
      UserError: for what is not there or does not fit.
    """
    config = config.copy_and_resolve_references()
    if data is not None:
        source, path = named(data)
        whole = source == FOLDER and not data.startswith(f"{FOLDER}:")
        if whole and (
            split not in (None, ALL) or data_dir is not None or test_fraction is not None
        ):
            raise UserError(
                f"--data {printable(data)} takes every image of a folder; --split, "
                "--test-fraction and --data-dir belong to --data SOURCE:PATH, SOURCE one of "
                f"{', '.join(SOURCES)}"
            )
    else:
        whole = False
    with config.unlocked():
        if data is not None:
            config.source, config.path = source, path
        for name, value in (
            ("data_dir", data_dir),
            ("test_fraction", test_fraction),
            ("max_pixels", max_pixels),
        ):
            if value is not None:
                config[name] = value
        if size is not None:
            config.size, config.pad = (size, size), 0
    if whole:
        split, found = "", _whole_folder(str(data))
    else:
        try:
            if split is None:
                split = ALL if data is not None and not has_splits(config) else default_split
            if test_fraction is not None and (split == ALL or has_splits(config)):
                raise UserError(
                    f"--test-fraction {test_fraction:g}: nothing is held out of split {split!r} of "
                    f"{config.source}:{config.path}; give it with --split train or test, for data "
                    "without splits of their own"
                )
            found = make_source(config, split)
        except UserError as error:
            if data is not None:
                raise
            raise UserError(f"{error}; --data FOLDER or --data SOURCE:PATH names others") from error
    where = {"source": config.source, "path": printable(config.path), "split": split}
    return Chosen(found, config, {**where, **describe(found)})


FOLDER = "folder"


def named(data: str) -> tuple[str, str]:
    """(source, path) of what a user names: a folder, or SOURCE:PATH.

    Raises:
      UserError: for nothing, and for glyphs with a path.
    """
    source, _, path = data.partition(":")
    if not data or (source == "glyphs" and path):
        raise UserError(
            f"--data {data!r}: give a folder (./glyphs, should it be called so), SOURCE:PATH, or "
            "glyphs, which has no path"
        )
    if source in SOURCES and (path or source == "glyphs"):
        return source, user_path(path)
    return FOLDER, user_path(data)


def describe(source: Source) -> dict[str, Any]:
    """{images: their number, keys: a hash of their names}: what tells images from others."""
    keys = sha256()
    for i in range(len(source)):
        keys.update(source.key(i).encode("utf-8", "surrogateescape") + b"\0")
    return {"images": len(source), "keys": keys.hexdigest()}


def _whole_folder(data: str) -> Folder:
    root = user_path(data)
    if not is_folder(root):
        raise UserError(
            f"--data {printable(data)}: no such folder, nor SOURCE:PATH with SOURCE one of "
            f"{', '.join(SOURCES)}"
        )
    left_out = LeftOut()
    files = image_files(root, left_out)
    if not files:
        raise UserError(f"--data: {no_image(root, left_out)}")
    return make_folder(root, files, sorted({class_of(file) for file in files}), left_out)
