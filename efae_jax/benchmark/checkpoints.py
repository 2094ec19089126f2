"""Checkpoints one after the other: how long each takes, and whether memory grows with them."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from efae_jax.benchmark.pairs import Spread, spread
from efae_jax.checkpoint import Checkpoints
from efae_jax.logs import console, figures_table, track
from efae_jax.methods import complete_config
from efae_jax.run import Run

ROUNDS = 200


class Row(NamedTuple):
    """What holds once so many checkpoints are written.

    Attributes:
      checkpoints: since the start.
      milliseconds: of each since the row before, until it is on disk.
      resident: bytes of memory that the process holds; None where there is no /proc.
      blocks: in use by Python's objects. They stay where they were while resident memory, of which
        allocators keep what was freed, comes and goes.
    """

    checkpoints: int
    milliseconds: Spread
    resident: int | None
    blocks: int


def measure(variant: str = "quickstart", rounds: int = ROUNDS) -> list[Row]:
    """Saves the state of a run again and again, in a temporary folder.

    Args:
      variant: of `configs/efae.py`.
      rounds: how many checkpoints.
    """
    from configs import efae

    config = complete_config(efae.get_config(variant))
    state, as_json = Run(config).init(), json.loads(config.to_json_best_effort())
    ends = {max(1, rounds * quarter // 4) for quarter in (1, 2, 3, 4)}  # a row at each
    rows, times = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, owner=True)
        for number in track(range(1, rounds + 1), rounds, "checkpoints"):
            began = time.perf_counter()
            checkpoints.save(number, state, number, as_json)
            checkpoints.wait()
            times.append(1e3 * (time.perf_counter() - began))
            if number in ends:
                gc.collect()
                rows.append(Row(number, spread(times), _resident(), sys.getallocatedblocks()))
                times = []
        checkpoints.close()
    return rows


def show(rows: Sequence[Row]) -> None:
    """Prints the rows as a table."""
    cells = []
    for row in rows:
        resident = "" if row.resident is None else f"{row.resident / 1e6:,.1f}"
        median = f"{row.milliseconds.median:,.0f}"
        cells.append([f"{row.checkpoints:,}", median, resident, f"{row.blocks:,}"])
    names = ["checkpoints", "ms", "MB resident", "Python's blocks"]
    console.print(figures_table("Saving again and again", names, cells))


def _resident() -> int | None:
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
