"""How many images a command takes at a time, where its user does not say.

Never more than there are. Beyond that the compiled program tells what it needs of a device's
memory, and the batch is halved until that is at most `SHARE` of what is free.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from efae_jax.errors import RunError, UserError

# Of the memory that is free. The compiler's figure leaves out what the libraries take that its
# programs call, and the images that are read ahead need a place as well.
SHARE = 0.5
GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")


class Batch(NamedTuple):
    """Devices, and the images that they take at a time, all together."""

    devices: Sequence[Any]
    size: int

    def halved(self) -> Batch | None:
        """Half the images; a CPU's cores, of which each has one, become fewer. None: it is one."""
        count = len(self.devices)
        if self.size > count:
            return self._replace(size=count * math.ceil(self.size / count / 2))
        if count == 1 or self.devices[0].platform != "cpu" or jax.process_count() > 1:
            return None
        return Batch(self.devices[: count // 2], count // 2)


def first_batch(devices: Sequence[Any], images: int, most: int, given: int | None) -> Batch:
    """The batch to begin with.

    Args:
      devices: that there are.
      images: that there are.
      most: images of a device.
      given: by the user, who is obeyed.

    Returns:
      without `given`, batches of nearly one size that leave little of the last one empty; on no
      more devices than there are images, where all of them are this process's.

    Raises:
      UserError: for a size that is given and cannot be.
    """
    if given is not None:
        if given < 1 or given % len(devices):
            raise UserError(
                f"--batch-size {given} must be a positive multiple of the {len(devices)} devices"
            )
        return Batch(devices, given)
    if all(device.process_index == jax.process_index() for device in devices):
        devices = devices[: max(1, min(len(devices), images))]
    count = len(devices)
    batches = max(1, math.ceil(images / (most * count)))
    return Batch(devices, count * max(1, math.ceil(images / batches / count)))


def smaller(batch: Batch, needed: int | None, free: int | None, what: str) -> Batch | None:
    """The batch to try next; None if this one fits.

    Args:
      batch: that was tried.
      needed: bytes of each device, by the compiler; None where it found them too many.
      free: from `free_memory`; None where it is not known, and all fits that compiles.
      what: the images, such as "an image of 256x256".

    Raises:
      UserError: when nothing is smaller.
    """
    if needed is not None and (free is None or needed <= SHARE * free):
        return None
    found = batch.halved()
    if found is None:
        need = "more than there is" if needed is None else f"{needed / GIB:.2g} GiB"
        there = "" if free is None else f"; {free / GIB:.2g} GiB are free"
        raise UserError(
            f"{what} does not fit into memory: its programs need {need}{there}, of which at most "
            f"{SHARE:.0%} are used. Make the images smaller (--size), or force it with "
            f"--batch-size {batch.size}"
        )
    if needed is not None and free is not None:
        # What will not fit, by the figure of the larger batch, is not compiled. Where devices
        # become fewer, each has as much more of the memory.
        while needed * found.size / batch.size > SHARE * free and (less := found.halved()):
            found = less
    return found


def free_memory(devices: Sequence[Any]) -> int | None:
    """Bytes that programs may still take of each of the devices; None where nobody says.

    Of several processes the same in all of them: the least.
    """
    own = [d for d in devices if d.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        host = free_host_memory()
        free = None if host is None else host // max(1, len(own))
    else:
        figures = [device.memory_stats() or {} for device in own]
        known = all("bytes_limit" in f for f in figures)
        free = min(f["bytes_limit"] - f.get("bytes_in_use", 0) for f in figures) if known else None
    if jax.process_count() > 1 and len(own) < len(devices):
        every = multihost_utils.process_allgather(np.float64(math.inf if free is None else free))
        free = None if not np.isfinite(every).all() else int(np.min(every))
    return free


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes of this machine that the process may still take: what Linux calls available, less
    where a control group (of a container, of a batch system) allows less. None elsewhere.

    Args:
      root: of the file system.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            found += _left_in_groups(root, line)
    return max(0, min(found)) if found else None


def _left_in_groups(root: Path, line: str) -> Iterator[int]:
    """Of the groups, from the process's up, that limit memory: "number:controllers:path"."""
    _, controllers, path = line.split(":", 2)
    top = root / _CGROUPS.relative_to("/")
    if controllers == "":
        names = "memory.max", "memory.current", "inactive_file"
    elif "memory" in controllers.split(","):
        top /= "memory"
        names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    else:
        return
    group = top / path.lstrip("/")
    # In a container the path may be the host's, which is not there; the top is the container's.
    for folder in dict.fromkeys((group, *group.parents, top)):
        if not folder.is_relative_to(top):
            continue
        with contextlib.suppress(OSError, ValueError):  # no limit: "max", or no file at the top
            limit, used = (int((folder / name).read_text()) for name in names[:2])
            yield limit - used + _of_files(folder / "memory.stat", names[2])


def _of_files(statistics: Path, name: str) -> int:
    """Bytes of files that are kept only as long as nobody else needs the memory."""
    with contextlib.suppress(OSError, ValueError):
        for line in statistics.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


@contextlib.contextmanager
def named_in_errors(current: Callable[[], Batch]) -> Iterator[None]:
    """Has a device that runs out of memory say which batch, now, was too large, and the option."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        batch = current()
        said = " ".join(str(error).split())[:160]
        advice = "a smaller --batch-size" if batch.size > 1 else "smaller images (--size)"
        raise RunError(
            f"out of memory with batches of {batch.size} images on {len(batch.devices)} "
            f"device(s); {advice} needs less ({said})"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """Whether the runtime, or the compiler, found too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
