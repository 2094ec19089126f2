"""The commands as a user types them: what they write, and one line for every mistake."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

QUICK = [
    "--config.train.steps=4",
    "--config.checkpoint.every=2",
    "--config.log.every=2",
    "--config.data.size=(8,8)",
    "--config.data.num_test=9",
    "--config.eval.batch_size=8",
    "--config.eval.pictures=2",
]


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def smoke(workdir, *more):
    return run("main.py", "--config=configs/efae.py:smoke", f"--workdir={workdir}", *more)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "smoke"
    result = smoke(path, *QUICK)
    assert result.returncode == 0, result.stderr
    assert "step 4/4  loss" in result.stdout
    assert "images/s" in result.stdout
    assert "PSNR (dB)" in result.stdout
    assert "equivariance.png" in result.stdout
    assert "Traceback" not in result.stderr
    return path


def test_training_writes_all_it_promises(workdir):
    there = {p.relative_to(workdir).as_posix() for p in workdir.rglob("*")}
    assert {
        "config.json",
        "parameters.txt",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints/4",
        "eval/figures.json",
        "eval/figures.txt",
        "eval/equivariance.png",
        "eval/flow.gif",
    } <= there
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 4


def test_evaluation_alone_gives_the_same_figures(workdir):
    before = json.loads((workdir / "eval/figures.json").read_text())["figures"]
    result = smoke(workdir, *QUICK, "--mode=eval")
    assert result.returncode == 0, result.stderr
    assert json.loads((workdir / "eval/figures.json").read_text())["figures"] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.batchsize=8"], "no field 'batchsize' Did you mean \"batch_size\""),
        (["--config.train.batch_size=many"], "batch_size"),
        (["--config.group.name=d5"], "z2xz2"),
        (["--config.train.accumulate=3"], "devices x accumulate"),
        (["--config.data.size=(10,10)"], "multiples of 4"),
        (["--config.data.source=imagenet"], "glyphs"),
        (["--mode=sample"], "train"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    result = smoke(tmp_path / "run", *arguments)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["main.py", "--config=configs/efae.py:tiny", "--workdir=x"],
            "error: configs/efae.py:tiny is not one of quickstart, mnist",
        ),
        (["main.py", "--config=configs/none.py", "--workdir=x"], "configs/none.py"),
        (["main.py", "--workdir=x"], "--config is missing"),
        (["main.py", "--config=configs/efae.py:smoke"], "--workdir is missing"),
        (["-m", "efae_jax", "evaluate", "--model", "/nowhere", "--out", "x"], "/nowhere"),
        (["-m", "efae_jax", "export", "/nowhere", "out", "--format=onnx"], "efae"),
        (["-m", "efae_jax", "import", "/nowhere.npz", "/nowhere/w"], "/nowhere.npz"),
    ],
)
def test_mistakes_in_what_is_named(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert message in lines[0]


def test_a_run_of_another_config_is_refused(workdir):
    result = smoke(workdir, *QUICK, "--config.optim.lr=0.1")
    assert result.returncode == 2
    assert "config.optim.lr: 0.001 there, 0.1 given" in result.stderr


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = smoke(tmp_path / "file" / "run", *QUICK)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_export_and_import_through_the_command_line(tmp_path, workdir):
    """The original's architecture: trained for a step, exported, imported, exported again."""
    trained, imported = tmp_path / "mnist", tmp_path / "imported"
    result = run(
        "main.py",
        "--config=configs/efae.py:mnist",
        f"--workdir={trained}",
        "--config.data.source=glyphs",
        "--config.data.num_test=4",
        "--config.train.steps=1",
        "--config.train.batch_size=4",
        "--config.model.velocity.depth=1",
        "--config.eval.batch_size=4",
        "--config.eval.steps=1",
        "--config.eval.pictures=1",
    )
    assert result.returncode == 0, result.stderr
    for source, out in ((trained, "a"), (imported, "b")):
        result = run("-m", "efae_jax", "export", source, tmp_path / f"{out}.safetensors")
        assert result.returncode == 0, result.stderr
        if out == "a":
            result = run("-m", "efae_jax", "import", tmp_path / "a.safetensors", imported)
            assert result.returncode == 0, result.stderr
    first, second = (tmp_path / f"{n}.safetensors" for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["architecture"]["heads"] == 4
    refused = run("-m", "efae_jax", "export", workdir, tmp_path / "c.safetensors")
    assert refused.returncode == 2
    assert "configs/efae.py:mnist" in refused.stderr
    assert not (tmp_path / "c.safetensors").exists()
    assert np.isfinite(
        json.loads((trained / "eval/figures.json").read_text())["figures"]["h"]["psnr"]
    )
