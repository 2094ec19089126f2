"""Folders of weights, on this machine or on the hub, seen alike: the names they hold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from efae_jax.errors import UserError
from efae_jax.paths import printable

# Endings of files that may be weights, the safest first.
ENDINGS = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".npz", ".pkl")
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder.

    Attributes:
      source: as the user named it, for errors.
      names: the files in it, as "a/b" from its root.
      file: makes a file that is here of a name.
      words: what it is, as the subject of "holds no ...".
      root: its own path; of a repository, its id.
    """

    source: str
    names: frozenset[str]
    file: Callable[[str], Path]
    words: str
    root: Path

    def inside(self, folder: str) -> list[str]:
        """The names right in a folder of it, without that ("" for the root)."""
        start = f"{folder}/" if folder else ""
        inside = (name.removeprefix(start) for name in self.names if name.startswith(start))
        return sorted(name for name in inside if "/" not in name)

    def lacks(self, wanted: str) -> str:
        """The end of an error: what is not there, and which weights are."""
        folders = sorted(self.names, key=lambda name: (name.count("/"), name))
        held = [name for name in folders if PurePosixPath(name).suffix.lower() in ENDINGS]
        some = ", ".join(printable(name) for name in held[:_LISTED])
        more = f" and {len(held) - _LISTED} more" if len(held) > _LISTED else ""
        return f"{self.words} does not hold {printable(wanted)}; " + (
            f"weights there: {some}{more}" if held else "no weights are there"
        )


def here(path: Path, folders: tuple[str, ...]) -> Place:
    """A folder of this machine.

    Args:
      path: of it.
      folders: those in it whose files count, too.

    Raises:
      UserError: it cannot be listed.
    """
    names = []
    for folder in ("", *folders):
        try:
            with os.scandir(path / folder) as entries:
                start = f"{folder}/" if folder else ""
                names += [start + entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(
                f"cannot list {printable(str(path / folder))}: {error.strerror}"
            ) from error
    shown = printable(str(path))
    return Place(shown, frozenset(names), lambda name: path / name, shown, path)


def beside(path: Path) -> Place:
    """The folder of a file; of one that may be entered and not listed, the file alone."""
    try:
        return here(path.parent, ())
    except UserError:
        names = frozenset([path.name])
        shown = printable(str(path.parent))
        return Place(shown, names, lambda name: path.with_name(name), shown, path.parent)
