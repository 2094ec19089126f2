"""From a command to its first step: imports, and a run with an empty and a filled program cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from efae_jax.benchmark.pairs import Spread, spread
from efae_jax.errors import RunError, UserError
from efae_jax.logs import console, figures_table

ROUNDS = 3
FIRST_STEP = "step 1/"  # how `logs.TrainProgress` starts its line, where no terminal is
ROOT = Path(__file__).parents[2]
MAIN = ROOT / "main.py"
IMPORTS = ("efae_jax", "efae_jax.api", "efae_jax.train")


class Row(NamedTuple):
    """Seconds from the start of a process."""

    what: str
    seconds: Spread


def measure(config: str = "configs/efae.py:quickstart", rounds: int = ROUNDS) -> list[Row]:
    """Times, each in a process of its own: imports, first steps, cold and with kept programs.

    The interpreter's own start is part of all of them, and a row of its own.

    Args:
      config: of the run whose first step is waited for.
      rounds: processes for each row, in turn.

    Raises:
      UserError: where the package is installed without its repository, which holds main.py.
      RunError: with the process's last line, when one fails.
    """
    if not MAIN.exists():
        raise UserError(f"benchmark startup: there is no {MAIN}; run it from the repository")
    times: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        times.setdefault(what, []).append(seconds)
        # Not `logs.say`, which would take a TPU that the processes started here need.
        console.print(f"startup: {what}: {seconds:.2f} s")

    for _ in range(rounds):
        note("python", run_python("pass"))
        for module in IMPORTS:
            note(f"import {module}", run_python(f"import {module}"))
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            for number, what in enumerate(("cold", "programs kept")):
                workdir = Path(folder) / f"run{number}"
                seconds = first_step(config, workdir, cache)
                note(f"first step of {config}, {what}", seconds)
    return [Row(what, spread(seconds)) for what, seconds in times.items()]


def show(rows: Sequence[Row]) -> None:
    """Prints the rows as a table."""
    cells = [
        [row.what, f"{row.seconds.median:.2f}", f"{row.seconds.low:.2f}-{row.seconds.high:.2f}"]
        for row in rows
    ]
    console.print(figures_table("From the command on", ["", "s", "least-most"], cells))


def run_python(code: str) -> float:
    """Seconds that `python -c CODE` takes.

    Raises:
      RunError: with its last line, when it fails.
    """
    start = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if found.returncode:
        raise RunError(f"python -c {code!r}: {_last_line(found.stderr)}")
    return seconds


def first_step(config: str, workdir: Path, cache: Path) -> float:
    """Seconds until `main.py` reports its first step, which is then stopped.

    Args:
      config: FILE:VARIANT.
      workdir: must not exist yet.
      cache: of compiled programs.

    Raises:
      RunError: with its last line, when it ends without one.
    """
    command = [
        sys.executable,
        str(MAIN),
        f"--config={config}",
        f"--workdir={workdir}",
        "--config.log.every=1",
    ]
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONUNBUFFERED": "1",
    }
    return until_line(command, FIRST_STEP, settings)


def until_line(command: Sequence[str], start: str, settings: Mapping[str, str]) -> float:
    """Seconds until a command prints a line that starts so; the command is then killed.

    Raises:
      RunError: when it ends before.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | dict(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = ""
    try:
        for line in process.stdout:
            if line.startswith(start):
                return time.perf_counter() - began
            last = line.strip() or last
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    raise RunError(f"{' '.join(command[1:])}: no line {start!r}...; the last was: {last}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
