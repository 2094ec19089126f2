"""Paths on this machine and on object storage (`gs://...`)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from etils import epath

from efae_jax.errors import UserError


def user_path(path: epath.PathLike) -> str:
    """A path as users write it, as the file system has it.

    Shells expand `~` only at the start of a word, so that `--out=~/x` and `webdataset:~/x.tar`
    reach a program as they are. `~` and `~name` become home folders here, `file:///x` becomes `/x`.
    URLs of other kinds, hub ids, and bytes that are no UTF-8 (Python's surrogate escapes) stay.

    Raises:
      UserError: `~name` where there is no such user, or a `file:` URL of another machine.
    """
    text = os.fspath(path)
    if text.startswith("file:"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise UserError(f"{text}: files of another machine ({url.netloc}) cannot be read")
        text = unquote(url.path, errors="surrogateescape")
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text and not os.path.lexists(text):
        name = text.split("/")[0]
        raise UserError(f"{text}: there is no user {name[1:]!r}; ./{name} is a file called so")
    return expanded


def printable(text: str) -> str:
    """One line that every terminal takes: bytes of a name that are no UTF-8 show as \\xNN."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
    path = user_path(path)
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
