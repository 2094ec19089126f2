"""Where a run's figures go: the terminal, JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table

from efae_jax.errors import UserError
from efae_jax.paths import copy_files, is_remote

console = Console(highlight=False, soft_wrap=True)
LINE_EVERY = 10.0  # seconds between lines where no terminal is
FIRST_SIGN, SIGN_EVERY = 2.0, 30.0  # seconds to lines that say only that the work goes on
COPY_EVERY = 60.0  # seconds between copies to object storage, which knows no appending


def say(message: str) -> None:
    """Prints a line, on process 0 only."""
    if jax.process_index() == 0:
        console.print(message, markup=False)


def make_output_folder(out: Path) -> None:
    """Makes the folder that a command's option --out names, unless it is there.

    Raises:
      UserError: when it is a file, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error


class MetricWriter:
    """Appends figures to `metrics.jsonl` and to TensorBoard files; does nothing off process 0.

    Args:
      workdir: gets `metrics.jsonl` and the folder `tensorboard`. On object storage, they are
        written here and copied there once a minute, and in the end.
      from_step: drops lines at later steps than this, which a run that was stopped
        after its last checkpoint leaves and a resumed run writes again.
    """

    def __init__(self, workdir: epath.PathLike, from_step: int = 0):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        # Where PyTorch is installed this imports it, which takes seconds.
        from tensorboardX import SummaryWriter

        self._there = epath.Path(workdir)
        self._folder, self._temporary = Path(workdir), None
        path = self._there / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if is_remote(workdir):
            self._temporary = tempfile.TemporaryDirectory()
            self._folder, self._copied = Path(self._temporary.name), time.monotonic()
        kept = [line for line in lines if _step(line) <= from_step]
        path = self._folder / "metrics.jsonl"
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line, one point on every curve."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if self._temporary is not None and time.monotonic() - self._copied > COPY_EVERY:
            self._board.flush()
            self._copy()
            self._copied = time.monotonic()

    def close(self) -> None:
        """Flushes and closes both files."""
        if not self._active:
            return
        self._lines.close()
        self._board.close()
        if self._temporary is not None:
            self._copy()
            self._temporary.cleanup()

    def _copy(self) -> None:
        """A run does not end because its curves could not be copied."""
        try:
            copy_files(self._folder, self._there)
        except Exception as error:  # storage libraries have errors of every kind
            say(f"curves could not be copied to {self._there}: {' '.join(str(error).split())}")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a killed run left half-written
        return math.inf


class TrainProgress:
    """A bar with loss, images per second and time left; plain lines where no terminal is.

    Args:
      start, total: steps done before, and in the end.
      batch_size: images per step.
    """

    def __init__(self, start: int, total: int, batch_size: int):
        self._total, self._batch_size = total, batch_size
        self._last, self._rate = (start, time.monotonic()), 0.0
        self._bar = _bar(
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s"),
            disable=jax.process_index() != 0 or not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "compiling", total=total, completed=start, loss="-", rate="-"
        )

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar, which says "compiling" until the first step is done."""
        self._bar.update(self._task, completed=step, description="training")

    def report(self, step: int, loss: float) -> float:
        """Shows a loss; returns the images per second since the last report (0: not known)."""
        before, then = self._last
        now = time.monotonic()
        if step > before:
            self._rate = (step - before) * self._batch_size / max(now - then, 1e-9)
            self._last = (step, now)
        rate = self._rate
        self._bar.update(self._task, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
        if not console.is_terminal:
            if not rate:
                say(f"step {step:,}/{self._total:,}  loss {loss:.4f}")
                return rate
            left = (self._total - step) * self._batch_size / rate
            say(
                f"step {step:,}/{self._total:,}  loss {loss:.4f}  {rate:,.0f} images/s  "
                f"{clock(left)} left"
            )
        return rate

    def restart_clock(self, step: int) -> None:
        """Leaves the steps up to this one, and their time, out of the rate."""
        self._last = (step, time.monotonic())

    def leave_out(self, seconds: float) -> None:
        """Leaves so much time (of compiling, of an evaluation) out of the rate."""
        step, then = self._last
        self._last = (step, then + seconds)


def track(
    items: Iterable[Any],
    total: int,
    label: str,
    unit: str = "",
    *,
    size: Callable[[Any], int] | None = None,
    transient: bool = False,
) -> Iterator[Any]:
    """Yields the items under what `counting` shows.

    Args:
      items: to be worked on one after the other.
      total, label, unit, transient: as for `counting`.
      size: how many of the total an item is, such as the images of a batch; 1 unless given.
    """
    with counting(total, label, unit, transient=transient) as done:
        for item in items:
            yield item
            done(1 if size is None else size(item))


@contextlib.contextmanager
def counting(
    total: int, label: str, unit: str = "", *, done: int = 0, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """A progress bar, or a plain line every ten seconds; gives what is told how many more are done.

    Both show how many are done, how many a second, and the time left. Rates count from when the
    first are done, which wait for programs to be compiled. Where nothing is done for half a
    minute and no terminal is, a line says that the work goes on.

    Args:
      total: how many there are.
      label: what is being done to them, such as "encoding".
      unit: what they are, such as " images".
      done: how many were done before.
      transient: the bar goes when it is done.
    """
    label, count, lock = _printable(label), done, threading.Lock()
    start = said = time.monotonic()
    first: tuple[int, float] | None = None  # how many were done, and when, as the rate starts
    disable = not console.is_terminal or jax.process_index() != 0

    def line(end: str) -> None:
        nonlocal said
        said = time.monotonic()
        say(f"{label}: {count:,}/{total:,}{unit}  {end}")

    def patience() -> None:
        with lock:
            if time.monotonic() - said > SIGN_EVERY / 2:
                line(f"{clock(time.monotonic() - start)} so far")

    with _bar(_RateColumn(unit), disable=disable, transient=transient) as bar:
        task = bar.add_task(label, total=total, completed=done)

        def advance(more: int) -> None:
            nonlocal count, first
            with lock:
                count, now = count + more, time.monotonic()
                if first is None:
                    first = count, now
                before, then = first
                rate = (count - before) / (now - then) if count > before and now > then else 0.0
                bar.update(task, completed=count, rate=rate)
                if not console.is_terminal and now - said > LINE_EVERY and count < total:
                    left = f", {clock((total - count) / rate)} left" if rate else ""
                    line(f"{_per_second(rate, unit)}{left}")

        if console.is_terminal:
            yield advance
        else:
            with _every(SIGN_EVERY, SIGN_EVERY, patience):
                yield advance


@contextlib.contextmanager
def waiting(label: str) -> Iterator[Callable[[str], None]]:
    """Shows how long something takes that cannot tell how far it is; gives what changes the label.

    On a terminal a spinner with the time; elsewhere lines, the first after two seconds, the others
    half a minute apart.
    """
    current, start = _printable(label), time.monotonic()
    if console.is_terminal:
        columns = (SpinnerColumn(), _description(), TimeElapsedColumn())
        disable = jax.process_index() != 0
        with Progress(*columns, console=console, transient=True, disable=disable) as bar:
            task = bar.add_task(current, total=None)
            yield lambda text: bar.update(task, description=_printable(text))
        return

    def change(text: str) -> None:
        nonlocal current
        current = _printable(text)

    def line() -> None:
        say(f"{current}: {clock(time.monotonic() - start)}")

    with _every(FIRST_SIGN, SIGN_EVERY, line):
        yield change


@contextlib.contextmanager
def _every(first: float, then: float, work: Callable[[], None]) -> Iterator[None]:
    """Does the work in a thread, meanwhile: after so many seconds, and again and again."""
    ended = threading.Event()

    def repeat() -> None:
        seconds = first
        while not ended.wait(seconds):
            work()
            seconds = then

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def clock(seconds: float) -> str:
    """Hours (where there are any), minutes and seconds: 1:02:03, 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _per_second(rate: float, unit: str) -> str:
    if not rate:
        return "-/s"
    digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
    return f"{rate:,.{digits}f}{unit}/s"


class _RateColumn(TextColumn):
    """Items a second, as the task's field `rate` says."""

    def __init__(self, unit: str):
        super().__init__("")
        self._unit = unit

    def render(self, task: Task) -> Any:
        self.text_format = _per_second(task.fields.get("rate", 0.0), self._unit)
        return super().render(task)


def _description() -> TextColumn:
    return TextColumn("{task.description}", markup=False)  # a path may have brackets


def _printable(label: str) -> str:
    """Without the bytes of a path that are no UTF-8."""
    return label.encode("utf-8", "replace").decode()


def _bar(*columns: Any, disable: bool, transient: bool = False) -> Progress:
    return Progress(
        SpinnerColumn(),  # moves while a program is compiled
        _description(),
        BarColumn(bar_width=18),  # all fits into 80 columns
        MofNCompleteColumn(),
        *columns,
        TextColumn("left"),
        TimeLeftColumn(),
        console=console,
        disable=disable,
        transient=transient,
    )


def figures_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
