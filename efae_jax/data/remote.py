"""Files on object storage (`gs://bucket/...`, or any scheme that fsspec knows)."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec

from efae_jax.errors import UserError

_GAP = 2**16  # bytes between two ranges below which one request reads both


class Remote:
    """A file system by a URL of it; paths are URLs. Shared by threads, opened anew by processes.

    Raises:
      UserError: for a scheme that is not known, or whose package is not installed.
    """

    def __init__(self, url: str):
        self._url = url
        self._open()

    def _open(self) -> None:
        scheme = self._url.partition("://")[0]
        try:
            self._fs, _ = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            ours = scheme in ("gs", "gcs")
            needs = "pip install -r requirements-gcs.txt" if ours else f"more: {error}"
            raise UserError(f"{self._url}: {scheme}:// needs {needs}") from error
        except ValueError as error:
            raise UserError(f"{self._url}: no such kind of storage: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, url: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or bytes [start, end) of it, in one request."""
        return self._fs.cat_file(url, start=start, end=end)

    def read_two(
        self, url: str, one: tuple[int, int], other: tuple[int, int]
    ) -> tuple[bytes, bytes]:
        """Two ranges (offset, size) of a file: in one request where they are close together."""
        first, last = min(one[0], other[0]), max(sum(one), sum(other))
        if last - first > one[1] + other[1] + _GAP:
            return tuple(self.read(url, offset, offset + size) for offset, size in (one, other))
        both = self.read(url, first, last)
        return tuple(both[offset - first :][:size] for offset, size in (one, other))

    def size(self, url: str) -> int:
        """Bytes of a file."""
        with reached(url):
            return self._fs.info(url)["size"]

    def is_folder(self, url: str) -> bool:
        with reached(url):
            return self._fs.isdir(url)

    def files_below(self, url: str) -> list[str]:
        """All files at any depth, relative to the URL."""
        with reached(url):
            root = self._fs._strip_protocol(url).rstrip("/") + "/"
            found = [path.removeprefix(root) for path in self._fs.find(url)]
            self._fs.invalidate_cache()  # the listing: a kilobyte a file
        return found

    def matching(self, patterns: Sequence[str]) -> Iterator[str]:
        """The URLs of the existing files among URLs with or without wildcards."""
        listed: dict[str, set[str]] = {}
        for pattern in patterns:
            with reached(pattern):
                folder = pattern.rpartition("/")[0]
                if glob.has_magic(pattern):
                    start = pattern.removesuffix(self._fs._strip_protocol(pattern))
                    yield from (start + path for path in self._fs.glob(pattern))
                elif folder not in listed:  # one request for all files there
                    listed[folder] = self._listing(folder)
            if folder in listed and self._fs._strip_protocol(pattern) in listed[folder]:
                yield pattern

    def _listing(self, folder: str) -> set[str]:
        try:
            return set(self._fs.ls(folder, detail=False))
        except FileNotFoundError:
            return set()


@contextmanager
def reached(url: str) -> Iterator[None]:
    """Makes a UserError of any: storage fails for want of a bucket, credentials, a network."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.path: {url} cannot be reached: {reason[0]}") from error
