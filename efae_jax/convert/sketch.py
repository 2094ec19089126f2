"""The disentangler's weights: an orthogonal matrix on latent channels, and two embedders.

The file is a state dict `z_transform.*`, `sem_embedder.*`, `style_embedder.*`, or the matrix
alone as `weight`. It belongs to an autoencoder and is not one, so `read_model` does not take it;
`efae_jax.disentangled.runs` makes work directories of it, and writes it.
The tree is {"transform": {"matrix"}, "semantic": embedder, "style": embedder}, where an
embedder is {"conv_in", "blocks"/i/{"down", "norm", "expand", "reduce"}, "norm", "out"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from efae_jax.convert import files, layout
from efae_jax.errors import UserError
from efae_jax.models.disentangler import build_disentangler

FORMAT = "sketch"
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
    return from_tensors(files.read_state_dict(path), path)


def from_tensors(tensors: Mapping[str, np.ndarray], path: str | Path) -> layout.Params:
    """The same of a state dict that was read from `path`."""
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


def write(path: str | Path, params: Mapping[str, Any], dtype: str = "float32") -> None:
    """Writes a tree as `read` gives it; the matrix alone as `weight`.

    Args:
      dtype: of the stored numbers, one of `layout.STORED_TYPES`.

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
    files.write_model(path, layout.cast(tensors, dtype), {"format": FORMAT})


class DisentanglerError(UserError):
    """A disentangler's weights, where a model's were wanted."""


def new_config(params: Mapping[str, Any], path: str | Path) -> ConfigDict:
    """A config of `configs/disentangle.py` that describes a tree with embedders.

    The weights do not tell the sides of a latent: `config.data.latent` has the channels alone.

    Raises:
      UserError: shapes that do not fit each other (all listed).
    """
    from configs.disentangle import get_config

    config = get_config("taesd4")
    semantic, style = (params[name] for name in _EMBEDDERS.values())
    with config.unlocked():
        config.data.latent = (len(params["transform"]["matrix"]),)
        config.data.text, config.data.image = (len(e["out"]["bias"]) for e in (semantic, style))
        config.model.semantic = semantic_channels(params, path)
        config.model.width = len(semantic["conv_in"]["bias"])
        config.model.blocks = len(semantic.get("blocks", {}))
        config.model.orthogonality, config.model.scaled = "soft", False
    try:
        disentangler = build_disentangler(config)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    entries = table(config.model.blocks)
    abstract = jax.eval_shape(disentangler.init, jax.random.key(0))
    problems = layout.tensor_problems(entries, layout.to_theirs(entries, params), abstract)
    layout.require(problems, f"{path} is not a disentangler")
    return config


def semantic_channels(params: Mapping[str, Any], path: str | Path) -> int:
    """How many channels are semantic, by what the embedders take.

    Raises:
      UserError: the two embedders do not take all channels of the matrix.
    """
    semantic, style = (params[name]["conv_in"]["kernel"].shape[2] for name in _EMBEDDERS.values())
    channels = len(params["transform"]["matrix"])
    if semantic + style != channels:
        raise UserError(f"{path}: the embedders take {semantic} and {style} of {channels} channels")
    return semantic


def _blocks(tensors: Mapping[str, np.ndarray]) -> int:
    pattern = r"(?:sem|style)_embedder\.blocks\.(\d{1,6})\."
    numbers = [int(m[1]) for name in tensors if (m := re.match(pattern, name))]
    # An absurd number is left over.
    return 1 + max((n for n in numbers if n < _MOST_BLOCKS), default=-1)
