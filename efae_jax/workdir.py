"""A run's work directory: made by one process, held against every other run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator

import jax
from etils import epath
from filelock import FileLock, Timeout

from efae_jax import distributed
from efae_jax.checkpoint import check_config, write_config
from efae_jax.errors import UserError
from efae_jax.paths import is_remote

LOCK, HOLDER = ".lock", ".holder.json"


@contextlib.contextmanager
def hold(workdir: epath.Path, config: dict) -> Iterator[None]:
    """Makes the work directory, keeps other runs out of it within, and writes the config into it.

    The lock is the operating system's, on the file `.lock`: it ends with the process, however
    that ends. Object storage has none, so there nothing keeps a second run out.

    Args:
      workdir: the same for all processes, of which the first does all this.
      config: as JSON.

    Raises:
      UserError: on every process, when another run is at work there, or it cannot be written.
    """
    lock: FileLock | None = None

    def take() -> None:
        nonlocal lock
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is a file; give a directory")
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if not is_remote(workdir):
                lock = _lock(workdir)
            check_config(workdir, config)  # again: another run may have ended here since
            write_config(workdir, config)
        except UserError:
            if lock is not None:
                lock.release()
            raise
        except OSError as error:
            if lock is not None:
                lock.release()
            raise UserError(f"--workdir={workdir}: {error.strerror or error}") from error

    distributed.first_does(take)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # what went wrong before says more
                (workdir / HOLDER).unlink(missing_ok=True)
            lock.release()


def _lock(workdir: epath.Path) -> FileLock:
    lock = FileLock(workdir / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"--workdir={workdir}: another run is at work there{_holder(workdir)}; wait for it, "
            "stop it, or give another --workdir"
        ) from error
    about = {"process": os.getpid(), "host": socket.gethostname(), "processes": jax.process_count()}
    (workdir / HOLDER).write_text(json.dumps(about))
    return lock


def _holder(workdir: epath.Path) -> str:
    try:
        there = json.loads((workdir / HOLDER).read_text())
        return f" (process {there['process']} on {there['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock
        return ""
