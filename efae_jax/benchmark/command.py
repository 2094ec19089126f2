"""The command `benchmark`: runs jobs, prints tables, writes all that was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from efae_jax import __version__
from efae_jax.benchmark import checkpoints, startup
from efae_jax.benchmark.jobs import JOBS, OURS, Options, make_setting
from efae_jax.benchmark.measure import Row, measure, reason
from efae_jax.benchmark.pairs import Spread
from efae_jax.benchmark.peaks import Peak, peak_of
from efae_jax.errors import RunError, UserError
from efae_jax.logs import console, figures_table, say

FORMAT = 1
OTHERS = ("input", "startup", "checkpoints")  # asked for by name only
PEERS = ("torch", "diffusers")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", *PEERS)


def benchmark(
    jobs: Sequence[str], options: Options, rounds: int | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Measures, prints a table after each job, and writes what there is so far.

    Args:
      jobs: names out of `JOBS` and `OTHERS`; all of `JOBS` unless given.
      options: of the jobs.
      rounds: turns of every contender; chosen by job unless given.
      out: a JSON file, written anew after every job.

    Returns:
      what is written: format, machine, options, and the jobs' rows by name.

    Raises:
      UserError: an unknown job, peers that are not installed, a file that cannot be written.
      RunError: in the end, when this package could not do one of the jobs.
    """
    jobs = list(dict.fromkeys(jobs)) or list(JOBS)
    if unknown := [name for name in jobs if name not in (*JOBS, *OTHERS)]:
        raise UserError(
            f"benchmark: {unknown[0]!r} is not a job; there are {', '.join((*JOBS, *OTHERS))}"
        )
    if rounds is not None and rounds < 1:
        raise UserError(f"--rounds {rounds} must be at least 1")
    if options.peer:
        need_peers()
    done: dict[str, Any] = {}
    if "startup" in jobs:  # before JAX takes the devices, of which some serve one process only
        done["startup"] = _attempt("startup", None, None, options, rounds)
    record: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(),
        "options": options._asdict() | {"rounds": rounds},
        "jobs": done,
    }
    write(record, out)
    setting, peak = None, None
    if any(name in JOBS for name in jobs):
        setting = make_setting(options)
        peak = peak_of(setting.devices[0], setting.dtype, 256 if options.small else 2048)
        record["peak"] = {"teraflops": peak.flops / 1e12, "dtype": setting.dtype} | {
            "what": peak.source
        }
        say(f"{describe(record)}\n{peak.flops / 1e12:,.3g} TFLOP/s, {setting.dtype}, {peak.source}")
    for name in jobs:
        if name not in done:
            if name in JOBS and peak is not None:
                # Where it is measured: again, as the machine may have been busy then.
                again = peak_of(setting.devices[0], setting.dtype, 256 if options.small else 2048)
                peak = max(peak, again)
                record["peak"]["teraflops"] = peak.flops / 1e12
            done[name] = _attempt(name, setting, peak, options, rounds)
            write(record, out)
    if out is not None:
        say(f"wrote {out}")
    if failed := [name for name, rows in done.items() if _failed(rows)]:
        raise RunError(f"benchmark: not measured, for the reasons above: {', '.join(failed)}")
    return record


def _failed(rows: list[dict[str, Any]]) -> bool:
    """Whether it is this package that could not do a job; peers may fail."""
    return any(row.get("why") and row.get("contender", OURS) == OURS for row in rows)


def _attempt(
    name: str, setting: Any, peak: Peak | None, options: Options, rounds: int | None
) -> list[dict[str, Any]]:
    """A job's rows; of one that fails for want of memory or the like, a row that says why."""
    try:
        return _run(name, setting, peak, options, rounds)
    except UserError:
        raise
    except Exception as error:  # the jobs before it are measured already, others come after
        console.print(f"{name}: {reason(error)}", markup=False)
        return [{"job": name, "why": reason(error)}]


def _run(
    name: str, setting: Any, peak: Peak | None, options: Options, rounds: int | None
) -> list[dict[str, Any]]:
    given = {} if rounds is None else {"rounds": rounds}
    if name == "startup":
        config = "configs/efae.py:smoke" if options.small else "configs/efae.py:quickstart"
        rows = startup.measure(config, **given)
        startup.show(rows)
    elif name == "checkpoints":
        rows = checkpoints.measure("smoke" if options.small else "quickstart", **given)
        checkpoints.show(rows)
    elif name == "input":
        # It needs the loaders' packages, which the other jobs do without.
        from efae_jax.benchmark import input as reading

        small = {"size": 32, "images": 8, "batch_size": 4, "batches": 2} if options.small else {}
        rows = reading.measure(peer=options.peer, **given, **small)
        reading.show(rows)
    else:
        rows = measure(JOBS[name](setting), peak, rounds)
        for table in tables(rows, peak):
            console.print(table)
        for row in rows:
            if row.why is not None:
                say(f"{name}: {row.contender}: not measured: {row.why}")
    return [as_json(row) for row in rows]


def need_peers() -> None:
    """Raises UserError unless what the peers are written in is installed."""
    if missing := [name for name in PEERS if find_spec(name) is None]:
        raise UserError(
            f"--peer compares with PyTorch, but {' and '.join(missing)} cannot be imported: "
            f"pip install {' '.join(missing)}"
        )


def machine() -> dict[str, Any]:
    """Devices, cores, and versions."""
    versions = {"python": platform.python_version(), "efae_jax": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions,
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(record: dict[str, Any]) -> str:
    """The machine in a line."""
    m = record["machine"]
    what = m["processor"] if m["platform"] == "cpu" else m["device"]
    packages = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if k in ("jax", *PEERS))
    return f"{what}, {m['devices']} device(s), {m['cores']} cores; {packages}"


def write(record: dict[str, Any], out: Path | None) -> None:
    """Writes the file whole or not at all.

    Raises:
      UserError: when it cannot be written.
    """
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error


def as_json(row: Any) -> dict[str, Any]:
    """A row's fields, named tuples in it as dictionaries, without what is None."""
    found = {}
    for name, value in row._asdict().items():
        if value is not None:
            found[name] = as_json(value) if hasattr(value, "_asdict") else value
    return found


SPEED = ["", "images/s", "ms", "least-most", "times ours"]
COST = ["", "TFLOP/s", "of peak", "memory", "compile"]


def tables(rows: Sequence[Row], peak: Peak) -> list[Any]:
    """A job's speeds, and what they cost: two tables that fit into 80 columns."""
    speed, cost = [], []
    for row in rows:
        if row.why is not None:
            continue
        times = "" if row.ratio is None else _range(row.ratio, ".2f", f"{row.ratio.median:.2f} ")
        speed.append(
            [
                row.contender,
                f"{row.images_per_second:,.3g}",
                f"{row.milliseconds.median:,.1f}",
                _range(row.milliseconds, ",.1f"),
                "1" if row.contender == OURS else times,
            ]
        )
        cost.append(
            [
                row.contender,
                "" if row.teraflops is None else f"{row.teraflops:,.3g}",
                "" if row.share is None else f"{100 * row.share:.0f}%",
                "" if row.memory is None else f"{row.memory.bytes / 2**30:,.2f} GiB",
                f"{row.compile_seconds:,.1f} s",
            ]
        )
    title = f"{rows[0].job}: {rows[0].what}"
    return [figures_table(title, SPEED, speed), figures_table(f"peak: {peak.source}", COST, cost)]


def _range(values: Spread, form: str, before: str = "") -> str:
    return f"{before}{values.low:{form}}-{values.high:{form}}"
