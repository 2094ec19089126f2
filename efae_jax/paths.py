"""Paths on this machine and on object storage (`gs://...`)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from efae_jax.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names object storage, as `gs://bucket/folder` does."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """From the root of the file system, or of the object storage."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def workdir_path(path: epath.PathLike) -> epath.Path:
    """A work directory's path, local or not.

    Raises:
      UserError: where what reads that kind of storage is not installed.
    """
    try:
        path = epath.Path(path)
        if is_remote(path):
            path.exists()
    except ImportError as error:
        raise UserError(
            f"{path}: object storage needs `pip install -r requirements-gcs.txt` ({error})"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} cannot be reached: {reason[0]}") from error
    return path


@contextlib.contextmanager
def local_folder(path: epath.Path) -> Iterator[Path]:
    """A folder of this machine to write files into: the path itself, or one that is copied there.

    Pictures and event files are written by libraries that know local files only.
    """
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        copy_files(Path(folder), path)


def copy_files(folder: Path, target: epath.Path) -> None:
    """Copies the files of a local folder, at any depth, over those of the same names."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        there = target / file.relative_to(folder).as_posix()
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(file.read_bytes())
