"""A layout as tables, remarks and a record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
from rich.table import Table

from efae_jax.layout.measure import Layout
from efae_jax.layout.targets import Target
from efae_jax.logs import figures_table
from efae_jax.run import Run

PATH_WIDTH = 34  # letters of a parameter's path that are shown: all fits into 80 columns


def all_tables(
    title: str, run: Run, target: Target, measured: Layout, largest: int
) -> Iterator[Table]:
    """Memory, the largest parameters, collectives."""
    yield memory_table(title, run, target, measured)
    if largest:
        rows = [
            [
                a.path if len(a.path) <= PATH_WIDTH else "..." + a.path[3 - PATH_WIDTH :],
                "x".join(map(str, a.shape)) or "scalar",
                a.spec,
                size(a.own),
            ]
            for a in measured.arrays[:largest]
        ]
        columns = ["largest parameters", "shape", "split over", "per device"]
        yield figures_table("", columns, rows)
    rows = [
        [
            c.kind,
            str(c.group) if c.group else "",
            f"{c.count:,}{' or more' if c.uncertain else ''}",
            size(c.bytes),
        ]
        for c in measured.collectives
    ]
    columns = ["collectives per step", "among devices", "count", "arrays"]
    yield figures_table("", columns, rows or [["none", "", "", ""]])


def memory_table(title: str, run: Run, target: Target, measured: Layout) -> Table:
    """Bytes per device: what is held, what the program adds, the sum beside the memory."""
    total = measured.needed
    rows = [
        [name, size(own), share(own, measured.totals[name])]
        for name, own in measured.held.items()
        if own or name in ("parameters", "batch")
    ]
    rows += [
        ["all these, as the compiler lays them out", size(measured.arguments), ""],
        ["activations and temporaries", size(measured.temporaries), ""],
        ["results that replace nothing", size(measured.outputs), ""],
        ["program", size(measured.code), ""],
        ["the next batch", size(measured.next_batch), ""],
        ["needed", size(total), ""],
    ]
    if target.memory:
        fits = share(total, target.memory)
        rows.append(["memory of the device", size(target.memory), f"{fits} needed"])
    return figures_table(title, [settings(run), "per device", "of the whole"], rows)


def settings(run: Run) -> str:
    """Mesh and batch in words."""
    train, mesh = run.config.train, dict(run.mesh.shape)
    parts = f", {train.accumulate} parts" if train.accumulate > 1 else ""
    remat = ", remat" if train.remat else ""
    return f"data={mesh['data']}, fsdp={mesh['fsdp']}, batch {train.batch_size}{parts}{remat}"


def remarks(run: Run, target: Target, measured: Layout) -> Iterator[str]:
    """What the tables do not say."""
    if measured.operations:
        parts = run.config.train.accumulate
        again = f", {parts} parts of a batch" if parts > 1 else ""
        yield (
            f"operations of a step on a device: {measured.operations / 1e12:.3g} TFLOP, as the "
            f"compiler counts those of its program{again}"
        )
    yield (
        f"compiled in {measured.seconds:.0f} s by the compiler of {compiler(target)}, dtype "
        f"{run.config.dtype}; evaluation, and what other programs leave in memory, come on top"
    )
    if target.devices[0].platform == "cpu":
        yield "a GPU's or TPU's compiler fuses and lays out differently, above all in bfloat16"


def record(run: Run, target: Target, measured: Layout) -> dict[str, Any]:
    """All of it for JSON; bytes, and counts per device and step."""
    return {
        "target": target.name,
        "memory": target.memory,
        "compiler": compiler(target),
        "mesh": dict(run.mesh.shape),
        "batch_size": run.config.train.batch_size,
        "accumulate": run.config.train.accumulate,
        "remat": run.config.train.remat,
        "dtype": run.config.dtype,
        "needed": measured.needed,
        **_plain(measured),
    }


def compiler(target: Target) -> str:
    """Platform and versions."""
    platform = target.devices[0].platform
    versions = f"JAX {jax.__version__}"
    if platform == "tpu":
        with contextlib.suppress(PackageNotFoundError):  # it may come without its metadata
            versions += f", libtpu {version('libtpu')}"
    return f"{platform} ({versions})"


def size(count: int) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def share(part: int, whole: int) -> str:
    """Per cent, empty of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else ""


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dictionaries."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(v) for name, v in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value
