"""The embeddings of captioned images in shards on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efae_jax.data.array_records import write_records
from efae_jax.data.bad_image import reason_of
from efae_jax.data.latents import shard_range
from efae_jax.data.pairs import MOST_CAPTIONS, embeddings_path
from efae_jax.data.splits import Source
from efae_jax.data.transforms import Transform, read_picture
from efae_jax.embedders import Captioned, ImageEmbedder, TextEmbedder
from efae_jax.errors import RunError
from efae_jax.extract import keep_settings
from efae_jax.logs import say, track
from efae_jax.paths import printable

log = logging.getLogger(__name__)
SETTINGS = "embedding-settings.json"
BLOCK = 64  # images that are read, then embedded, at a time
THREADS = 8  # that read


class EmbeddingShards:
    """Embeds the images and captions of a source, except for shards that are there already.

    Shard s of S is of the images from s N / S on, as those of the latents are. A shard appears
    under its name when it is complete. What cannot be read is left out and counted.

    Args:
      source: captioned images.
      text, image: the embedders.
      described: what tells these images from others, for the record.
      out: the folder.
      shards: their number.
      max_bad: unreadable images of a shard that do not end the run.

    Raises:
      UserError: when the folder holds embeddings that were made otherwise.
    """

    def __init__(
        self,
        source: Source,
        text: TextEmbedder,
        image: ImageEmbedder,
        described: dict[str, Any],
        out: Path,
        shards: int,
        max_bad: int = 100,
    ):
        self.source, self.text, self.image, self.out = source, text, image, Path(out)
        self.shards, self.max_bad = shards, max_bad
        self.record = {
            "data": described,
            "shards": shards,
            **{
                name: {"name": e.name, "space": e.space, "dimension": e.dimension}
                for name, e in (("text", text), ("image", image))
            },
        }
        started = any(self.out.glob("embeddings-*-of-*.array_record"))
        words = "embeddings", "the same data and embedders"
        keep_settings(self.out / SETTINGS, self.record, started, *words)

    def run(self, process_index: int = 0, process_count: int = 1) -> None:
        """Writes those of this process's shards that are not there yet, with a progress bar.

        Raises:
          RunError: too many unreadable images.
        """
        mine = range(process_index, self.shards, process_count)
        left = [number for number in mine if not self._is_complete(number)]
        if len(left) < len(mine):
            say(f"{len(mine) - len(left)} of {len(mine)} shards of embeddings are there already")
        total = sum(len(self._range(i)) for i in left)
        ticks = track(range(total), total, "embedding", " images")
        for number in left:
            self._write(number, ticks)
        next(ticks, None)

    def indices(self) -> list[np.ndarray]:
        """Of each shard, the numbers in the source of the images that it holds.

        Raises:
          RunError: when some shards are missing.
        """
        if missing := [i for i in range(self.shards) if not self._is_complete(i)]:
            raise RunError(f"{self.out} lacks {len(missing)} of {self.shards} embedding shards")
        return [np.load(self._index_path(i), allow_pickle=False) for i in range(self.shards)]

    def _write(self, number: int, ticks: Iterator[int]) -> None:
        kept: list[int] = []

        def records() -> Iterator[dict[str, Any]]:
            for index, example, text, image in self._embedded(self._range(number), ticks):
                kept.append(index)
                texts = list(example.captions)
                yield {"index": index, "texts": texts, "captions": text, "image": image}

        path = embeddings_path(self.out, number, self.shards)
        partial = path.with_name(f".{path.name}.partial")
        try:
            write_records(partial, records())
            # The indices get their name first: the shard's says that it is complete.
            with _partial(self._index_path(number)).open("wb") as file:
                np.save(file, np.array(kept, np.int64))
            os.replace(_partial(self._index_path(number)), self._index_path(number))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _embedded(
        self, indices: range, ticks: Iterator[int]
    ) -> Iterator[tuple[int, Captioned, np.ndarray, np.ndarray]]:
        """(number, example, caption embeddings, image embedding), a block at a time."""
        unreadable: list[str] = []
        blocks = [indices[start : start + BLOCK] for start in range(0, len(indices), BLOCK)]
        with ThreadPoolExecutor(THREADS) as threads:
            ahead = threads.map(self._read, blocks[0])
            for block, following in zip(blocks, [*blocks[1:], ()], strict=True):
                read = list(ahead)
                ahead = threads.map(self._read, following)  # while this block is embedded
                examples = [
                    (i, e) for i, e in zip(block, read, strict=True) if not isinstance(e, str)
                ]
                for why in (e for e in read if isinstance(e, str)):
                    log.warning("skipped %s", why)
                    unreadable.append(why)
                if len(unreadable) > self.max_bad:
                    raise RunError(
                        f"{len(unreadable)} unreadable images are more than --max-bad "
                        f"{self.max_bad}; the last: {unreadable[-1]}"
                    )
                if examples:
                    some = [example for _, example in examples]
                    yield from (
                        (i, example, text[:MOST_CAPTIONS], image)
                        for (i, example), text, image in zip(
                            examples, self.text(some), self.image(some), strict=True
                        )
                    )
                for _ in block:
                    next(ticks)

    def _read(self, index: int) -> Captioned | str:
        """The example, or why there is none."""
        try:
            record, image = self.source[index], None
            if self.image.needs_image:
                # The same limit as the encoder's.
                found = read_picture(record["image"], max_pixels=Transform.max_pixels)
                image = Image.fromarray(found)
            key = self.source.key(index)
            return Captioned(key, image, record["captions"], record.get("factors"))
        except Exception as error:  # decoders meet damage with errors of every kind
            return f"{printable(self.source.name(index))}: {reason_of(error)}"

    def _range(self, number: int) -> range:
        return shard_range(len(self.source), number, self.shards)

    def _is_complete(self, number: int) -> bool:
        path = embeddings_path(self.out, number, self.shards)
        return path.exists() and self._index_path(number).exists()

    def _index_path(self, number: int) -> Path:
        return embeddings_path(self.out, number, self.shards).with_suffix(".indices.npy")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
