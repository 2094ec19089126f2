"""How fast images are read: this package's pipeline beside PyTorch's DataLoader.

Both read the same files with the same `Transform`, in shuffled batches, with the same number of
workers. The readers take turns, each started anew; a turn counts when its first batches are out.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from efae_jax.benchmark import photographs
from efae_jax.benchmark.pairs import Spread, ratios, spread, take_turns
from efae_jax.cache import Settings, write_cache
from efae_jax.data import Transform, make_source, train_batches
from efae_jax.data.chosen import choose_images
from efae_jax.data.pipeline import Reader
from efae_jax.data.splits import Source, Subset
from efae_jax.data.transforms import decode
from efae_jax.errors import UserError
from efae_jax.logs import console, figures_table, say, track

THREADS, WORKERS, PEER = "threads", "processes", "DataLoader"
RATE, TIME = "images/s", "us/image"
SMALL = "28x28 arrays"  # what a reader does besides reading shows on small images
_SMALL_SIDE, _SMALL_FACTOR = 28, 32  # so many times the images, for a turn as long
# Records at least: grain shuffles fewer more slowly, to 0.1 ms for an index of some hundreds,
# and real data sets are larger than a benchmark's.
_RECORDS = 2**16


class Row(NamedTuple):
    """One figure.

    Attributes:
      data: what was read.
      reader: THREADS, WORKERS or PEER; or a stage of reading.
      workers: threads or processes that read.
      unit: RATE, or TIME of one core for a stage.
      value: over the rounds.
      ratio: of the rate to PEER's with as many workers, pair by pair; None where there is none.
    """

    data: str
    reader: str
    workers: int
    unit: str
    value: Spread
    ratio: Spread | None = None


def measure(
    *,
    size: int = 256,
    workers: Sequence[int] = (1, 2),
    rounds: int = 5,
    images: int = 256,
    batch_size: int = 32,
    batches: int = 8,
    peer: bool = True,
    data: str | None = None,
) -> list[Row]:
    """Rates of reading, and what of a core's time each stage of it takes.

    Args:
      size: of the square that images are resized and cropped (at random) to.
      workers: numbers of threads or processes.
      rounds: turns that each reader takes.
      images: photographs that are made, of 500x375 to 1024x768 pixels, as JPEGs of quality 90.
      batch_size, batches: of a turn.
      peer: beside PyTorch's DataLoader.
      data: instead of those photographs, a folder or SOURCE:PATH.

    Raises:
      UserError: without PyTorch where it is the peer; for numbers below 1, or data not there.
    """
    for name, value in (("rounds", rounds), ("images", images), ("size", size)):
        if value < 1:
            raise UserError(f"{name}: {value}; it must be at least 1")
    if not workers or min(workers) < 1:
        raise UserError(f"workers: {tuple(workers)}; each must be at least 1")
    if peer and find_spec("torch") is None:
        raise UserError(
            "the peer is PyTorch's DataLoader: pip install torch, or measure without the peer"
        )
    transform = Transform((size, size), crop="random", flip=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(Path(folder), images, size, data)
        contenders: dict[tuple[str, str, int], Callable[[], float]] = {}

        def add(name: str, source: Source, reader: Reader, batch: int) -> None:
            turn = _Turn(source, reader, batch, batches)
            for number in workers:
                contenders[name, THREADS, number] = turn.ours(num_threads=number)
                contenders[name, WORKERS, number] = turn.ours(num_workers=number)
                if peer:
                    contenders[name, PEER, number] = turn.peer(number)

        for name, source in sources.items():
            add(name, _repeated(source), transform, batch_size)
        add(SMALL, Arrays(_SMALL_SIDE), Arrays(_SMALL_SIDE), _SMALL_FACTOR * batch_size)
        total = rounds * len(contenders)
        ticks = track(range(total), total, "reading")
        counted = {name: _ticking(turn, ticks) for name, turn in contenders.items()}
        found = take_turns(counted, rounds)
        next(ticks, None)
        stages = [
            row for name, source in sources.items() for row in _stages(name, source, transform)
        ]
    rows = []
    for (name, reader, number), rates in found.items():
        theirs = found.get((name, PEER, number))
        ratio = None if reader == PEER or theirs is None else ratios(rates, theirs)
        rows.append(Row(name, reader, number, RATE, spread(rates), ratio))
    return rows + stages


def show(rows: Sequence[Row]) -> None:
    """Prints the rows as two tables, and what takes most of the time."""
    cells = [
        [f"{r.data}, {r.reader} x{r.workers}", f"{r.value.median:,.0f}", _range(r.value, ",.0f")]
        + (["", ""] if r.ratio is None else [f"{r.ratio.median:.2f}", _range(r.ratio, ".2f")])
        for r in rows
        if r.unit == RATE
    ]
    names = ["read by", "images/s", "least-most", "ratio", "least-most"]
    title = "Input (ratio: to PyTorch's DataLoader with as many worker processes)"
    console.print(figures_table(title, names, cells))
    stages = [r for r in rows if r.unit == TIME]
    cells = [[f"{r.data}, {r.reader}", f"{r.value.median:,.0f}"] for r in stages]
    console.print(figures_table("One core's time", ["stage", "us an image"], cells))
    for data in dict.fromkeys(r.data for r in stages):
        mine = [r for r in stages if r.data == data]
        total = sum(r.value.median for r in mine)
        if not total:  # a coarse clock, and small images
            continue
        most = max(mine, key=lambda r: r.value.median)
        share = 100 * most.value.median / total
        say(f"{data}: at most {1e6 / total:,.0f} images/s a core; {most.reader} is {share:.0f}%")


def _range(values: Spread, form: str) -> str:
    return f"{values.low:{form}}-{values.high:{form}}"


def _repeated(source: Source) -> Source:
    return Subset(source, list(range(len(source))) * -(-_RECORDS // len(source)))


def _ticking(turn: Callable[[], float], ticks: Iterator[int]) -> Callable[[], float]:
    def ticked() -> float:
        next(ticks)
        return turn()

    return ticked


def _sources(folder: Path, images: int, size: int, data: str | None) -> dict[str, Source]:
    """The photographs in a folder, in tar shards and in a cache; or the user's data."""
    from configs import common

    config = common.get_config().data
    if data is not None:
        return {data: choose_images(config, data).source}
    say(f"making {images} photographs")
    photographs.write_folder(folder / "jpegs", images)
    pattern = photographs.write_shards(folder / "tar", folder / "jpegs")
    write_cache(
        folder / "cache",
        str(folder / "jpegs"),
        settings=Settings(size),
        split="train",
        test_fraction=0.0,
    )
    config.test_fraction = 0.0
    paths = {
        "JPEG folder": ("folder", str(folder / "jpegs")),
        "tar shards": ("webdataset", pattern),
        "cache": ("array_record", str(folder / "cache" / "*.array_record")),
    }
    found = {}
    for name, (config.source, config.path) in paths.items():
        found[name] = make_source(config, "train")
    return found


def _stages(name: str, source: Source, transform: Transform) -> list[Row]:
    """Of the first 64 images, on this thread; the pipeline's own share from images in memory.

    Each of three passes gives a mean: large images take their share of the time.
    """
    stages = ("read", "decode", "resize and crop")
    passes: list[np.ndarray] = []
    for _ in range(3):
        marks = []
        for index in range(min(64, len(source))):
            start = time.thread_time()
            image = source[index]["image"]
            read = time.thread_time()
            image = decode(image, transform.size)
            decoded = time.thread_time()
            transform(image, Random(index))  # which finds nothing left to decode
            marks.append((start, read, decoded, time.thread_time()))
        passes.append(1e6 * np.diff(marks).mean(0))
    rows = [
        Row(name, stage, 1, TIME, spread([float(t) for t in times]))
        for stage, times in zip(stages, zip(*passes, strict=True), strict=True)
    ]
    own = [_pipeline_time(transform.size[0]) for _ in range(3)]
    return [*rows, Row(name, "order and collate", 1, TIME, spread(own))]


def _pipeline_time(side: int) -> float:
    """Microseconds of processor time an image that is there already takes."""
    arrays, size = Arrays(side), 32
    batches = train_batches(arrays, arrays, batch_size=size, seed=0, num_threads=1)
    try:
        next(batches)
        start = time.process_time()
        for _ in range(16):
            next(batches)
        return 1e6 * (time.process_time() - start) / (16 * size)
    finally:
        batches.close()


class Arrays:
    """A source of images that are there already, and the way of them into batches."""

    num_classes = 10

    def __init__(self, side: int):
        self.image = np.zeros((side, side, 3 if side > _SMALL_SIDE else 1), np.uint8)

    def __len__(self) -> int:
        return 60_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image, "label": index % self.num_classes}

    def key(self, index: int) -> str:
        return str(index)

    name = key

    def example(self, record: dict[str, Any], random: Random) -> dict[str, np.ndarray]:
        return {"image": record["image"], "label": np.int32(record["label"])}

    def blank(self) -> dict[str, np.ndarray]:
        return {"image": self.image, "label": np.int32(0)}


class _Turn(NamedTuple):
    """Readers of a source; each turn reads `batches` batches and gives images per second."""

    source: Source
    reader: Reader
    batch_size: int
    batches: int

    def ours(self, **how: int) -> Callable[[], float]:
        def turn() -> float:
            how_many = {"num_threads": 0, **how}
            batches = train_batches(
                self.source, self.reader, batch_size=self.batch_size, seed=0, **how_many
            )
            try:
                return self._rate(batches, max(how.values()))
            finally:
                batches.close()

        return turn

    def peer(self, workers: int) -> Callable[[], float]:
        def turn() -> float:
            from torch.utils.data import DataLoader, RandomSampler

            examples = _MapStyle(self.source, self.reader)
            loader = DataLoader(
                examples,
                self.batch_size,
                # One epoch after the other: the workers never wait for the next one to begin.
                sampler=RandomSampler(examples, num_samples=10**7),
                num_workers=workers,
                persistent_workers=True,
                multiprocessing_context="spawn",  # JAX's threads do not survive a fork
                worker_init_fn=_quiet,
            )
            return self._rate(iter(loader), workers)

        return turn

    def _rate(self, batches: Iterator[Any], workers: int) -> float:
        """Counted from when each worker has delivered; as many batches of each."""
        count = -(-self.batches // workers) * workers
        for _ in itertools.islice(batches, 2 * workers):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        return count * self.batch_size / (time.perf_counter() - start)


class _MapStyle:
    """A data set as PyTorch's DataLoader takes it."""

    def __init__(self, source: Source, reader: Reader):
        self.source, self.reader = source, reader

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.reader.example(self.source[index], Random(index)), "index": index}


def _quiet(_: int) -> None:
    # PyTorch's collate copies Pillow's arrays, which are read-only, but warns of them first.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
