"""The data sources by name."""

from __future__ import annotations

import difflib
from typing import Any

from efae_jax.data.array_records import open_array_records
from efae_jax.data.folder import open_folder
from efae_jax.data.glyphs import open_glyphs
from efae_jax.data.splits import SPLITS, Source
from efae_jax.data.tar_shards import open_tar_shards
from efae_jax.data.tfds import open_tfds
from efae_jax.errors import UserError

SOURCES = {
    "glyphs": open_glyphs,
    "folder": open_folder,
    "tfds": open_tfds,
    "array_record": open_array_records,
    "webdataset": open_tar_shards,
}


def make_source(config: Any, split: str) -> Source:
    """The source that config.data names, for split 'train' or 'test'.

    config: source, path, data_dir, size, pad, train_split, test_split, test_fraction, num_train,
    num_test, max_bad. Raises UserError if a name is unknown or nothing is there.
    """
    if split not in SPLITS:
        raise UserError(f"data: no split {split!r}; allowed: {', '.join(SPLITS)}")
    if config.source not in SOURCES:
        close = difflib.get_close_matches(str(config.source), SOURCES, 1)
        raise UserError(
            f"data.source: no {config.source!r}; allowed: {', '.join(SOURCES)}"
            + (f" (did you mean {close[0]!r}?)" if close else "")
        )
    return SOURCES[config.source](config, split)
