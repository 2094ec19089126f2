"""Whether memory comes in huge pages, without which programs for CPUs are slower.

XLA asks for a program's whole scratch memory anew in every call. The C library fetches so much
from the kernel and gives it back, page by page: of 4 KiB each, where the kernel wants to be asked
for huge ones (2 MiB) and nobody asks. README, Speed, has what that costs.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

TUNABLE = "glibc.malloc.hugetlb"
SETTING = f"GLIBC_TUNABLES={TUNABLE}=1"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GLIBC = (2, 35)  # the first that knows the tunable


def advice() -> str | None:
    """A line for the user of a CPU who could set the variable; None where it would not help.

    It counts when a process starts, so that it cannot be set from within.
    """
    asked = TUNABLE in os.environ.get("GLIBC_TUNABLES", "")
    if asked or jax.default_backend() != "cpu" or not (kernel_waits() and glibc_can_ask()):
        return None
    return f"{SETTING} before the command makes CPUs faster (README, Speed)"


def kernel_waits() -> bool:
    """Whether the kernel gives huge pages to those who ask, and to nobody else."""
    try:
        return "[madvise]" in _KERNEL.read_text()
    except OSError:  # not Linux, or built without them
        return False


def glibc_can_ask() -> bool:
    """Whether the C library is glibc 2.35 or newer."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _GLIBC
    except (ValueError, OSError, AttributeError):  # no glibc
        return False
