"""Embeddings that the user brings, in a file, by the keys of the examples.

- .npz: `keys` [N] (strings), `text` [N, D] or [N, K, D], `image` [N, D']; where images have
  different numbers of captions, `counts` [N]: how many of the K rows are there.
- .parquet: columns `key` (strings), `text` (a list of numbers, or a list of such lists), `image`
  (a list of numbers).

Keys are those of the source: a file's path below its folder, and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from efae_jax.data.bad_image import looks_like
from efae_jax.data.pairs import MOST_CAPTIONS
from efae_jax.embedders.base import Captioned, row_norms, unit_rows
from efae_jax.embedders.pretrained import digest, need, one_line
from efae_jax.errors import UserError

CONTENT = {
    ".npz": "keys [N], text [N, D] or [N, K, D], image [N, D'] and, if need be, counts [N]",
    ".parquet": "columns key, text (lists of numbers, or of such lists), image (lists of numbers)",
}


class Table(NamedTuple):
    """A file's embeddings, of unit length.

    Attributes:
      file: for messages.
      rows: number of a key.
      text: of all captions. ends: of each key's captions in it, one number more than keys.
      image: of each key.
    """

    file: str
    rows: dict[str, int]
    text: Float32[np.ndarray, "M D"]
    ends: Int[np.ndarray, " N+1"]
    image: Float32[np.ndarray, "N I"]

    def row(self, key: str) -> int:
        """The number of an example's key.

        Raises:
          UserError: the file does not have it.
        """
        if key not in self.rows:
            raise UserError(
                f"{self.file} has no embeddings of {key!r}, but of {len(self.rows)} other keys "
                f"such as {next(iter(self.rows))!r}"
            )
        return self.rows[key]


class SuppliedTexts:
    """As many rows as the file has for an example (the first five), whatever its captions."""

    def __init__(self, table: Table, name: str, space: str):
        self.name, self.space, self.dimension = name, space, table.text.shape[1]
        self._table = table

    def __call__(self, examples: Sequence[Captioned]) -> list[Float32[np.ndarray, "k D"]]:
        """See `TextEmbedder`.

        Raises:
          UserError: an example that the file does not have.
        """
        found, table = [], self._table
        for i in (table.row(example.key) for example in examples):
            found.append(table.text[table.ends[i] : table.ends[i + 1]][:MOST_CAPTIONS])
        return found


class SuppliedImages:
    """The row that the file has for an example."""

    needs_image = False

    def __init__(self, table: Table, name: str, space: str):
        self.name, self.space, self.dimension = name, space, table.image.shape[1]
        self._table = table

    def __call__(self, examples: Sequence[Captioned]) -> Float32[np.ndarray, "N D"]:
        """See `ImageEmbedder`.

        Raises:
          UserError: an example that the file does not have.
        """
        return self._table.image[[self._table.row(example.key) for example in examples]]


def supplied_embedders(
    file: Path, same_space: bool = False
) -> tuple[SuppliedTexts, SuppliedImages]:
    """The embeddings in a file as described above; they are made of unit length.

    Args:
      same_space: whether text and image embeddings live in one joint space.

    Raises:
      UserError: a file that cannot be read, or whose content is not that; embeddings that are
        zero or not finite; dimensions that differ although the space is the same.
    """
    file = Path(file)
    if file.suffix not in CONTENT:
        raise UserError(f"--embeddings {file}: allowed are files {' and '.join(CONTENT)}")
    try:
        keys, text, counts, image = (_npz if file.suffix == ".npz" else _parquet)(file)
        name = f"{file.name} sha256:{digest(file)}"
    except OSError as error:
        raise UserError(f"--embeddings {file}: {error.strerror or one_line(error)}") from error
    table = _table(file, keys, text, counts, image)
    dimensions = table.text.shape[1], table.image.shape[1]
    if same_space and dimensions[0] != dimensions[1]:
        raise UserError(
            f"{file}: text embeddings of {dimensions[0]} numbers and image embeddings of "
            f"{dimensions[1]} do not live in one space"
        )
    spaces = (name, name) if same_space else (f"{name} text", f"{name} image")
    return SuppliedTexts(table, name, spaces[0]), SuppliedImages(table, name, spaces[1])


def _table(file: Path, keys: list[str], text: Any, counts: Any, image: Any) -> Table:
    rows = {key: i for i, key in enumerate(keys)}
    if not keys:
        raise UserError(f"{file} holds no embeddings")
    if len(rows) < len(keys):
        twice = next(key for i, key in enumerate(keys) if rows[key] != i)
        raise UserError(f"{file} has the key {twice!r} twice")
    if not counts.all():
        raise UserError(f"{file} has no text embedding of {keys[int(np.argmin(counts))]!r}")
    of_text = np.repeat(np.arange(len(keys)), counts)
    for kind, vectors, of in (("text", text, of_text), ("image", image, range(len(keys)))):
        norms = row_norms(vectors)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            raise UserError(
                f"{file}: the {kind} embedding of {keys[of[bad[0]]]!r} is zero or not finite"
            )
    ends = np.concatenate([[0], np.cumsum(counts)])
    return Table(str(file), rows, unit_rows(text, str(file)), ends, unit_rows(image, str(file)))


def _refuse(file: Path, found: str) -> UserError:
    return UserError(f"{file} holds {found}; wanted are {CONTENT[file.suffix]}")


def _npz(file: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    # Damaged bytes lead to a dozen kinds of errors.
    except Exception as error:
        with file.open("rb") as content:
            start = content.read(1000)
        what = "it is damaged" if start.startswith(b"PK") else f"it is {looks_like(start)}"
        raise UserError(
            f"{file} is no npz of plain arrays: {what}; wanted are {CONTENT['.npz']}"
        ) from error
    shapes = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in found.items())
    wrong = _refuse(file, shapes or "nothing")
    if not found.keys() >= {"keys", "text", "image"}:
        raise wrong
    keys, text, image = found["keys"], found["text"], found["image"]
    if keys.ndim != 1 or keys.dtype.kind != "U" or text.ndim not in (2, 3) or image.ndim != 2:
        raise wrong
    n = len(keys)
    if any(len(a) != n or a.dtype.kind != "f" or not a.size for a in (text, image)):
        raise wrong
    text = text.reshape(n, -1, text.shape[-1])
    counts, most = found.get("counts", np.full(n, text.shape[1])), text.shape[1]
    if counts.shape != (n,) or counts.dtype.kind not in "iu":
        raise wrong
    if counts.min() < 1 or counts.max() > most:
        raise UserError(f"{file}: counts must be 1 to the {most} text embeddings of a key")
    there = np.arange(most) < counts[:, None]
    return keys.tolist(), text[there], counts.astype(int), image


def _parquet(file: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    pyarrow = need("pyarrow", f"--embeddings {file}", "pyarrow")
    from pyarrow import parquet

    try:
        with file.open("rb") as content:
            table = parquet.read_table(content)
    except pyarrow.ArrowException as error:
        with file.open("rb") as content:
            start = content.read(1000)
        what = "it is damaged" if start.startswith(b"PAR1") else f"it is {looks_like(start)}"
        raise UserError(f"{file} is no table: {what}; wanted are {CONTENT['.parquet']}") from error
    if not set(table.column_names) >= {"key", "text", "image"}:
        raise _refuse(file, f"columns {', '.join(table.column_names)}")
    keys = table["key"].to_pylist()
    text, counts = _lists(file, table["text"])
    image, single = _lists(file, table["image"])
    if np.any(single != 1) or not all(isinstance(key, str) for key in keys):
        raise _refuse(file, f"keys {table['key'].type}, image {table['image'].type}")
    return keys, text, counts, image


def _lists(file: Path, column: Any) -> tuple[np.ndarray, np.ndarray]:
    """All the vectors of a column [M, D], and how many are of each row [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values, counts = column.combine_chunks(), None
    wanted = _refuse(file, f"a column of {column.type} with {column.null_count} nulls")
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(values.type) for is_list in lists) or values.null_count:
        raise wanted
    if any(is_list(values.type.value_type) for is_list in lists):
        counts, values = pc.list_value_length(values).to_numpy(), values.flatten()
    elif not pa.types.is_floating(values.type.value_type):
        raise wanted
    sizes, flat = pc.list_value_length(values), values.flatten()
    if values.null_count or flat.null_count or pc.count_distinct(sizes).as_py() > 1:
        raise UserError(f"{file} holds a column of {column.type} with nulls or different lengths")
    vectors = flat.to_numpy().reshape(len(values), sizes[0].as_py() if len(values) else 0)
    return vectors, np.ones(len(values), int) if counts is None else counts
