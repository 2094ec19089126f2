"""The data sources by name."""

from __future__ import annotations

import difflib
from typing import Any

from efae_jax.data import array_records, folder, tar_shards
from efae_jax.data.array_records import open_array_records
from efae_jax.data.folder import open_folder
from efae_jax.data.glyphs import open_glyphs
from efae_jax.data.pairs import PairReader, open_pairs
from efae_jax.data.pipeline import Reader
from efae_jax.data.splits import ALL, SPLITS, Joined, Source
from efae_jax.data.tar_shards import open_tar_shards
from efae_jax.data.tfds import open_tfds
from efae_jax.data.transforms import make_transform
from efae_jax.errors import UserError

PAIRS = "pairs"  # latents with embeddings; all others are of images
SOURCES = {
    "glyphs": open_glyphs,
    "folder": open_folder,
    "tfds": open_tfds,
    "array_record": open_array_records,
    "webdataset": open_tar_shards,
}


# Of each, whether what a config names has splits of its own; else some images are held out.
_HAS_SPLITS = {
    "folder": folder.has_splits,
    "array_record": array_records.has_splits,
    "webdataset": tar_shards.has_splits,
}


def make_source(config: Any, split: str) -> Source:
    """The source that config.data names, for split 'train', 'test' or 'all' (both together).

    config: source, path; of images also data_dir, size, pad, train_split, test_split,
    test_fraction, num_train, num_test, max_bad. Raises UserError if a name is unknown or nothing
    is there.
    """
    if split not in (*SPLITS, ALL):
        raise UserError(f"data: no split {split!r}; allowed: {', '.join((*SPLITS, ALL))}")
    if config.source == PAIRS:
        return open_pairs(config, split)
    _check_name(config.source)
    open_source = SOURCES[config.source]
    if split == ALL and has_splits(config):
        return Joined([open_source(config, name) for name in SPLITS])
    return open_source(config, split)


def has_splits(config: Any) -> bool:
    """Whether what config.data names has splits of its own, so that nothing need be held out.

    Raises UserError if its source is unknown.
    """
    _check_name(config.source)
    return _HAS_SPLITS.get(config.source, lambda _: True)(config)


def _check_name(name: str) -> None:
    if name not in SOURCES:
        close = difflib.get_close_matches(str(name), SOURCES, 1)
        raise UserError(
            f"data.source: no {name!r}; allowed: {', '.join(SOURCES)}"
            + (f" (did you mean {close[0]!r}?)" if close else "")
        )


def make_reader(config: Any, *, train: bool) -> Reader:
    """The way of the records of `make_source` into batches, as config.data describes it."""
    if config.source == PAIRS:
        return PairReader(tuple(config.latent), config.text, config.image)
    return make_transform(config, train=train)
