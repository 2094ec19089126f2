"""The command `layout`: a config, a mesh, and what the compiled step takes of each device."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efae_jax.errors import UserError, config_mistake


def layout(
    config_file: str,
    overrides: Sequence[str] = (),
    *,
    devices: int | None = None,
    target: str | None = None,
    mesh: str | None = None,
    plan: int | None = None,
    largest: int = 8,
    json_file: Path | None = None,
) -> None:
    """Prints memory per device, parameters and collectives of a config's training step.

    Nothing is run and nothing is written but `json_file`. `prepare_environment` must have been
    called, with the same devices and target, before JAX was imported.

    Args:
      config_file: of configs/, and :variant.
      overrides: "--config.field=value", as main.py takes them.
      devices: simulated CPUs to compile for; all devices here unless one of these two is given.
      target: an accelerator type of Google Cloud to compile for, such as "v5e-8".
      mesh: "data=4,fsdp=2" instead of the config's.
      plan: which program, from 1; the one with the largest sides unless given.
      largest: how many of the parameters are listed.
      json_file: gets all of it.

    Raises:
      UserError: for a mistake in any of these.
      RunError: when the compiler says that the step does not fit.
    """
    config = read_config(config_file, overrides)
    from efae_jax.layout import tables
    from efae_jax.layout.measure import choose_plan, measure
    from efae_jax.layout.targets import default_platform, find_target
    from efae_jax.logs import console, say, waiting
    from efae_jax.methods import complete_config
    from efae_jax.run import Run

    if largest < 0:
        raise UserError(f"--largest {largest} must be at least 0")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no such folder")
    found = find_target(target)
    with config.unlocked():
        if mesh is not None:
            config.mesh.data, config.mesh.fsdp = parse_mesh(mesh)
        if target is not None and config.dtype == "auto":
            config.dtype = "bfloat16"  # what it is there; here, where it compiles, is a CPU
    with default_platform(found.devices[0].platform):
        run = Run(complete_config(config), found.devices)
        chosen, which = choose_plan(run, plan)
        say(f"compiling {config_file} for {found.name}; it takes seconds to many minutes")
        with stopped_at_once(), waiting("compiling"):
            measured = measure(run, chosen)
    title = f"{config_file}{', ' + which if which else ''}, on {found.name}"
    for table in tables.all_tables(title, run, found, measured, largest):
        console.print(table)
    for line in tables.remarks(run, found, measured):
        say(line)
    if json_file is not None:
        record = {
            "config": config_file,
            "overrides": list(overrides),
            "program": which,
            **tables.record(run, found, measured),
        }
        try:
            json_file.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {json_file}: {error.strerror or error}") from error


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Has Ctrl-C and SIGTERM end the process at once, with nothing to save.

    Python would hear of them when the compiler returns, after minutes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_config(config_file: str, overrides: Sequence[str]) -> Any:
    """A config as main.py reads it.

    Raises:
      UserError: for a file, a variant or a field that there is not, and for a wrong value.
    """
    from absl import flags
    from ml_collections import config_flags

    values, words = flags.FlagValues(), ["layout", f"--config={config_file}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    try:
        rest = values(words)
        holder.value.to_dict()  # a file that is not there is noticed at the first access
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(config_mistake(error)) from error
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}")
    return holder.value


def parse_mesh(text: str) -> tuple[int, int]:
    """("data=4,fsdp=2") -> (4, 2); data is -1, what fsdp leaves, unless given, fsdp 1.

    Raises:
      UserError: for anything else.
    """
    sizes = {"data": -1, "fsdp": 1}
    for part in text.split(","):
        found = re.fullmatch(r"(data|fsdp)=(-?\d+)", part.strip())
        if not found:
            raise UserError(f"--mesh {text}: give axes of the mesh, such as data=4,fsdp=2")
        sizes[found[1]] = int(found[2])
    return sizes["data"], sizes["fsdp"]
