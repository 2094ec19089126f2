"""Keeping the memory that programs for CPUs work in, which is otherwise fetched anew in every call.

XLA allocates a program's whole scratch memory when it is called and frees it when it returns. glibc
takes so much from the kernel and gives it back at once, so that every call begins by having the
kernel find and clear its pages, 4 KiB at a time. README, Speed, has what that costs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points

# Of malloc.h, with their values: nothing from outside the heap; none of it given back; one heap,
# as those of further threads hold 64 MB at most.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def keep_scratch_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Has glibc keep what is freed, in a process whose programs run on CPUs; whether it will.

    For the process of a command, which is its own; it then holds at least as much memory as it
    ever needed. Must come before JAX makes its devices, whose threads choose their heaps. It leaves
    alone what `GLIBC_TUNABLES` says of malloc, other C libraries, and installations of JAX for
    accelerators (unless `JAX_PLATFORMS=cpu`), where programs do not work in this memory.
    """
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") or not _on_cpus(environment):
        return False
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [mallopt(*setting) == 1 for setting in _SETTINGS.values()]
    return all(accepted)


def _on_cpus(environment: Mapping[str, str]) -> bool:
    """Whether JAX can have nothing but CPUs here, without asking it for devices."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    plugins = importlib.util.find_spec("jax_plugins") or entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
