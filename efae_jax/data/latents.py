"""Latents on disk: shards that `python -m efae_jax encode` writes, and their reader.

    latents = Latents("latents/")
    latents[0]  # {"latent": float32 [h, w, C], "label": 3, "key": "cats/1.png", "index": 0}
    latents.class_names[3]  # "cats"

A record whose label is a text without a number has it as "label_text".

ArrayRecord shards hold one msgpack map a record, with these entries, the latent as the bytes of
an .npy file. An npz shard holds the arrays latents [N,h,w,C], labels, keys and indices.
"""

from __future__ import annotations

import functools
import os
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from efae_jax import json_files
from efae_jax.data.array_records import unpack, write_records
from efae_jax.errors import UserError
from efae_jax.paths import user_path

FORMATS = ("array_record", "npz")
SUMMARY = "latents.json"


def shard_path(folder: Path, number: int, shards: int, form: str) -> Path:
    """The file of a shard."""
    return Path(folder) / f"latents-{number:05d}-of-{shards:05d}.{form}"


def shard_range(count: int, number: int, shards: int) -> range:
    """Which of `count` records shard `number` is of."""
    return range(number * count // shards, (number + 1) * count // shards)


def write_shard(path: Path, records: Iterable[dict[str, Any]], form: str) -> int:
    """Writes records {"latent", "label", "key", "index"} to a file, whole or not at all.

    An npz shard is held in memory until it is complete. Returns the number of records.
    """
    partial = path.with_name(f".{path.name}.partial")
    write = _write_npz if form == "npz" else write_records
    try:
        count = write(partial, records)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_npz(path: Path, records: Iterable[dict[str, Any]]) -> int:
    kept = list(records)
    with path.open("wb") as file:
        # Only where labels are texts.
        texts = [r.get("label_text", "") for r in kept]
        np.savez(
            file,
            **({"label_texts": np.array(texts, str)} if any(texts) else {}),
            latents=np.stack([r["latent"] for r in kept]) if kept else np.zeros(0, np.float32),
            labels=np.array([r["label"] for r in kept], np.int64),
            keys=np.array([r["key"] for r in kept], str),
            indices=np.array([r["index"] for r in kept], np.int64),
        )
    return len(kept)


def _check(summary: dict[str, Any], path: Path) -> None:
    shards = summary.get("shards")
    counts = isinstance(shards, list) and all(type(n) is int and n >= 0 for n in shards)
    if summary.get("format") not in FORMATS or not counts or not sum(shards):
        raise UserError(
            f"{path} is not a summary of latents: it needs format, one of {', '.join(FORMATS)}, "
            "and shards, their numbers of latents"
        )


class Latents:
    """The latents of a folder, by number, in the order of the data that they were made from.

    Args:
      folder: that `encode` has completed.

    Attributes:
      summary: what `latents.json` says: mean, std, quantiles, shape, the model's identity, what
        was read and what was left out.
      class_names: of the labels, by number; empty where the data have none.

    Raises:
      UserError: when it is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = Path(user_path(folder))
        summary = json_files.read_object(folder / SUMMARY, "a summary of latents")
        if summary is None:
            raise UserError(
                f"{folder} holds no {SUMMARY}: no latents, or not all of them yet; `python -m "
                "efae_jax encode` makes them"
            )
        _check(summary, folder / SUMMARY)
        self.summary = summary
        self.class_names = tuple(self.summary.get("classes", ()))
        self._form, shards = self.summary["format"], self.summary["shards"]
        self._files = [
            shard_path(folder, i, len(shards), self._form) for i, n in enumerate(shards) if n
        ]
        self._ends = list(accumulate(n for n in shards if n))
        if missing := [file.name for file in self._files if not file.exists()]:
            raise UserError(f"{folder} lacks {', '.join(missing)}; run `encode` again")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"latent {index} of {len(self)}")
        file = bisect_right(self._ends, index)
        return self._read(file, index - (self._ends[file - 1] if file else 0))

    def _read(self, file: int, position: int) -> dict[str, Any]:
        if self._form == "npz":
            names = {"latent": "latents", "label": "labels", "key": "keys", "index": "indices"}
            arrays = self._arrays(file)
            values = {name: arrays[theirs][position] for name, theirs in names.items()}
            found = {k: v if k == "latent" else v.item() for k, v in values.items()}
            text = arrays["label_texts"][position].item() if "label_texts" in arrays else ""
            return found | ({"label_text": text} if text else {})
        return unpack(self._reader(file)[position])

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a reader lives as long as its program)
    def _arrays(self, file: int) -> dict[str, np.ndarray]:
        with np.load(self._files[file], allow_pickle=False) as arrays:
            return dict(arrays)

    @functools.cache  # noqa: B019
    def _reader(self, file: int) -> ArrayRecordDataSource:
        return ArrayRecordDataSource([str(self._files[file])])
