"""Latents with embeddings of their images and captions: what a disentangler learns from.

    pairs = Pairs("pairs/")  # that `python -m efae_jax embed` has completed
    pairs[0]  # {"latent": float32 [h, w, C], "captions": float32 [k, T], "image": float32 [I], ...}

Beside the shards of latents (`data.latents`) lie as many of embeddings, msgpack maps {"index",
"texts", "captions", "image"}. `pairs.json` says who made them; `pairs.npz` holds the pairs' keys,
where the two halves of each are, and how captions predict image embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Float

from efae_jax import json_files
from efae_jax.data.array_records import unpack
from efae_jax.data.latents import Latents
from efae_jax.data.left_out import LeftOut
from efae_jax.data.splits import Source, hold_out
from efae_jax.errors import UserError
from efae_jax.paths import printable, user_path

SUMMARY, ARRAYS = "pairs.json", "pairs.npz"
MOST_CAPTIONS = 5  # of an image


def embeddings_path(folder: Path, number: int, shards: int) -> Path:
    """The file of a shard of embeddings."""
    return Path(folder) / f"embeddings-{number:05d}-of-{shards:05d}.array_record"


class Prediction(NamedTuple):
    """The image embedding that a caption's embedding lets expect: A^T t + b.

    What an image embedding i has beyond it, i - (A^T t + b), is the image's style. In CLIP's joint
    space A = 1 and b = 0: the style is i - t. Elsewhere A and b are those of least squares.

    Attributes:
      matrix: A, [T, I]. offset: b, [I].
    """

    matrix: Float[np.ndarray, "T I"]
    offset: Float[np.ndarray, " I"]


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `pairs.json` says.

    Raises:
      UserError: when the folder is not complete.
    """
    path = Path(user_path(folder)) / SUMMARY
    summary = json_files.read_object(path, "a summary of latents with embeddings")
    if summary is None:
        raise UserError(
            f"data.path: '{printable(str(folder))}' holds no {SUMMARY}, so no latents with "
            "embeddings, or not all of them yet; `python -m efae_jax embed` makes them"
        )
    wanted = {"embeddings": list, "latents": dict, "test_fraction": float, "text": dict}
    if missing := [k for k, kind in wanted.items() if not isinstance(summary.get(k), kind)]:
        raise UserError(
            f"{printable(str(path))} is not a summary of latents with embeddings: it needs "
            f"{', '.join(missing)}; `python -m efae_jax embed` writes one"
        )
    return summary


class Embeddings:
    """The records {"index", "texts", "captions" [k, T], "image" [I]} of a folder's shards.

    Args:
      folder: of the shards.
      counts: of records in each of them.

    Raises:
      UserError: when a shard is missing.
    """

    def __init__(self, folder: Path, counts: Sequence[int]):
        files = [embeddings_path(folder, i, len(counts)) for i in range(len(counts))]
        self._files = [file for file, n in zip(files, counts, strict=True) if n]
        if missing := [file.name for file in self._files if not file.exists()]:
            raise UserError(f"{folder} lacks {', '.join(missing)}; run `embed` again")
        self._ends = list(accumulate(n for n in counts if n))

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = bisect_right(self._ends, index)
        position = index - (self._ends[file - 1] if file else 0)
        return unpack(self._reader(file)[position])

    @functools.cache  # noqa: B019  (a reader lives as long as its program)
    def _reader(self, file: int) -> ArrayRecordDataSource:
        return ArrayRecordDataSource([str(self._files[file])])


class Pairs:
    """The records of a folder, by number.

    Attributes:
      summary: what `pairs.json` says: {"text", "image": {"name", "space", "dimension"}, "style",
        "test_fraction", "latents": the latents' own summary, ...}.
      prediction: of image embeddings from captions'.
      means: of the training pairs' "caption" [T] (the mean of each image's) and "style" [I].

    Raises:
      UserError: when the folder is not complete.
    """

    num_classes = 0
    class_names = ()

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder, self.summary = Path(user_path(folder)), read_summary(folder)
        self._latents = Latents(self.folder)
        self.left_out = LeftOut()
        self._embeddings = Embeddings(self.folder, self.summary["embeddings"])
        try:
            found = np.load(self.folder / ARRAYS, allow_pickle=False)
        except OSError as error:
            raise UserError(f"{folder} lacks {ARRAYS}; run `embed` again") from error
        with found as arrays:
            self._keys = arrays["keys"]
            self._places = np.stack([arrays["latents"], arrays["embeddings"]], axis=1)
            self.prediction = Prediction(arrays["matrix"], arrays["offset"])
            self.means = {name: arrays[f"{name}_mean"] for name in ("caption", "style")}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"latent", "captions" [k, T], "image" [I], "texts" (k strings), "index", "key"}."""
        latent, embedding = (int(place) for place in self._places[index])
        record = {**self._embeddings[embedding], "key": self.key(index)}
        return {**record, "latent": self._latents[latent]["latent"]}

    def key(self, index: int) -> str:
        return str(self._keys[index])

    def name(self, index: int) -> str:
        return f"{self.folder}: {self.key(index)}"


@dataclasses.dataclass(frozen=True)
class PairReader:
    """The way of a record of `Pairs` into a batch.

    The arrays of an example are "latent" [h, w, C] and "image" [I], "captions" [5, T], of which the
    first "count" are there and the others zero.

    Attributes:
      latent: its shape. text, image: dimensions of the embeddings.
    """

    latent: tuple[int, ...]
    text: int
    image: int

    def example(self, record: dict[str, Any], random: Random) -> dict[str, np.ndarray]:
        """The arrays of a record; nothing is random."""
        del random
        found = self.blank()
        captions = record["captions"]
        found["latent"][:], found["image"][:] = record["latent"], record["image"]
        found["captions"][: len(captions)] = captions
        return found | {"count": np.int32(len(captions))}

    def blank(self) -> dict[str, np.ndarray]:
        """Zeros, and a count of one."""
        return {
            "latent": np.zeros(self.latent, np.float32),
            "captions": np.zeros((MOST_CAPTIONS, self.text), np.float32),
            "count": np.int32(1),
            "image": np.zeros(self.image, np.float32),
        }


class NamingReader(PairReader):
    """As `PairReader`, with "names" uint32 [5, 2]: a hash of each caption's text, zeros for none.

    Equal texts have equal names, whatever rounding has left of their embeddings.
    """

    def example(self, record: dict[str, Any], random: Random) -> dict[str, np.ndarray]:
        """The arrays of a record, with the captions' names."""
        found = super().example(record, random)
        texts, captions = record["texts"], record["captions"]
        contents = [text.encode("utf-8", "replace") for text in texts]
        if len(texts) != len(captions):  # a user's own embeddings need not be of these captions
            contents = [row.tobytes() for row in captions]
        for row, content in enumerate(contents):
            digest = blake2b(content, digest_size=8).digest()
            found["names"][row] = np.frombuffer(digest, np.uint32)
        return found

    def blank(self) -> dict[str, np.ndarray]:
        """Zeros, and a count of one."""
        return {**super().blank(), "names": np.zeros((MOST_CAPTIONS, 2), np.uint32)}


def open_pairs(config: Any, split: str) -> Source:
    """The folder data.path for a split; what is held out was decided when it was made."""
    pairs = Pairs(config.path)
    return hold_out(pairs, split, pairs.summary["test_fraction"])
