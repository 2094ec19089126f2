"""The command `benchmark`: its figures, its table and file, and what it does with failures."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from efae_jax.__main__ import main
from efae_jax.benchmark import command, jobs, measure, startup
from efae_jax.benchmark.measure import Contender, Job, Memory, clock, memory_of, operations
from efae_jax.benchmark.peaks import Peak, known_peak, peak_of
from efae_jax.benchmark.sizes import ACCELERATOR, CPU, SMALL, choose_sizes
from efae_jax.errors import RunError, UserError

PEAK = Peak(1e12, "of a test")


def contender(seconds, **fields):
    """One that says how long it took."""
    values = iter(seconds)
    return Contender(lambda count: next(values), compile_seconds=0.5, **fields)


def job(**contenders):
    return Job("made up", "of no size", 4, 2, contenders)


def test_figures_of_a_job():
    rows = measure.measure(
        job(
            ours=lambda: contender([9, 2.0, 1.0, 4.0], operations=1e12, memory=Memory(8, "x")),
            theirs=lambda: contender([9, 4.0, 3.0, 4.0]),
        ),
        PEAK,
        rounds=3,
    )
    ours, theirs = rows
    assert ours.milliseconds == (2000, 1000, 4000)
    assert (ours.images_per_second, ours.teraflops, ours.share) == (2.0, 0.5, 0.25)
    assert ours.ratio is None
    assert ours.memory == (8, "x")
    # Pair by pair: 4/2, 3/1, 4/4; its operations are the first contender's.
    assert theirs.ratio == (2.0, 1.0, 3.0)
    assert theirs.teraflops == 0.25


def test_short_calls_are_repeated_and_slow_ones_take_fewer_rounds():
    counts = []
    fast = lambda: Contender(lambda count: counts.append(count) or 0.01, 0.0)  # noqa: E731
    measure.measure(job(ours=fast), PEAK)
    assert counts == [1, 1] + measure.ROUNDS * [100]
    counts.clear()
    slow = lambda: Contender(lambda count: counts.append(count) or 5.0, 0.0)  # noqa: E731
    measure.measure(job(ours=slow), PEAK)
    assert counts == [1] + measure.SLOW_ROUNDS * [1]


def test_a_contender_that_fails_has_a_row_that_says_why():
    def broken():
        raise RuntimeError("\nno compiler here\nand a long trace")

    def later():
        turns = iter([1.0, 1.0])

        def run(count):
            try:
                return next(turns)
            except StopIteration:
                raise MemoryError("out of memory") from None

        return Contender(run, 0.0)

    rows = measure.measure(
        job(ours=lambda: contender([1.0] * 9), broken=broken, later=later), PEAK, rounds=3
    )
    assert rows[0].milliseconds.median == 1000
    assert rows[1].why == "RuntimeError: no compiler here"
    assert rows[2].why == "MemoryError: out of memory"
    assert rows[2].milliseconds is None
    for table in command.tables(rows, PEAK):
        assert table.row_count == 1


def test_a_mistake_of_the_users_is_no_row():
    def wrong():
        raise UserError("not so")

    with pytest.raises(UserError, match="not so"):
        measure.measure(job(ours=wrong), PEAK)


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "float32", 494.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 71),
        ("Tesla V100-SXM2-16GB", "float32", 15.7),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
    ],
)
def test_known_peaks(kind, dtype, teraflops):
    assert known_peak(kind, dtype).flops == teraflops * 1e12


def test_unknown_devices_are_measured():
    assert known_peak("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16") is None
    assert known_peak("cpu", "float32") is None
    peak = peak_of(jax.devices()[0], "float32", side=64)
    assert peak.flops > 0
    assert "measured" in peak.source


def test_operations_and_memory_of_a_program():
    a = jnp.ones((64, 32))
    lowered = jax.jit(lambda a: a @ a.T).lower(a)
    compiled = lowered.compile()
    assert operations(lambda: lowered, compiled) == pytest.approx(2 * 64 * 64 * 32, rel=0.01)
    memory = memory_of(compiled, jax.devices()[0], None)
    assert memory.bytes >= 4 * (64 * 32 + 64 * 64)
    assert memory.what == "planned by the compiler"


def test_the_devices_high_water_mark_counts_where_a_program_raised_it():
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 100}

    compiled = jax.jit(lambda a: a + 1).lower(jnp.ones(4)).compile()
    assert memory_of(compiled, Device(), 60) == Memory(100, "allocated on the device")
    assert memory_of(compiled, Device(), 100).what == "planned by the compiler"


def test_the_clock_waits_for_the_device():
    waited = []

    class Result:
        def block_until_ready(self):
            waited.append(time.perf_counter())

    clock(Result, 3, wait=False)
    assert len(waited) == 1
    clock(Result, 3, wait=True)
    assert len(waited) >= 4


def test_sizes_follow_the_device():
    assert choose_sizes("cpu", False) is CPU
    assert choose_sizes("gpu", False) is choose_sizes("tpu", False) is ACCELERATOR
    assert choose_sizes("gpu", True) is SMALL
    sizes = ACCELERATOR.dit
    assert (sizes.side // sizes.patch) ** 2 == 256
    assert sizes.width == 1024


@pytest.mark.parametrize("name", ["efae", "dit", "sample", "encode", "decode", "kl", "eq"])
def test_every_job_has_a_setting_for_every_machine(monkeypatch, name):
    """Nothing is computed: contenders build themselves when they are measured."""
    monkeypatch.setattr(jobs.jax, "jit", lambda f: lambda *a: jax.eval_shape(f, *a))
    monkeypatch.setattr(jobs.jax, "device_get", lambda tree: tree)
    for sizes in (ACCELERATOR, CPU, SMALL):
        setting = jobs.Setting(jobs.Options(), sizes, jax.devices()[:1])
        made = jobs.JOBS[name](setting)
        assert made.name == name
        assert made.images >= 1
        assert list(made.contenders) == [jobs.OURS]


def test_command(tmp_path, capsys):
    out = tmp_path / "new" / "benchmark.json"
    assert main(["benchmark", "dit", "decode", "--small", "--rounds", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "of the best matrix product measured here" in text
    record = json.loads(out.read_text())
    assert record["format"] == command.FORMAT
    assert set(record["jobs"]) == {"dit", "decode"}
    for (row,) in record["jobs"].values():
        assert row["contender"] == "efae_jax"
        assert row["milliseconds"]["low"] <= row["milliseconds"]["median"]
        assert row["teraflops"] > 0
        assert row["share"] > 0
        assert row["memory"]["bytes"] > 0
        assert row["compile_seconds"] > 0
    machine = record["machine"]
    assert machine["cores"] >= 1
    assert machine["versions"]["jax"] == jax.__version__


def test_jobs_that_are_done_are_kept_when_one_fails(tmp_path, monkeypatch):
    out = tmp_path / "benchmark.json"

    def fails(setting):
        raise MemoryError("out of memory")

    monkeypatch.setattr(
        command, "JOBS", {"first": lambda s: job(ours=lambda: contender([1.0] * 9)), "kl": fails}
    )
    with pytest.raises(RunError, match="not measured, for the reasons above: kl"):
        command.benchmark(["first", "kl"], jobs.Options(small=True), 2, out)
    record = json.loads(out.read_text())
    assert record["jobs"]["first"][0]["milliseconds"]["median"] == 1000
    assert record["jobs"]["kl"] == [{"job": "kl", "why": "MemoryError: out of memory"}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "'train' is not a job; there are efae, dit"),
        (["dit", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["dit", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["dit", "--dtype", "float8"], "config.dtype='float8' is not one of"),
        (["decode", "--small", "--model", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, said):
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_missing_peers_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "diffusers" else name)
    assert main(["benchmark", "dit", "--peer", "--small"]) == 2
    assert "pip install diffusers" in capsys.readouterr().err


def test_checkpoints(tmp_path, capsys):
    out = tmp_path / "benchmark.json"
    record = command.benchmark(["checkpoints"], jobs.Options(small=True), 6, out)
    rows = record["jobs"]["checkpoints"]
    assert rows == json.loads(out.read_text())["jobs"]["checkpoints"]
    assert [row["checkpoints"] for row in rows] == [1, 3, 4, 6]
    assert all(row["milliseconds"]["low"] > 0 and row["blocks"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert "MB resident" in said
    assert f"{rows[-1]['blocks']:,}" in said


def test_until_a_line():
    code = "import time; print('first'); print('step 1/9', flush=True); time.sleep(60)"
    command_line = [sys.executable, "-u", "-c", code]
    assert 0 < startup.until_line(command_line, "step 1/", {}) < 30
    with pytest.raises(RunError, match="the last was: nothing of the kind"):
        startup.until_line([sys.executable, "-c", "print('nothing of the kind')"], "step 1/", {})
    with pytest.raises(RunError, match="ModuleNotFoundError"):
        startup.run_python("import no_such_module")


@pytest.mark.parametrize("module", ["efae_jax.train", "efae_jax.api", "efae_jax.evaluation"])
def test_imports_neither_tensorflow_nor_torch(module):
    code = (
        f"import sys, {module}\n"
        "print(*sorted({'tensorflow', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=startup.ROOT, capture_output=True, text=True, check=True
    )
    heavy = set(found.stdout.split())
    assert not heavy & {"tensorflow", "torch"}
