"""Trains EFAE's tiny config in a process of its own, ending as main.py ends.

python tests/run_tiny.py WORKDIR train__steps=4 data__path='"images"' ...
"""

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent
STOPPED = "the same command goes on"


def command(workdir, **overrides):
    """The command that trains the config with these overrides."""
    options = [f"{name}={value!r}" for name, value in overrides.items()]
    return [sys.executable, str(HERE / "run_tiny.py"), str(workdir), *options]


def environment(devices=1, **variables):
    """Of a process with so many devices, and of several where the variables say so."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**kept, "JAX_NUM_CPU_DEVICES": str(devices), **variables}


def start(workdir, devices=1, variables=None, **overrides):
    """The process, with its output as text."""
    return subprocess.Popen(
        command(workdir, **overrides),
        env=environment(devices, **(variables or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=240):
    """(exit code, standard output, standard error) once it has ended."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, errors


def wait_for(process, text, timeout=240):
    """Reads the process' output up to a line with the text; returns what was read."""
    read, timer = "", threading.Timer(timeout, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            read += line
            if text in line:
                return read
    finally:
        timer.cancel()
    raise AssertionError(f"{text!r} never came: {read} {process.stderr.read()}")


def main():
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from tiny import tiny

    from efae_jax import distributed, train

    distributed.start(polls=True)
    overrides = dict(option.split("=", 1) for option in sys.argv[2:])
    config = tiny(**{name: ast.literal_eval(value) for name, value in overrides.items()})
    train.train(config, sys.argv[1])


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from efae_jax.exits import ended_by, leave

    leave(ended_by(main, STOPPED))
