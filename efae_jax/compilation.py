"""Compiled programs that are kept on disk, so that the next start does not compile them again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from efae_jax.paths import absolute

FOLDER = "compilation_cache"
_HIT = "/jax/compilation_cache/cache_hits"


def keep_programs(workdir: epath.PathLike) -> None:
    """Has JAX keep every program that it compiles from here on in `workdir/compilation_cache`.

    Where the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`), it stays that one, with
    JAX's own thresholds. Entries are found by program, devices, and version of JAX.
    """
    folder = str(absolute(workdir) / FOLDER)
    chosen = jax.config.jax_compilation_cache_dir
    by_user = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if by_user or (chosen is not None and Path(chosen).name != FOLDER):
        return
    if chosen not in (None, folder):  # that of a run before this one, in the same process
        compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def count_cache_hits() -> Iterator[list[str]]:
    """Gives a list that grows by one for every program read back from the cache meanwhile."""
    hits: list[str] = []

    def note(event: str, **_: object) -> None:
        if event == _HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(note)
