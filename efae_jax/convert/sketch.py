"""The disentangler's weights: an orthogonal matrix on latent channels, and two embedders.

The file is a state dict `z_transform.*`, `sem_embedder.*`, `style_embedder.*`, or the matrix
alone as `weight`. It belongs to an autoencoder and is not one, so `read_model` does not take it.
The tree is {"transform": {"matrix"}, "semantic": embedder, "style": embedder}, where an
embedder is {"conv_in", "blocks"/i/{"down", "norm", "expand", "reduce"}, "norm", "out"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, layout
from efae_jax.errors import UserError

BARE = "weight"
MATRIX = "z_transform.weight"
_EMBEDDERS = {"sem_embedder": "semantic", "style_embedder": "style"}
_MOST_BLOCKS = 16


def matches(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the names are a disentangler's."""
    return MATRIX in tensors or set(tensors) == {BARE}


def table(blocks: int) -> list[layout.Entry]:
    """The names of all arrays, with `blocks` blocks in each embedder."""
    entries = [layout.Entry(MATRIX, "transform/matrix", layout.SAME)]
    for theirs, ours in _EMBEDDERS.items():
        entries += layout.conv(f"{theirs}.in_conv", f"{ours}/conv_in")
        for i in range(blocks):
            block, here = f"{theirs}.blocks.{i}", f"{ours}/blocks/{i}"
            entries += layout.conv(f"{block}.in_conv.0", f"{here}/down", bias=False)
            entries += layout.norm(f"{block}.in_conv.1", f"{here}/norm")
            entries += layout.conv(f"{block}.block.0", f"{here}/expand")
            entries += layout.conv(f"{block}.block.2", f"{here}/reduce")
        entries += layout.norm(f"{theirs}.embedder.1", f"{ours}/norm")
        entries += layout.linear(f"{theirs}.embedder.3", f"{ours}/out")
    return entries


def read(path: str | Path) -> layout.Params:
    """The tree of a file; {"transform": {"matrix"}} of a file with the matrix alone.

    Matrix W[C, C]: u = W z on channels, as it is stored.

    Raises:
      UserError: an unreadable file, or names, shapes or types that do not fit (all listed).
    """
    tensors = files.read_state_dict(path)
    if set(tensors) == {BARE}:
        tensors, entries = {MATRIX: tensors[BARE]}, table(0)[:1]
    else:
        entries = table(_blocks(tensors))
    problems = layout.name_problems((entry.theirs for entry in entries), tensors)
    for entry in entries:
        tensor = tensors.get(entry.theirs)
        if tensor is None:
            continue
        dimensions = 4 if entry.layout is layout.CONV else 2 if entry.layout is layout.LINEAR else 1
        shape = tensor.shape
        if entry.theirs == MATRIX:
            if len(shape) != 2 or shape[0] != shape[1]:
                problems.append(f"{entry.theirs} is {shape}, expected a square matrix")
        elif len(shape) != dimensions:
            problems.append(f"{entry.theirs} is {shape}, expected {dimensions} dimensions")
        if tensor.dtype.name not in layout.STORED_TYPES:
            problems.append(f"{entry.theirs} is {tensor.dtype.name}")
    layout.require(problems, f"{path} is not a disentangler")
    return layout.to_ours(entries, tensors)


def write(path: str | Path, params: Mapping[str, Any]) -> None:
    """Writes a tree as `read` gives it; the matrix alone as `weight`.

    Raises:
      UserError: another tree, or a file that cannot be written.
    """
    blocks = len(params.get("semantic", {}).get("blocks", {}))
    bare = set(params) == {"transform"}
    entries = table(0)[:1] if bare else table(blocks)
    if layout.flatten(params).keys() != {entry.ours for entry in entries}:
        raise UserError(f"{path}: the parameters are not those of a disentangler")
    tensors = layout.to_theirs(entries, params)
    if bare:
        tensors = {BARE: tensors[MATRIX]}
    files.write_model(path, tensors, {"format": "sketch"})


def _blocks(tensors: Mapping[str, np.ndarray]) -> int:
    pattern = r"(?:sem|style)_embedder\.blocks\.(\d{1,6})\."
    numbers = [int(m[1]) for name in tensors if (m := re.match(pattern, name))]
    # An absurd number is left over.
    return 1 + max((n for n in numbers if n < _MOST_BLOCKS), default=-1)
