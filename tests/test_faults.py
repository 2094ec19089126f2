"""What happens to runs: each fault is made, not simulated, and the run goes on exactly."""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import run_tiny
from conftest import ROOT, first_device
from saved_models import folder_of_images
from tiny import tiny

from efae_jax import train
from efae_jax.checkpoint import Checkpoints
from efae_jax.errors import RunError, Stopped
from efae_jax.run import Run

# A schedule that does not know the run's length, so that runs of any length are alike.
CUT = {"optim__schedule": "constant", "optim__warmup": 2}
pytestmark = pytest.mark.usefixtures("only_one_device")


def one_error(errors):
    """The last line, if it is the only one that is no warning."""
    assert "Traceback" not in errors, errors
    lines = [line for line in errors.strip().splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1, errors
    return lines[0]


def restored(workdir, step=None, **overrides):
    run = Run(tiny(**CUT, **overrides), jax.devices()[:1])
    checkpoints = Checkpoints(workdir)
    state, examples = checkpoints.restore(run.abstract_state, step)
    checkpoints.close()
    assert examples == 8 * int(state["step"])
    return jax.device_get(state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """States by step of a run that nothing happened to."""
    states = {}

    def state(step, **overrides):
        key = (step, *overrides.items())
        if key not in states:
            with first_device():
                workdir = tmp_path_factory.mktemp(f"whole{step}")
                config = tiny(**CUT, train__steps=step, checkpoint__every=step, **overrides)
                states[key] = jax.device_get(train.train(config, workdir))
        return states[key]

    return state


# Signals


def test_sigterm_saves_and_the_same_command_goes_on_exactly(tmp_path, uninterrupted):
    """Through main.py; meanwhile a second run on the same work directory is refused."""
    endless = {"train__steps": 100_000, "checkpoint__every": 100_000, "log__every": 3}
    first = run_tiny.start(tmp_path, **CUT, **endless)
    run_tiny.wait_for(first, "step 3/")
    code, _, errors = run_tiny.finish(run_tiny.start(tmp_path, **CUT, **endless))
    assert code == 2
    assert f"another run is at work there (process {first.pid} on " in one_error(errors)
    first.send_signal(signal.SIGTERM)
    code, out, errors = run_tiny.finish(first)
    assert code == 75
    assert one_error(errors) == f"stopped by SIGTERM; {run_tiny.STOPPED}"
    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest()
    checkpoints.close()
    assert step >= 3
    assert f"saved at step {step:,} of 100,000" in out
    assert_same(restored(tmp_path), uninterrupted(step))
    more = endless | {"train__steps": step + 2}
    code, out, errors = run_tiny.finish(run_tiny.start(tmp_path, **CUT, **more))
    assert code == 0, errors
    assert f"resumed at step {step:,}" in out
    assert_same(restored(tmp_path), uninterrupted(step + 2))


def test_sigterm_in_the_last_step_is_heard(tmp_path, monkeypatch):
    """The run is done and saved, but what would come after it must not start."""
    save = Checkpoints.save

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", signalled)
    with pytest.raises(Stopped):
        train.train(tiny(train__steps=2, checkpoint__every=5), tmp_path)
    assert train.has_checkpoint(tmp_path)


def test_ctrl_c_saves_too(tmp_path):
    endless = {"train__steps": 100_000, "checkpoint__every": 100_000, "log__every": 3}
    process = run_tiny.start(tmp_path, **endless)
    run_tiny.wait_for(process, "step 3/")
    process.send_signal(signal.SIGINT)
    code, out, errors = run_tiny.finish(process)
    assert code == 130
    assert one_error(errors) == f"stopped; {run_tiny.STOPPED}"
    assert "Ctrl-C again: at once" in out
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_kill_during_the_first_step_loses_nothing(tmp_path, uninterrupted):
    endless = {"train__steps": 100_000, "checkpoint__every": 100_000}
    process = run_tiny.start(tmp_path, **CUT, **endless)
    run_tiny.wait_for(process, "the first step is compiled")
    process.kill()
    code, _, _ = run_tiny.finish(process)
    assert code == -signal.SIGKILL
    assert not train.has_checkpoint(tmp_path)
    assert_same(
        jax.device_get(train.train(tiny(**CUT, train__steps=3), tmp_path)), uninterrupted(3)
    )


def test_a_kill_during_a_save_leaves_the_checkpoint_before(tmp_path, uninterrupted):
    """Wider, so that a save takes a while; killed while its temporary folder is there."""
    folder, wide = tmp_path / "checkpoints", {"model__velocity__width": 256}
    options = {**CUT, **wide, "train__steps": 100_000, "checkpoint__every": 1}
    for _ in range(5):
        process = run_tiny.start(tmp_path, **options)
        complete, cut, deadline = [], [], time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not (complete and cut):
            names = os.listdir(folder) if folder.is_dir() else []
            complete = [int(name) for name in names if name.isdigit()]
            cut = [name for name in names if "tmp" in name]
        process.kill()
        run_tiny.finish(process)
        cut = [name for name in os.listdir(folder) if "tmp" in name]
        if cut:
            break
    assert cut, "no save was ever caught"
    complete = max(int(name) for name in os.listdir(folder) if name.isdigit())
    expected = restored(tmp_path, **wide)
    assert expected["step"] == complete
    options |= {"train__steps": complete + 1}
    code, out, errors = run_tiny.finish(run_tiny.start(tmp_path, **options))
    assert code == 0, errors
    assert f"resumed at step {complete:,} " in out
    assert not [name for name in os.listdir(folder) if "tmp" in name]
    assert_same(restored(tmp_path, **wide), uninterrupted(complete + 1, **wide))


# Disks


def in_namespace(script, *arguments):
    """Runs a shell script that may mount."""
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments],
        cwd=ROOT,
        env=run_tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def mounts():
    if shutil.which("unshare") is None or in_namespace("mount -t tmpfs tmpfs /mnt").returncode:
        pytest.skip("mounting in a namespace is not allowed here")


def test_a_full_disk_stops_the_run_and_with_more_room_it_goes_on(tmp_path, mounts, uninterrupted):
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    options = {**CUT, "train__steps": 30, "checkpoint__every": 2, "checkpoint__keep": 100}
    script = f"""
        mount -t tmpfs -o size=1500k tmpfs {disk} || exit
        "$@"
        echo "exit code $?"
        ls {run}/checkpoints
        mount -o remount,size=100m {disk}
        echo "more room"
        "$@" && cp -r {run}/checkpoints {tmp_path}/kept
    """
    result = in_namespace(script, *run_tiny.command(run, **options))
    first, _, second = result.stdout.partition("more room")
    assert "exit code 1\n" in first, result
    error = one_error(result.stderr)
    assert "No space left on device" in error
    step = max(int(line) for line in first.splitlines() if line.isdigit())
    assert error.endswith(f"the same command goes on from step {step:,}")
    assert f"resumed at step {step:,} " in second
    assert result.returncode == 0
    (tmp_path / "kept").rename(tmp_path / "checkpoints")
    assert_same(restored(tmp_path), uninterrupted(30))


def test_a_work_directory_that_cannot_be_written(tmp_path, mounts):
    (tmp_path / "disk").mkdir()
    result = in_namespace(
        'mount -t tmpfs -o ro tmpfs "$1" && shift && exec "$@"',
        str(tmp_path / "disk"),
        *run_tiny.command(tmp_path / "disk" / "run"),
    )
    assert result.returncode == 2
    error = one_error(result.stderr)
    assert error == f"error: --workdir={tmp_path}/disk/run: Read-only file system"


@pytest.mark.parametrize("what", ["arrays", "metadata", "position"])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, uninterrupted, what):
    config = tiny(**CUT, train__steps=6)
    train.train(config, tmp_path)
    newest = tmp_path / "checkpoints" / "6"
    file = {
        "arrays": max((newest / "params").rglob("*"), key=lambda p: p.stat().st_size),
        "metadata": newest / "opt" / "_METADATA",
        "position": newest / "data" / "metadata",
    }[what]
    os.truncate(file, file.stat().st_size // 2)
    capsys.readouterr()
    state = train.train(config, tmp_path)
    out = capsys.readouterr().out
    assert "checkpoint 6 is damaged: " in out
    assert "going back to the one before" in out
    assert "resumed at step 3 " in out
    assert_same(jax.device_get(state), uninterrupted(6))
    assert (tmp_path / "checkpoints" / "damaged-6").is_dir()
    assert_same(restored(tmp_path), uninterrupted(6))  # saved anew


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"), jax.errors.JaxRuntimeError),
        (ValueError("UNAVAILABLE: 503"), RunError),
        (PermissionError(13, "Permission denied"), PermissionError),
        (ValueError("shape (1,) is not compatible with the stored shape (2,)"), RunError),
    ],
)
def test_what_is_no_damage_costs_no_checkpoint(finished, monkeypatch, error, raised):
    def fails(self, *arguments):
        raise error

    monkeypatch.setattr(Checkpoints, "_restore", fails)
    with pytest.raises(raised):
        train.train(tiny(**CUT, train__steps=6), finished)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["3", "6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with first_device():
        workdir = tmp_path_factory.mktemp("finished")
        train.train(tiny(**CUT, train__steps=6), workdir)
        return workdir


def test_damage_everywhere_is_one_line_and_changes_nothing(tmp_path):
    config = tiny(**CUT, train__steps=6)
    train.train(config, tmp_path)
    for step in ("3", "6"):
        (tmp_path / "checkpoints" / step / "params" / "_METADATA").write_text("")
    with pytest.raises(RunError, match=r"checkpoint 6 is damaged: .*; checkpoint 3 is damaged"):
        train.train(config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]


# Data and numbers


def test_images_that_vanish_stop_the_run_and_coming_back_it_goes_on(tmp_path, uninterrupted):
    images, run = folder_of_images(tmp_path / "images", [(12, 12)] * 40), tmp_path / "run"
    data = {"data__source": "folder", "data__path": str(images), "data__crop": "center"}
    data["data__test_fraction"] = 0.2
    options = {**CUT, **data, "checkpoint__every": 100_000, "log__every": 3, "data__max_bad": 3}
    process = run_tiny.start(run, train__steps=100_000, **options)
    run_tiny.wait_for(process, "step 3/")
    images.rename(tmp_path / "elsewhere")
    code, out, errors = run_tiny.finish(process)
    assert code == 1
    error = one_error(errors)
    assert "data: " in error
    assert "gone since the files were listed" in error
    (step,) = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"saved at step {step:,}" in out
    (tmp_path / "elsewhere").rename(images)
    train.train(tiny(train__steps=step + 2, **options), run)
    expected = train.train(tiny(train__steps=step + 2, **options), tmp_path / "whole")
    assert_same(restored(run), jax.device_get(expected))


def test_a_loss_that_is_not_finite_ends_with_the_step_and_keeps_what_was_saved(tmp_path):
    options = {"optim__lr": 1e30, "optim__clip": 0.0, "optim__warmup": 3, "log__every": 1}
    process = run_tiny.start(tmp_path, train__steps=100, checkpoint__every=1, **options)
    code, _, errors = run_tiny.finish(process)
    assert code == 1
    error = one_error(errors)
    assert "is nan at step" in error or "is inf at step" in error
    step = int(error.split("at step ")[1].split(";")[0])
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == step - 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_a_lock_that_a_killed_run_left_holds_nobody(tmp_path):
    train.train(tiny(train__steps=1), tmp_path)
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".holder.json").write_text('{"process": 1, "host": "gone"}')
    train.train(tiny(train__steps=2), tmp_path)
    assert not (tmp_path / ".holder.json").exists()
