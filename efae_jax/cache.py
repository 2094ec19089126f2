"""`python -m efae_jax cache`: images decoded and resized once, as ArrayRecord shards."""

from __future__ import annotations

import io
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from efae_jax.data.array_records import CLASSES, write_records
from efae_jax.data.bad_image import reason_of
from efae_jax.data.chosen import describe, named
from efae_jax.data.latents import shard_range
from efae_jax.data.left_out import account, account_lines
from efae_jax.data.pipeline import BadRecords
from efae_jax.data.sources import make_source
from efae_jax.data.splits import ALL, SPLITS, EmptySplitError, Source
from efae_jax.data.transforms import MAX_PIXELS, fit
from efae_jax.errors import RunError, UserError
from efae_jax.extract import TEXT_LABELS, keep_settings
from efae_jax.logs import make_output_folder, say, track
from efae_jax.paths import printable

FORMATS = ("raw", "png", "jpeg")
CROPS = ("none", "center")
SHARD_IMAGES = 4096  # at most, unless the number of shards is given
_JPEG = {"quality": 95, "subsampling": 0}


class Settings(NamedTuple):
    """How images are stored.

    Attributes:
      size: pixels of the shorter side.
      crop: "none": whole, so that training may crop at random; "center": the central square.
      format: "raw" (3 bytes a pixel, nothing to decode), "png" (lossless) or "jpeg" (quality 95,
        full colour resolution).
    """

    size: int = 256
    crop: str = "none"
    format: str = "raw"

    def stored(self, image: Any, max_pixels: int) -> bytes | np.ndarray:
        """An image of a source as it is stored. May raise what `fit` raises."""
        img = fit(image, self.size, square=self.crop == "center", max_pixels=max_pixels)
        if self.format == "raw":
            return np.asarray(img)
        buffer = io.BytesIO()
        img.save(buffer, self.format, **(_JPEG if self.format == "jpeg" else {}))
        return buffer.getvalue()


def write_cache(
    out: str | os.PathLike[str],
    data: str,
    *,
    settings: Settings | None = None,
    split: str | None = None,
    test_fraction: float = 0.02,
    data_dir: str = "",
    shards: int | None = None,
    threads: int | None = None,
    max_bad: int = 100,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, int]:
    """The command: writes the shards that are not there yet and says what they take.

    The shards out/SPLIT-00000-of-00010.array_record are read by data.source 'array_record' with
    the data.path 'out/{split}-*.array_record'. Records keep their order, so that training reads
    the same stream of examples. Each of several processes writes its share of the shards. What was
    read and what was left out, and why, stands in out/SPLIT.read.json.

    Args:
      data: a folder, or SOURCE:PATH, as config.data.source and .path.
      split: "train", "test" or "all" (both in one); both, each in its own shards, unless given.
      settings: of the stored images; their defaults unless given.
      test_fraction, data_dir: as in config.data.
      shards: files of a split; one for every 4096 images unless given.
      threads: that read and decode; one a core, and at least 8, unless given.
      max_bad: unreadable images of a split (a process's) that do not end the run.
      max_pixels: of an image that is decoded.

    Returns:
      {split: the images in its shards}.

    Raises:
      UserError: for what is not there, or a folder of other images.
      RunError: too many unreadable images.
    """
    settings = settings or Settings()
    _check(settings, split, threads)
    source, path = named(data)
    config = _config(source, path, test_fraction, data_dir, settings.size, max_bad)
    config.max_pixels = max_pixels
    out = Path(out)
    make_output_folder(out)
    threads = threads or max(8, len(os.sched_getaffinity(0)))
    found = {}
    for name in SPLITS if split is None else (split,):
        try:
            images = make_source(config, name)
        except EmptySplitError as error:
            if split is not None:
                raise
            say(f"{name}: nothing to write: {error}")
            continue
        writer = _Writer(images, out, name, settings, config, shards)
        writer.run(threads, max_bad)
        found[name] = writer.report()
    written = "{split}" if len(found) > 1 or not found else next(iter(found))
    pattern = str(out / f"{written}-*.array_record")
    say(f"--config.data.source=array_record --config.data.path='{pattern}'")
    return found


def _check(settings: Settings, split: str | None, threads: int | None) -> None:
    for name, value, allowed in (
        ("format", settings.format, FORMATS),
        ("crop", settings.crop, CROPS),
        ("split", split, (*SPLITS, ALL, None)),
    ):
        if value not in allowed:
            raise UserError(f"--{name} {value}: allowed are {', '.join(filter(None, allowed))}")
    for name, value in (("size", settings.size), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1")


def _config(
    source: str, path: str, test_fraction: float, data_dir: str, size: int, max_bad: int
) -> ConfigDict:
    from configs.common import get_config

    config = get_config().data
    config.source, config.path, config.data_dir = source, path, data_dir
    config.test_fraction, config.size, config.max_bad = test_fraction, (size, size), max_bad
    return config


class _Writer:
    """The shards of one split."""

    def __init__(
        self,
        source: Source,
        out: Path,
        split: str,
        settings: Settings,
        config: ConfigDict,
        shards: int | None,
    ):
        self.source, self.out, self.split, self.settings = source, out, split, settings
        self.max_pixels = config.max_pixels
        self.shards = math.ceil(len(source) / SHARD_IMAGES) if shards is None else shards
        if not 1 <= self.shards <= len(source):
            raise UserError(f"--shards {shards}: allowed are 1 to the {len(source)} images")
        described = {"source": config.source, "path": config.path, **describe(source)}
        record = {"data": described, **settings._asdict(), "shards": self.shards}
        if source.class_names:
            record[CLASSES] = list(source.class_names)
        self.unreadable: dict[str, str] = {}
        self.texts: list[str] = []  # keys of images whose labels are texts without a number
        started = any(out.glob(f"{split}-*-of-*.array_record"))
        words = "images", "the same data and options"
        keep_settings(out / f"{split}.json", record, started, *words)

    def path(self, number: int) -> Path:
        return self.out / f"{self.split}-{number:05d}-of-{self.shards:05d}.array_record"

    def run(self, threads: int, max_bad: int) -> None:
        """Writes those of this process's shards that are not there."""
        mine = range(jax.process_index(), self.shards, jax.process_count())
        left = [number for number in mine if not self.path(number).exists()]
        if len(left) < len(mine):
            say(f"{self.split}: {len(mine) - len(left)} of {len(mine)} shards are there already")
        ranges = {i: shard_range(len(self.source), i, self.shards) for i in left}
        total = sum(map(len, ranges.values()))
        ticks = track(range(total), total, self.split, " images")
        bad = BadRecords(self.source, max_bad)
        with ThreadPoolExecutor(threads) as pool:
            for number, indices in ranges.items():
                self._write(number, self._records(indices, pool, 4 * threads, ticks, bad))
        next(ticks, None)
        self.unreadable = bad.by_name()

    def _write(self, number: int, records: Iterator[dict[str, Any]]) -> None:
        """The shard gets its name when it is complete."""
        path = self.path(number)
        partial_path = path.with_name(f".{path.name}.partial")
        try:
            if not write_records(partial_path, records, compress=False):
                raise RunError(f"{path}: none of its images can be read")
            os.replace(partial_path, path)
        finally:
            partial_path.unlink(missing_ok=True)

    def _records(
        self,
        indices: range,
        pool: ThreadPoolExecutor,
        ahead: int,
        ticks: Iterator[int],
        bad: BadRecords,
    ) -> Iterator[dict[str, Any]]:
        """The readable records in order; no more than `ahead` are in memory."""
        queue: deque = deque()
        upcoming = iter(indices)
        try:
            while True:
                while len(queue) < ahead and (index := next(upcoming, None)) is not None:
                    queue.append((index, pool.submit(self._record, index)))
                if not queue:
                    return
                index, future = queue.popleft()
                next(ticks)
                try:
                    record = future.result()
                except Exception as error:  # decoders meet damage with errors of every kind
                    bad.add(index, reason_of(error))
                else:
                    yield record
        finally:
            for _, future in queue:
                future.cancel()

    def _record(self, index: int) -> dict[str, Any]:
        record = self.source[index]
        image = self.settings.stored(record["image"], self.max_pixels)
        text = {"label_text": record["label_text"]} if "label_text" in record else {}
        if text:
            self.texts.append(printable(self.source.key(index)))
        return {"image": image, "label": record["label"], "key": self.source.key(index), **text}

    def report(self) -> int:
        """Says how many images the shards hold that are there, what they take, and what was left
        out; the last into SPLIT.read.json as well."""
        from array_record.python.array_record_module import ArrayRecordReader

        there = [number for number in range(self.shards) if self.path(number).exists()]
        files = [self.path(number) for number in there]
        count = sum(ArrayRecordReader(str(path)).num_records() for path in files)
        size = sum(path.stat().st_size for path in files)
        say(
            f"{self.split}: {count:,} images in {len(files)} of {self.shards} shards, "
            f"{size / 2**30:.3g} GiB, {size / max(count, 1) / 1024:,.0f} KiB an image"
        )
        found = account(self.source, self.unreadable, used=count)
        done = sum(len(shard_range(len(self.source), i, self.shards)) for i in there)
        if before := done - count - len(self.unreadable):
            found["left_out"]["unreadable, in an earlier start or another process"] = {
                "count": before,
                "example": "see what that said",
            }
        if self.texts:
            found["left_out"][TEXT_LABELS] = {"count": len(self.texts), "example": self.texts[0]}
        for line in account_lines(found):
            say(f"{self.split}: {line}")
        if jax.process_index() == 0:
            (self.out / f"{self.split}.read.json").write_text(json.dumps(found, indent=2) + "\n")
        return count
