"""A folder of image files, at any depth; the first folder below the root is the label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from efae_jax.data.remote import Remote
from efae_jax.data.splits import hold_out
from efae_jax.errors import UserError
from efae_jax.logs import waiting
from efae_jax.paths import is_remote

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".jp2", ".ppm", ".pgm"),
)
_TEST_FOLDERS = ("test", "val", "valid", "validation")


class Folder:
    """The image files below `root`, sorted by path; `class_names` fixes the labels' numbers."""

    def __init__(self, root: str, files: Sequence[str], class_names: Sequence[str]):
        self.root = root
        self.files = files
        self.class_names = class_names
        self.num_classes = len(class_names)
        self._labels = {name: number for number, name in enumerate(class_names)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb") as file:
            return {"image": file.read(), "label": self._labels[class_of(self.files[index])]}

    def key(self, index: int) -> str:
        return self.files[index]

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])


class RemoteFolder(Folder):
    """`Folder` on object storage: an image is one request."""

    def __init__(self, root: str, files: Sequence[str], class_names: Sequence[str]):
        super().__init__(root, files, class_names)
        self._remote = Remote(root)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self._labels[class_of(self.files[index])]
        return {"image": self._remote.read(self.name(index)), "label": label}


def make_folder(root: str, files: Sequence[str], class_names: Sequence[str]) -> Folder:
    """`Folder`, here or on object storage."""
    return (RemoteFolder if is_remote(root) else Folder)(root, files, class_names)


def is_folder(path: str) -> bool:
    """Whether there is such a folder, here or on object storage."""
    return Remote(path).is_folder(path) if is_remote(path) else os.path.isdir(path)


def class_of(file: str) -> str:
    """The first folder of a path relative to the root; '' for a file in the root itself."""
    return file.split("/", 1)[0] if "/" in file else ""


def image_files(root: str) -> list[str]:
    """Image files at any depth below root, relative to it, with '/', sorted; no hidden ones."""
    with waiting(f"looking for images in {root}"):
        return sorted(_image_files(root))


def _image_files(root: str) -> list[str]:
    if is_remote(root):
        files = Remote(root).files_below(root)
        return [f for f in files if f.lower().endswith(EXTENSIONS) and "/." not in "/" + f]
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        found += [
            name if inside == "." else f"{inside}/{name}".replace(os.sep, "/")
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return found


def open_folder(config: Any, split: str):
    """The folder data.path for a split.

    Where it has sub-folders `train` and `test` (or `val`), or its path contains '{split}', these
    are the splits; else data.test_fraction of the files is held out, chosen by name.
    """
    roots = _split_roots(config)
    for root in roots.values():
        if not is_folder(root):
            raise UserError(f"data.path: {root!r} is not a folder (of images, at any depth)")
    files = {root: image_files(root) for root in roots.values()}
    for root, found in files.items():
        if not found:
            raise UserError(
                f"data.path: no image in {root!r}; allowed: {' '.join(EXTENSIONS)}, at any depth"
            )
    class_names = sorted({class_of(file) for found in files.values() for file in found})
    source = make_folder(roots[split], files[roots[split]], class_names)
    return source if len(files) == 2 else hold_out(source, split, config.test_fraction)


def _split_roots(config: Any) -> dict[str, str]:
    names = {"train": config.train_split, "test": config.test_split}
    if "{split}" in config.path:
        return {split: config.path.replace("{split}", name) for split, name in names.items()}
    train = os.path.join(config.path, config.train_split)
    for name in (config.test_split, *_TEST_FOLDERS):
        test = os.path.join(config.path, name)
        if train != test and is_folder(train) and is_folder(test):
            return {"train": train, "test": test}
    return {"train": config.path, "test": config.path}
