"""The data sources by name."""

from __future__ import annotations

import difflib
from typing import Any

from efae_jax.data.array_records import open_array_records
from efae_jax.data.folder import open_folder
from efae_jax.data.glyphs import open_glyphs
from efae_jax.data.pairs import PairReader, open_pairs
from efae_jax.data.pipeline import Reader
from efae_jax.data.splits import SPLITS, Source
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


def make_source(config: Any, split: str) -> Source:
    """The source that config.data names, for split 'train' or 'test'.

    config: source, path; of images also data_dir, size, pad, train_split, test_split,
    test_fraction, num_train, num_test, max_bad. Raises UserError if a name is unknown or nothing
    is there.
    """
    if split not in SPLITS:
        raise UserError(f"data: no split {split!r}; allowed: {', '.join(SPLITS)}")
    if config.source == PAIRS:
        return open_pairs(config, split)
    if config.source not in SOURCES:
        close = difflib.get_close_matches(str(config.source), SOURCES, 1)
        raise UserError(
            f"data.source: no {config.source!r}; allowed: {', '.join(SOURCES)}"
            + (f" (did you mean {close[0]!r}?)" if close else "")
        )
    return SOURCES[config.source](config, split)


def make_reader(config: Any, *, train: bool) -> Reader:
    """The way of the records of `make_source` into batches, as config.data describes it."""
    if config.source == PAIRS:
        return PairReader(tuple(config.latent), config.text, config.image)
    return make_transform(config, train=train)
