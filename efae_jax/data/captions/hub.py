"""Captioned data sets of the Hugging Face hub, through the `datasets` library."""

from __future__ import annotations

import os
import re
from typing import Any

from efae_jax.data.bad_image import BadImageError
from efae_jax.data.captions.texts import record, strings, usable
from efae_jax.data.left_out import LeftOut
from efae_jax.errors import UserError

_CAPTIONS = re.compile(r"caption|text|en($|_)", re.IGNORECASE)  # how their columns' names start
_SPLITS = ("train", "test")


class HubImages:
    """The images and captions of a split, read where `datasets` keeps them on disk."""

    num_classes = 0
    class_names = ()

    def __init__(self, name: str, rows: Any, image: str, captions: list[str]):
        self.dataset, self.rows, self.image, self.captions = name, rows, image, captions
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        texts = [t for name in self.captions for t in strings(row[name], f"column {name!r}")]
        captions = usable(texts, f"column {', '.join(map(repr, self.captions))}")
        image = row[self.image] or {}
        data, path = image.get("bytes"), image.get("path")
        if data is None and path is not None:
            with open(path, "rb") as file:
                data = file.read()
        if data is None:
            raise BadImageError(f"column {self.image!r} is empty")
        return record(data, captions)

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"{self.dataset}[{index}]"


def open_hub(name: str, split: str | None) -> HubImages:
    """A split of the data set OWNER/NAME, or of a folder that `save_to_disk` made.

    Without a split: "train", or "test" where that is missing. The images' column is the one of
    images (the one called "image", of several); the captions' are those of text whose names
    start with caption or text, or are en or en_...

    Raises:
      UserError: for what is not there, and for a data set without such columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("--data hub: needs the package: pip install datasets") from error
    try:
        rows, split = (_from_disk if os.path.isdir(name) else _from_hub)(datasets, name, split)
    except UserError:
        raise
    except Exception as error:  # of the network, of files, of names: of many kinds
        raise UserError(
            f"--data hub:{name}: {type(error).__name__}: {error}".split("\n")[0]
        ) from error
    images = [k for k, v in rows.features.items() if isinstance(v, datasets.Image)]
    captions = [k for k, v in rows.features.items() if _CAPTIONS.match(k) and _is_text(v)]
    if not images or not captions:
        raise UserError(
            f"--data hub:{name}: no column of {'captions' if images else 'images'} among "
            f"{', '.join(rows.features)}; captions: caption..., text..., en"
        )
    image = "image" if "image" in images else images[0]
    rows = rows.select_columns([image, *captions]).cast_column(image, datasets.Image(decode=False))
    return HubImages(f"{name}/{split}" if split else name, rows, image, captions)


def _from_disk(datasets: Any, path: str, split: str | None) -> tuple[Any, str | None]:
    rows = datasets.load_from_disk(path)
    if isinstance(rows, datasets.DatasetDict):
        split = _choose(path, split, list(rows))
        return rows[split], split
    if split is not None:
        raise UserError(f"--split {split}: {path} has no splits")
    return rows, None


def _from_hub(datasets: Any, name: str, split: str | None) -> tuple[Any, str]:
    split = _choose(name, split, datasets.get_dataset_split_names(name))
    return datasets.load_dataset(name, split=split), split


def _choose(name: str, split: str | None, there: list[str]) -> str:
    wanted = _SPLITS if split is None else (split,)
    for candidate in wanted:
        if candidate in there:
            return candidate
    raise UserError(
        f"--data hub:{name} has no split {' or '.join(map(repr, wanted))}; --split allows: "
        f"{', '.join(there)}"
    )


def _is_text(feature: Any) -> bool:
    if isinstance(feature, (list, tuple)):
        feature = feature[0]
    return getattr(getattr(feature, "feature", feature), "dtype", "") in ("string", "large_string")
