"""Contenders for a job, and the figures of each: time, operations, memory, compile time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from efae_jax.benchmark.pairs import Spread, ratios, spread, take_turns
from efae_jax.benchmark.peaks import Peak
from efae_jax.errors import UserError
from efae_jax.logs import say

# A turn takes at least so long (or one call), so that the clock and the dispatch do not count.
TURN_SECONDS = 1.0
SLOW_SECONDS = 3.0  # of a call; from there on fewer rounds do
ROUNDS, SLOW_ROUNDS = 5, 3


class Memory(NamedTuple):
    """Bytes, and what they are the peak of."""

    bytes: int
    what: str


class Contender(NamedTuple):
    """One way to do a job, compiled.

    Attributes:
      run: does it so many times, waits for the device once, and gives seconds per call.
      compile_seconds: until the first call was possible, or done.
      operations: floating-point operations of a call; None: those of the first contender.
      memory: at its peak, if known.
    """

    run: Callable[[int], float]
    compile_seconds: float
    operations: float | None = None
    memory: Memory | None = None


class Job(NamedTuple):
    """A thing to measure.

    Attributes:
      name, what: for the table; what says the sizes.
      images: of a call.
      devices: that share a call.
      contenders: each builds itself; the first is this package.
    """

    name: str
    what: str
    images: int
    devices: int
    contenders: Mapping[str, Callable[[], Contender]]


class Row(NamedTuple):
    """A contender's figures.

    Attributes:
      milliseconds: of a call.
      images_per_second, teraflops: at the median.
      share: of the devices' peak.
      ratio: how many times as long as the first contender it takes, pair by pair; of the first
        itself None.
      why: instead of figures, what went wrong; everything else is then None.
    """

    job: str
    what: str
    contender: str
    images: int
    milliseconds: Spread | None = None
    images_per_second: float | None = None
    teraflops: float | None = None
    share: float | None = None
    memory: Memory | None = None
    compile_seconds: float | None = None
    ratio: Spread | None = None
    why: str | None = None


def measure(job: Job, peak: Peak, rounds: int | None = None) -> list[Row]:
    """Builds the contenders, has them take turns, and gives a row for each.

    A contender that cannot be built or run (no compiler, out of memory) gets a row that says so.

    Args:
      job: what to measure.
      peak: of one device.
      rounds: turns of each; unless given 5, and 3 where a call takes more than 3 seconds.
    """
    ready: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    turns: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    for name, build in job.contenders.items():
        say(f"{job.name}: {name}: compiling and warming up")
        try:
            ready[name] = build()
            first[name] = ready[name].run(1)  # warms up
            if first[name] < TURN_SECONDS:
                first[name] = ready[name].run(1)
        except UserError:
            raise
        except Exception as error:  # whatever a compiler or an allocator may raise
            ready.pop(name, None)
            failed[name] = reason(error)
            say(f"{job.name}: {name}: {failed[name]}")
            continue
        calls = max(1, round(TURN_SECONDS / max(first[name], 1e-6)))
        turns[name] = lambda name=name, calls=calls: _turn(job, ready[name], failed, name, calls)
    if rounds is None:
        rounds = SLOW_ROUNDS if max(first.values(), default=0) > SLOW_SECONDS else ROUNDS
    times = take_turns(turns, rounds) if turns else {}
    rows = [_row(job, name, ready, times, failed, peak) for name in job.contenders]
    ready.clear()
    gc.collect()  # a compiled program and its arrays may hang in a cycle; the next job needs them
    return rows


def _turn(job: Job, contender: Contender, failed: dict[str, str], name: str, calls: int) -> float:
    if name in failed:
        return float("nan")
    try:
        seconds = contender.run(calls)
    except Exception as error:
        failed[name] = reason(error)
        return float("nan")
    rate = job.images / seconds
    say(f"{job.name}: {name}: {1e3 * seconds:,.1f} ms, {rate:,.2f} images/s")
    return seconds


def _row(
    job: Job,
    name: str,
    ready: Mapping[str, Contender],
    times: Mapping[str, list[float]],
    failed: Mapping[str, str],
    peak: Peak,
) -> Row:
    about = {"job": job.name, "what": job.what, "contender": name, "images": job.images}
    if name in failed:
        return Row(**about, why=failed[name])
    ours, own = next(iter(job.contenders)), ready[name]
    reference = ready.get(ours)
    operations = own.operations or (reference.operations if reference else None)
    seconds = spread(times[name])
    teraflops = None if operations is None else operations / seconds.median / 1e12
    compared = name != ours and ours in times and ours not in failed
    return Row(
        **about,
        milliseconds=Spread(*(1e3 * v for v in seconds)),
        images_per_second=job.images / seconds.median,
        teraflops=teraflops,
        share=None if teraflops is None else teraflops * 1e12 / (peak.flops * job.devices),
        memory=own.memory,
        compile_seconds=own.compile_seconds,
        ratio=ratios(times[name], times[ours]) if compared else None,
    )


def reason(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters, after its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def operations(lower: Callable[[], Any], compiled: Any = None) -> float:
    """Floating-point operations of a program, as XLA counts them.

    Args:
      lower: gives the program before XLA's passes.
      compiled: after them; None to count before them.

    On a GPU they are counted before XLA's passes: the compiled program calls cuBLAS and cuDNN,
    inside of which it cannot count. (So what cuDNN's attention does is missing there: 2% to 5%
    of a transformer at 256 tokens.) A loop's body counts once.
    """
    if compiled is None or jax.default_backend() == "gpu":
        compiled = lower()
    counted = compiled.cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted
    return float((counted or {}).get("flops", 0.0))


def high_water(device: Any) -> int | None:
    """The most bytes that this process has had on a device so far, where the backend knows."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def memory_of(compiled: Any, device: Any, before: int | None) -> Memory | None:
    """Peak memory of a program that has run.

    The device's own count where it rose above `before`, that is where this program set it; else
    what the compiler planned: arguments, outputs and temporaries less what is donated.

    Args:
      compiled: the program.
      device: one of its devices.
      before: the high-water mark before its arrays were made.
    """
    after = high_water(device)
    if after is not None and before is not None and after > before:
        return Memory(after, "allocated on the device")
    planned = compiled.memory_analysis()
    if planned is None:
        return None
    size = (
        planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        + planned.temp_size_in_bytes
        - planned.alias_size_in_bytes
    )
    return Memory(int(size), "planned by the compiler")


def clock(call: Callable[[], Any], count: int, *, wait: bool) -> float:
    """Seconds per call: `count` of them are dispatched, then the last result is waited for.

    Args:
      call: dispatches one and returns arrays.
      count: at least 1.
      wait: after every call. A CPU may otherwise run independent calls beside each other.
    """
    start = time.perf_counter()
    for _ in range(count):
        result = call()
        if wait:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count
