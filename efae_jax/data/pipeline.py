"""Batches: deterministic order, sharded by process, resumed by example, read by grain.

The global stream of training examples is fixed by the source and the seed. Its position p belongs
to epoch p // n, and global batch b is positions b * batch_size onwards, of which each process
reads its contiguous part. Hence batch size, processes, threads and workers never change an
example, and a run resumes anywhere by giving the position.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from efae_jax.data.bad_image import reason_of
from efae_jax.data.splits import Source
from efae_jax.errors import RunError, UserError
from efae_jax.paths import printable

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
_REASON_BYTES = 200
RESTARTS = 3  # of worker processes that die, one after the other without a batch between


class Reader(Protocol):
    """The way of a source's records into batches."""

    def example(self, record: dict[str, Any], random: Random) -> Batch:
        """The arrays of one example; all that is random comes from `random`. May raise."""

    def blank(self) -> Batch:
        """Zeros of the same names, shapes and types, for what cannot be read."""


def train_batches(
    source: Source,
    reader: Reader,
    *,
    batch_size: int,
    seed: int,
    start_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    num_workers: int = 0,
    max_bad: int = 0,
) -> Batches:
    """Endless shuffled batches of this process, from global example start_example on.

    batch_size: of all processes together. Yields the reader's arrays (of images: image uint8
    [b, H, W, C], label int32 [b]), index int64 [b] (the record's number in the source), bad bool
    [b], with b = batch_size / process_count. A record that cannot be read is replaced by the next
    one that can, and marked bad. Reads in num_threads threads, or in num_workers processes if that
    is not 0; of processes that die, new ones go on where they were.

    Raises UserError, at once for settings that cannot be, and later when more than max_bad
    distinct records turn out bad or no readable one is found. Close the iterator when done.
    """
    share = _Share(batch_size, process_index, process_count, start_example)
    examples = _TrainExamples(source, reader, share, seed, max_bad)
    return _batches(examples, num_threads, num_workers, max_bad)


def eval_batches(
    source: Source,
    reader: Reader,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    num_workers: int = 0,
    max_bad: int = 0,
) -> Batches:
    """Every record once, in order; the same number of batches for every process.

    As train_batches, and mask bool [b]: False for the padding of the last batch (index -1) and
    for records that cannot be read; both are blank.
    """
    share = _Share(batch_size, process_index, process_count)
    examples = _EvalExamples(source, reader, share)
    return _batches(examples, num_threads, num_workers, max_bad)


class Batches:
    """An iterator over batches whose threads and processes end when it is closed or dropped.

    Attributes:
      bad: the records that could not be read so far, and why.
    """

    def __init__(self, generator: Generator[Batch], bad: BadRecords):
        self._generator, self.bad = generator, bad
        # At exit, too: before Python takes apart what closing needs.
        self.close = weakref.finalize(self, generator.close)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        return next(self._generator)


class BadRecords:
    """Counts distinct unreadable records, names each in a warning, and stops past the limit."""

    def __init__(self, source: Source, limit: int):
        self.source = source
        self.limit = limit
        self.reasons: dict[int, str] = {}

    def add(self, index: int, reason: str) -> None:
        """Raises RunError with the last three names if this makes more than `limit`."""
        if index in self.reasons:
            return
        self.reasons[index] = reason
        log.warning("data: skipped %s: %s", printable(self.source.name(index)), reason)
        if len(self.reasons) > self.limit:
            last = list(self.reasons.items())[-3:]
            raise RunError(
                f"data: {len(self.reasons)} unreadable images are more than data.max_bad="
                f"{self.limit}; the last: "
                + "; ".join(f"{printable(self.source.name(i))} ({why})" for i, why in last)
            )

    def by_name(self) -> dict[str, str]:
        """{name: why}."""
        return {self.source.name(i): why for i, why in self.reasons.items()}


@dataclass(frozen=True)
class _Share:
    """Which global positions a process reads."""

    batch_size: int
    process_index: int
    process_count: int
    start: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"data: a batch of {self.batch_size} is not a positive multiple of the "
                f"{self.process_count} processes"
            )

    @property
    def local_batch(self) -> int:
        return self.batch_size // self.process_count

    def position(self, local: int) -> int:
        """The global position of this process' example number `local`."""
        batch, row = divmod(local, self.local_batch)
        first = self.start + batch * self.batch_size + self.process_index * self.local_batch
        return first + row


@dataclass(frozen=True)
class _Examples:
    """The examples of one process by local number, alike in a thread and in another process.

    Reading never raises: what went wrong travels in the example (`reason`, empty if nothing, and
    `lost` if there is no image), so that the main process alone names, counts and stops.
    """

    source: Source
    reader: Reader
    share: _Share

    def __post_init__(self):
        if len(self.source) == 0:
            raise UserError("data: the source has no image")

    def _read(self, index: int, random: Random) -> tuple[Batch | None, str]:
        """(the example's arrays, why there are none)."""
        try:
            return self.reader.example(self.source[index], random), ""
        except Exception as error:  # decoders meet damage with errors of every kind
            return None, reason_of(error)

    def _example(self, index: int, found: Batch | None, reason: str) -> Batch:
        return {
            **(self.reader.blank() if found is None else found),
            "index": np.int64(index),
            "lost": np.bool_(found is None),
            "reason": np.array(reason.encode("utf-8", "replace"), f"S{_REASON_BYTES}"),
        }


@dataclass(frozen=True)
class _TrainExamples(_Examples):
    seed: int
    max_bad: int

    def __len__(self) -> int:
        return 2**40  # endless in practice

    def __getitem__(self, local: int) -> dict[str, np.ndarray]:
        position = self.share.position(local)
        epoch, number = divmod(position, len(self.source))
        index = grain.experimental.index_shuffle(
            number,
            max_index=len(self.source) - 1,
            seed=_hash(self.seed, "order", epoch) % 2**32,
            rounds=4,
        )
        found, reason = None, ""
        # More failures than max_bad stop the run anyway, so the search for a substitute ends.
        for candidate in range(index, index + min(len(self.source), self.max_bad + 1)):
            random = Random(_hash(self.seed, "augment", position))
            found, why = self._read(candidate % len(self.source), random)
            reason = reason or why
            if found is not None:
                break
        return self._example(index, found, reason)


@dataclass(frozen=True)
class _EvalExamples(_Examples):
    def __len__(self) -> int:
        batches = -(-len(self.source) // self.share.batch_size)
        return batches * self.share.local_batch

    def __getitem__(self, local: int) -> dict[str, np.ndarray]:
        position = self.share.position(local)
        if position >= len(self.source):
            return self._example(-1, None, "")
        return self._example(position, *self._read(position, Random(0)))


@dataclass(frozen=True)
class _Parts:
    """Each batch of examples in so many parts, one for a thread.

    What grain does for an element costs more than to read a small image, so its elements are
    these.
    """

    examples: _TrainExamples | _EvalExamples
    parts: int

    def __len__(self) -> int:
        return len(self.examples) // self.examples.share.local_batch * self.parts

    def __getitem__(self, number: int) -> Batch:
        batch, part = divmod(number, self.parts)
        size = self.examples.share.local_batch
        rows = range(part * size // self.parts, (part + 1) * size // self.parts)
        found = [self.examples[batch * size + row] for row in rows]
        return {name: np.stack([example[name] for example in found]) for name in found[0]}


def _join(parts: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _hash(seed: int, purpose: str, number: int) -> int:
    """64 bits for each (seed, purpose, number): neighbouring seeds share nothing."""
    digest = blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _batches(examples: _Examples, num_threads: int, num_workers: int, max_bad: int) -> Batches:
    """Batches in order, read ahead in the background, their bad records seen to."""
    for name, number in (("threads", num_threads), ("workers", num_workers)):
        if number < 0:
            raise UserError(f"data.num_{name}: {number}; it must be at least 0")
    if max_bad < 0:
        raise UserError(f"data.max_bad: {max_bad}; it must be at least 0")
    parts = 1 if num_workers else min(examples.share.local_batch, max(num_threads, 1))

    def read_from(batch: int) -> grain.IterDataset:
        data = grain.MapDataset.source(_Parts(examples, parts))[batch * parts :]
        if num_workers:
            # Whole batches go round the workers, so that their number changes nothing.
            data = data.to_iter_dataset(grain.ReadOptions(1, 1))
            return data.mp_prefetch(grain.MultiprocessingOptions(num_workers, 2)).map(_own)
        ahead = 2 * max(parts, num_threads) if num_threads else 0
        data = data.to_iter_dataset(grain.ReadOptions(num_threads, ahead))
        data = data.batch(parts, batch_fn=_join) if parts > 1 else data
        return grain.experimental.ThreadPrefetchIterDataset(data, prefetch_buffer_size=2)

    if num_workers and not flags.FLAGS.is_parsed():  # grain's workers read some of its flags
        flags.FLAGS.mark_as_parsed()
    found = _restarted(read_from, RESTARTS if num_workers else 0)
    bad = BadRecords(examples.source, max_bad)
    return Batches(_checked(found, examples, bad), bad)


def _restarted(
    read_from: Callable[[int], grain.IterDataset], restarts: int
) -> Generator[Batch, None, None]:
    """All batches; where a worker process is gone, new ones go on with the batch that is next.

    read_from: the dataset from a batch on. restarts: without a batch between them, before
    RunError is raised.
    """
    done, left = 0, restarts
    reader = iter(read_from(0))
    try:
        while True:
            try:
                batch = next(reader)
            except StopIteration:
                return
            except RuntimeError as error:  # what grain raises when a worker process is gone
                if not left:
                    again = f" {restarts} times in a row" if restarts else ""
                    raise RunError(
                        f"data: reading stopped{again}: {error} Out of memory, or of shared memory "
                        "(/dev/shm)? data.num_workers=0 reads in threads"
                    ) from error
                left -= 1
                log.warning("data: %s New processes go on.", error)
                reader.close()
                reader = iter(read_from(done))
                continue
            done, left = done + 1, restarts
            yield batch
    finally:
        reader.close()


def _own(batch: Batch) -> Batch:
    """A copy outside the shared memory that the workers write to, which is small."""
    return {name: np.array(value, subok=False) for name, value in batch.items()}


def _checked(
    found: Generator[Batch, None, None], examples: _Examples, bad: BadRecords
) -> Generator[Batch, None, None]:
    training = isinstance(examples, _TrainExamples)
    with contextlib.closing(found):
        for batch in found:
            lost, reasons = batch.pop("lost"), batch.pop("reason")
            batch["bad"] = reasons != b""
            for row in np.flatnonzero(batch["bad"]):
                index, reason = int(batch["index"][row]), reasons[row].decode("utf-8", "replace")
                bad.add(index, reason)
                if training and lost[row]:
                    raise RunError(
                        "data: no readable image from "
                        f"{printable(examples.source.name(index))} on ({reason})"
                    )
            if not training:
                batch["mask"] = (batch["index"] >= 0) & ~batch["bad"]
            yield batch
