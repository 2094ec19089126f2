"""What long work shows of itself, and where figures go."""

import io
import json

import pytest
from rich.console import Console

from efae_jax import logs
from efae_jax.paths import copy_files, is_remote, local_folder


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def printed(monkeypatch, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, soft_wrap=True)
    monkeypatch.setattr(logs, "console", console)
    return out


def test_a_log_file_gets_lines_with_rate_and_time_left(monkeypatch, clock):
    out = printed(monkeypatch, terminal=False)
    seen = []
    for item in logs.track(range(100), 100, "encoding", " batches"):
        seen.append(item)
        # The first waits for its program; each other takes half a second.
        clock.now += 30 if item == 0 else 0.5
    assert seen == list(range(100))
    lines = out.getvalue().splitlines()
    assert lines[0] == "encoding: 1/100 batches  -/s"
    assert lines[1] == "encoding: 22/100 batches  2.00 batches/s, 0:39 left"
    assert len(lines) == 5


def test_a_terminal_gets_a_bar_with_the_rate(monkeypatch, clock):
    out = printed(monkeypatch, terminal=True)
    for _ in logs.track(range(50), 50, "encoding", " batches"):
        clock.now += 0.02
    assert "50/50" in out.getvalue()
    assert "50.0 batches/s" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert logs.clock(seconds) == text


def test_object_storage_gets_copies(tmp_path, monkeypatch, clock):
    """It knows no appending; here a folder stands for it."""
    assert is_remote("gs://bucket/run")
    assert not is_remote(tmp_path)
    monkeypatch.setattr(logs, "is_remote", lambda path: True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    writer = logs.MetricWriter(tmp_path, from_step=1)
    writer.write(2, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    clock.now += logs.COPY_EVERY + 1
    writer.write(3, {"loss": 0.25})
    writer.write(4, {"loss": 0.125})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 2, 3]
    writer.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    assert list((tmp_path / "tensorboard").iterdir())


def test_files_are_copied_at_any_depth(tmp_path):
    with local_folder(tmp_path / "a") as folder:
        assert folder == tmp_path / "a"
        (folder / "b").mkdir()
        (folder / "b" / "c.txt").write_text("c")
    copy_files(tmp_path / "a", tmp_path / "d" / "e")
    assert (tmp_path / "d" / "e" / "b" / "c.txt").read_text() == "c"
