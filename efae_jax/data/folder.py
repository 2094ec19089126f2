"""A folder of image files, at any depth; the first folder below the root is the label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from efae_jax.data.image_types import (
    COMPANIONS,
    extension,
    foreign,
    is_image,
    listed_extensions,
    stored,
)
from efae_jax.data.left_out import LeftOut
from efae_jax.data.remote import Remote
from efae_jax.data.splits import Source, hold_out
from efae_jax.errors import UserError
from efae_jax.logs import waiting
from efae_jax.paths import is_remote, printable, user_path

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_CACHES = (".git", ".cache", ".thumbnails", ".ipynb_checkpoints")  # copies, or no images at all


class Folder:
    """The image files below `root`, sorted by path; `class_names` fixes the labels' numbers."""

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        class_names: Sequence[str],
        left_out: LeftOut | None = None,
    ):
        self.root = root
        self.files = files
        self.class_names = class_names
        self.left_out = LeftOut() if left_out is None else left_out
        self.num_classes = len(class_names)
        self._labels = {name: number for number, name in enumerate(class_names)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.name(index)
        label = self._labels[class_of(self.files[index])]
        return {"image": stored(self._content(name), name), "label": label}

    def _content(self, name: str) -> bytes:
        with open(name, "rb") as file:
            return file.read()

    def key(self, index: int) -> str:
        return self.files[index]

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])


class RemoteFolder(Folder):
    """`Folder` on object storage: an image is one request."""

    def __init__(self, root: str, *args: Any):
        super().__init__(root, *args)
        self._remote = Remote(root)

    def _content(self, name: str) -> bytes:
        return self._remote.read(name)


def make_folder(
    root: str,
    files: Sequence[str],
    class_names: Sequence[str],
    left_out: LeftOut | None = None,
) -> Folder:
    """`Folder`, here or on object storage."""
    return (RemoteFolder if is_remote(root) else Folder)(root, files, class_names, left_out)


def is_folder(path: str) -> bool:
    """Whether there is such a folder, here or on object storage."""
    return Remote(path).is_folder(path) if is_remote(path) else os.path.isdir(path)


def class_of(file: str) -> str:
    """The first folder of a path relative to the root; '' for a file in the root itself."""
    return file.split("/", 1)[0] if "/" in file else ""


def image_files(root: str, left_out: LeftOut | None = None) -> list[str]:
    """Image files at any depth below root, relative to it, with '/', sorted; no hidden ones.

    Args:
      left_out: counts the images that are not among them, by kind.
    """
    left_out = LeftOut() if left_out is None else left_out
    with waiting(f"looking for images in {root}"):
        found = _remote_files(root) if is_remote(root) else _local_files(root, left_out)
        return sorted(file for file in found if _wanted(file, left_out))


def _wanted(file: str, left_out: LeftOut) -> bool:
    if is_image(file):
        if "/." in "/" + file:
            left_out.add("hidden files (their names, or their folders', begin with a dot)", file)
            return False
        return True
    if kind := foreign(file):
        left_out.add(kind, file)
    elif extension(file) not in COMPANIONS and "/." not in "/" + file:
        left_out.add("no images by the endings of their names", file)
    return False


def _remote_files(root: str) -> list[str]:
    return Remote(root).files_below(root)


def _local_files(root: str, left_out: LeftOut) -> list[str]:
    found, seen = [], set()

    def closed(error: OSError) -> None:
        left_out.add(f"folders that cannot be read ({error.strerror})", str(error.filename))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=closed):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up, or to what was read already
            left_out.add("folders that a link leads to once more", folder)
            subfolders.clear()
            continue
        seen.add(real)
        for name in [name for name in subfolders if name.startswith(".")]:
            if name not in _CACHES and _holds_image(os.path.join(folder, name)):
                left_out.add("hidden folders with images", os.path.join(folder, name))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        found += [
            name if inside == "." else f"{inside}/{name}".replace(os.sep, "/") for name in names
        ]
    return found


def _holds_image(folder: str) -> bool:
    """Whether there is an image file in a folder itself."""
    try:
        return any(is_image(name) for name in os.listdir(folder))
    except OSError:
        return False


def has_splits(config: Any) -> bool:
    """Whether data.path has a folder for each split."""
    return len({*_split_roots(config).values()}) == 2


def open_folder(config: Any, split: str) -> Source:
    """The folder data.path for a split.

    Where it has sub-folders `train` and `test` (or `val`), or its path contains '{split}', these
    are the splits; else data.test_fraction of the files is held out, chosen by name.
    """
    roots = _split_roots(config)
    for root in roots.values():
        if not is_folder(root):
            raise UserError(
                f"data.path: '{printable(root)}' is not a folder (of images, at any depth)"
            )
    left_out = {root: LeftOut() for root in roots.values()}
    files = {root: image_files(root, left_out[root]) for root in left_out}
    for root, found in files.items():
        if not found:
            raise UserError(no_image(root, left_out[root]))
    class_names = sorted({class_of(file) for found in files.values() for file in found})

    def source(root: str) -> Folder:
        return make_folder(root, files[root], class_names, left_out[root])

    if len(files) == 1:
        return hold_out(source(roots["train"]), split, config.test_fraction)
    _count_beside(roots, left_out)
    return source(roots[split])


def no_image(root: str, left_out: LeftOut) -> str:
    """The message for a folder without an image that is read here."""
    what = "; ".join(f"{n} {kind}" for kind, n in left_out.counts())
    return (
        f"no image in '{printable(root)}'{f' ({what})' if what else ''}; allowed: "
        f"{listed_extensions()}, at any depth"
    )


def _count_beside(roots: dict[str, str], left_out: dict[str, LeftOut]) -> None:
    """Counts the folders beside those of the splits, whose images belong to neither."""
    parents = {os.path.dirname(root.rstrip("/")) for root in roots.values()}
    if len(parents) > 1 or any(map(is_remote, parents)):
        return
    (parent,) = parents
    taken = {os.path.basename(root.rstrip("/")) for root in roots.values()}
    for name in sorted(os.listdir(parent or ".")):
        path = os.path.join(parent, name)
        if name not in taken and not name.startswith("."):
            if is_image(name):
                left_out[roots["train"]].add("images beside the folders of the splits", path)
            elif os.path.isdir(path) and _holds_image(path):
                left_out[roots["train"]].add("folders beside those of the splits", path)


def _split_roots(config: Any) -> dict[str, str]:
    names = {"train": config.train_split, "test": config.test_split}
    root = user_path(config.path)
    if "{split}" in root:
        return {split: root.replace("{split}", name) for split, name in names.items()}
    train = os.path.join(root, config.train_split)
    for name in (config.test_split, *_TEST_FOLDERS):
        test = os.path.join(root, name)
        if train != test and is_folder(train) and is_folder(test):
            return {"train": train, "test": test}
    return {"train": root, "test": root}
