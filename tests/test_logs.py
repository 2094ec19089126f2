"""What long work shows of itself, and where figures go."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from efae_jax import logs
from efae_jax.paths import copy_files, is_remote, local_folder

ESCAPES = r"\x1b\[[0-9;?]*[A-Za-z]"  # colours, movements of the cursor


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
    for item in logs.track(range(100), 100, "encoding", " images"):
        seen.append(item)
        # The first waits for its program; each other takes half a second.
        clock.now += 30 if item == 0 else 0.5
    assert seen == list(range(100))
    lines = out.getvalue().splitlines()
    assert lines[0] == "encoding: 1/100 images  -/s"
    assert lines[1] == "encoding: 22/100 images  2.00 images/s, 0:39 left"
    assert len(lines) == 5


def test_batches_count_as_their_images(monkeypatch, clock):
    """Those done before count, but not in the rate, nor does the first batch."""
    out = printed(monkeypatch, terminal=False)
    with logs.counting(50, "evaluating", " images", done=10) as done:
        for seconds, images in ((60, 8), (20, 8), (20, 8), (20, 8), (20, 8)):
            clock.now += seconds
            done(images)
    assert out.getvalue().splitlines() == [
        "evaluating: 18/50 images  -/s",
        "evaluating: 26/50 images  0.40 images/s, 1:00 left",
        "evaluating: 34/50 images  0.40 images/s, 0:40 left",
        "evaluating: 42/50 images  0.40 images/s, 0:20 left",
    ]
    out = printed(monkeypatch, terminal=False)
    for _ in logs.track([[1] * 4, [1] * 3], 7, "encoding", " images", size=len):
        clock.now += 11
    assert out.getvalue().splitlines() == ["encoding: 4/7 images  -/s"]


def test_a_terminal_gets_a_bar_with_the_rate(monkeypatch, clock):
    out = printed(monkeypatch, terminal=True)
    for _ in logs.track(range(50), 50, "encoding", " images"):
        clock.now += 0.02
    assert "50/50" in out.getvalue()
    assert "50.0 images/s" in out.getvalue()
    assert all(len(line) <= 80 for line in re.sub(ESCAPES, "", out.getvalue()).splitlines())


def shown(out, text, seconds=5.0):
    """Whether a text comes within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and text not in out.getvalue():
        time.sleep(0.01)
    return text in out.getvalue()


def test_a_log_file_hears_while_something_takes_long(monkeypatch):
    monkeypatch.setattr(logs, "FIRST_SIGN", 0.05)
    monkeypatch.setattr(logs, "SIGN_EVERY", 0.05)
    out = printed(monkeypatch, terminal=False)
    with logs.waiting("compiling") as note:
        assert shown(out, "compiling: 0:0")
        note("compiling the decoder; 2 of 6 programs left")
        assert shown(out, "compiling the decoder; 2 of 6 programs left: 0:0")
    with logs.counting(8, "evaluating", " images"):  # the first batch
        assert shown(out, "evaluating: 0/8 images  0:00 so far")


def test_a_terminal_sees_what_is_waited_for(monkeypatch):
    out = printed(monkeypatch, terminal=True)
    with logs.waiting("reading [a]") as note:
        assert shown(out, "reading [a]")
        note("compiling the decoder; 2 of 6 programs left")
        assert shown(out, "compiling the decoder; 2 of 6 programs left")
    assert all(len(line) <= 80 for line in re.sub(ESCAPES, "", out.getvalue()).splitlines())


def test_what_is_quick_says_nothing(monkeypatch):
    out = printed(monkeypatch, terminal=False)
    with logs.waiting("looking"), logs.counting(1, "reading") as done:
        done(1)
    assert out.getvalue() == ""


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
