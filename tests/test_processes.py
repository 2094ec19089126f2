"""Several real processes do what one does: losses, figures, latents, checkpoints."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import run_tiny
from run_processes import config
from saved_models import folder_of_images

from efae_jax import distributed
from efae_jax.checkpoint import Checkpoints
from efae_jax.data.latents import Latents
from efae_jax.errors import UserError
from efae_jax.run import Run

SCRIPT = str(run_tiny.HERE / "run_processes.py")


def start(count, devices, command):
    """Processes that know of each other, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            command,
            env=run_tiny.environment(
                devices,
                XLA_FLAGS="--xla_backend_optimization_level=0",  # compiles in a fraction
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES=str(count),
                JAX_PROCESS_ID=str(number),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def finish(processes):
    try:
        return [run_tiny.finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(folder, count, devices, *stages):
    """Runs the stages; returns what each process printed."""
    results = finish(start(count, devices, [sys.executable, SCRIPT, str(folder), *stages]))
    for code, out, errors in results:
        assert code == 0, out + errors
    return [out for _, out, _ in results]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """11 images, one of them damaged: no number of processes divides them."""
    return folder_of_images(tmp_path_factory.mktemp("data") / "images", [(9, 12)] * 11, broken=[4])


@pytest.fixture(scope="module")
def one(tmp_path_factory, images):
    """A single process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "images").symlink_to(images)
    run(folder, 1, 4, "train", "validate", "evaluate", "encode")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, images, one):
    """Two processes with two devices each."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "images").symlink_to(images)
    shutil.copytree(one / "train", folder / "resume")
    shutil.rmtree(folder / "resume" / "checkpoints" / "6")
    return folder, run(folder, 2, 2, "train", "validate", "resume", "evaluate", "encode")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes with a device each."""
    folder = tmp_path_factory.mktemp("four")
    return folder, run(folder, 4, 1, "train")


def restored(workdir, examples=6 * 8):
    run = Run(config(), jax.devices()[:2])
    checkpoints = Checkpoints(workdir)
    state, consumed = checkpoints.restore(run.abstract_state)
    checkpoints.close()
    assert consumed == examples
    return jax.device_get(state)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def numbers(tree):
    """Those of a record's leaves that are no words, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, str)]


def curve(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "autoencoder/loss", "autoencoder/flow", "autoencoder/gradient_norm")
    return [{name: line[name] for name in names} for line in lines]


@pytest.mark.parametrize("several", ["two", "four"])
def test_training_is_that_of_one_process(request, one, several):
    folder, out = request.getfixturevalue(several)
    assert_close(curve(folder / "train"), curve(one / "train"))
    # Adam's first steps have the size of the learning rate, whatever the gradient's.
    assert_close(restored(folder / "train"), restored(one / "train"), rtol=1e-3, atol=2e-5)
    assert "step 6/6" in out[0]
    assert all("step" not in other for other in out[1:])


def test_quick_figures_are_those_of_one_process(one, two):
    folder, _ = two
    ours, theirs = (
        json.loads((f / "train" / "eval" / "figures.json").read_text()) for f in (folder, one)
    )
    assert ours["images"] == theirs["images"] == 21
    assert_close(ours["figures"], theirs["figures"], rtol=1e-3)


def test_a_run_of_one_process_goes_on_in_two(one, two):
    folder, out = two
    assert "resumed at step 3 " in out[0]
    assert_close(curve(folder / "resume"), curve(one / "train"))
    assert_close(restored(folder / "resume"), restored(one / "train"), rtol=1e-3, atol=2e-5)


def test_an_evaluation_is_exact_under_uneven_shares(one, two):
    ours, theirs = (
        json.loads((folder / "evaluate" / "evaluation.json").read_text())
        for folder in (two[0], one)
    )
    assert ours["images"] == theirs["images"] == 10
    assert ours["data"]["unreadable"] == 1
    assert theirs["reconstruction"]["frechet"] > 0
    for part in ("reconstruction", "transformations", "errors"):
        assert_close(numbers(ours[part]), numbers(theirs[part]), rtol=2e-3, atol=1e-4)
    for name in ("mean", "std", "excess_kurtosis", "correlation"):
        assert_close(ours["latent"][name], theirs["latent"][name], rtol=2e-3, atol=1e-4)


def test_latents_are_those_of_one_process(one, two):
    ours, theirs = (Latents(folder / "encode") for folder in (two[0], one))
    assert len(ours) == len(theirs) == 10
    for a, b in zip(ours, theirs, strict=True):
        assert (a["key"], a["label"], a["index"]) == (b["key"], b["label"], b["index"])
        np.testing.assert_allclose(a["latent"], b["latent"], rtol=1e-3, atol=2e-4)
    ours, theirs = (
        json.loads((folder / "encode" / "latents.json").read_text()) for folder in (two[0], one)
    )
    assert ours["shards"] == theirs["shards"]
    assert [len(summary["unreadable"]) for summary in (ours, theirs)] == [1, 1]
    for name in ("mean", "std"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_sigterm_of_one_stops_all_at_the_same_step(tmp_path):
    endless = {"train__steps": 100_000, "checkpoint__every": 100_000, "mesh__data": -1}
    processes = start(2, 1, run_tiny.command(tmp_path, **endless))
    run_tiny.wait_for(processes[0], "step 2/")
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [75, 75], results
    (step,) = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"saved at step {int(step):,} of" in results[0][1]
    assert restored(tmp_path, examples=8 * int(step))["step"] == int(step)


def test_what_the_first_cannot_do_ends_all(tmp_path):
    (tmp_path / "file").write_text("")
    results = finish(start(2, 1, run_tiny.command(tmp_path / "file", mesh__data=-1)))
    for number, (code, _, errors) in enumerate(results):
        assert code == 2
        assert f"process {number} of 2: error: --workdir={tmp_path}/file is a file" in errors


def test_one_that_is_killed_ends_the_others(tmp_path):
    endless = {"train__steps": 100_000, "checkpoint__every": 100_000, "mesh__data": -1}
    processes = start(2, 1, run_tiny.command(tmp_path, **endless))
    run_tiny.wait_for(processes[0], "step 4/")
    os.kill(processes[1].pid, signal.SIGKILL)
    code, _, errors = finish(processes)[0]
    assert code not in (0, 2, 75)
    assert "process 0 of 2: error: another process of this run is gone" in errors


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "must be numbers"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "from 0 to JAX_NUM_PROCESSES - 1 = 1"),
        ({"EFAE_DISTRIBUTED": "yes"}, "the only value is auto"),
    ],
)
def test_mistakes_in_the_environment(environment, message):
    if "JAX_PROCESS_ID" in environment:
        environment["JAX_COORDINATOR_ADDRESS"] = "127.0.0.1:1"
    with pytest.raises(UserError, match=message):
        distributed.start(polls=True, environment=environment)


def test_what_the_environment_says(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    for environment in (
        {},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8"},  # a shell inside an allocation
    ):
        distributed.start(polls=True, environment=environment)
        assert calls == []
    for environment in ({"SLURM_STEP_NUM_TASKS": "8"}, {"EFAE_DISTRIBUTED": "auto"}):
        distributed.start(polls=True, environment=environment)
        assert calls.pop() == {}
    distributed.start(
        polls=True,
        environment={
            "JAX_COORDINATOR_ADDRESS": "host:123",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "3",
            "SLURM_STEP_NUM_TASKS": "8",
        },
    )
    (call,) = calls
    assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == (
        "host:123",
        4,
        3,
    )
