"""Captions in webdataset tar shards."""

from __future__ import annotations

from typing import Any

from efae_jax.data.captions.texts import CaptionError, captions_of_json, captions_of_text, record
from efae_jax.data.splits import files_of, with_absent
from efae_jax.data.tar_shards import TarShards


class CaptionedShards(TarShards):
    """`TarShards` with captions, read with the image: a sample's `.txt`, or else its `.json`."""

    companions = (".txt", ".json")

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, kind, text = self.read(index)
        if not kind:
            raise CaptionError("no caption: the sample has neither .txt nor .json")
        parse = captions_of_text if kind == ".txt" else captions_of_json
        return record(image, parse(text, f"its {kind}"))


def open_captioned_shards(path: str, max_bad: int) -> CaptionedShards:
    """The shards that a pattern names.

    Raises:
      UserError: when none is there, or more than max_bad are damaged.
    """
    return with_absent(CaptionedShards(files_of(path, "tar shard"), max_bad), path)
