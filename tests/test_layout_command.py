"""The command `layout` as a user types it."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def layout(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "efae_jax", "layout", *map(str, arguments)],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_layout_is_printed_and_written(tmp_path):
    file = tmp_path / "layout.json"
    smoke = ["--config", "configs/efae.py:smoke", "--config.data.size=(8,8)"]
    # The flag would give 3 devices, were it heard.
    flags = "--xla_force_host_platform_device_count=3"
    result = layout(
        *smoke, "--devices", 8, "--mesh", "data=2,fsdp=4", "--json", file, XLA_FLAGS=flags
    )
    assert result.returncode == 0, result.stderr
    for words in ("on 8 x CPU", "data=2, fsdp=4, batch 16", "optimiser state", "all-gather"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:20])) <= 100
    record = json.loads(file.read_text())
    assert record["mesh"] == {"data": 2, "fsdp": 4}
    held = sum(record["held"].values())
    # A device's two labels are not read by the step.
    assert held - 2 * 4 <= record["arguments"] < record["needed"]
    assert {c["kind"] for c in record["collectives"]} >= {"all-reduce", "all-gather"}
    assert record["compiler"].startswith("cpu (JAX ")
    assert record["overrides"] == ["--config.data.size=(8,8)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/none.py"], "configs/none.py"),
        (["--config", "configs/efae.py:huge"], "configs/efae.py:huge is not one of"),
        (["--config", "configs/efae.py:smoke", "--config.train.batchsize=8"], "batchsize"),
        (["--config", "configs/efae.py:smoke", "--devices=8", "--mesh=fsdp=3"], "config.mesh"),
        (["--config", "configs/efae.py:smoke", "--target", "tpu"], "no accelerator type"),
        (["--config", "configs/efae.py:smoke", "--json", "/nowhere/x.json"], "no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    result = layout(*arguments)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert message in lines[0]


def test_an_option_of_no_command_is_refused():
    for command in ("layout", "compare"):
        result = subprocess.run(
            [sys.executable, "-m", "efae_jax", command, "--config=x", "--out=o", "e", "--stray=1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert "unrecognized arguments" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install libtpu")
@pytest.mark.parametrize("target", ["v5e-8", "v4-32"])
def test_a_tpu_that_is_not_there(tmp_path, target):
    file = tmp_path / "layout.json"
    smoke = ["--config", "configs/efae.py:smoke", "--mesh=fsdp=4"]
    result = layout(*smoke, f"--target={target}", "--json", file)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == ""
    record = json.loads(file.read_text())
    assert record["dtype"] == "bfloat16"
    assert record["mesh"] == {"data": {"v5e-8": 2, "v4-32": 4}[target], "fsdp": 4}
    assert "libtpu" in record["compiler"]
