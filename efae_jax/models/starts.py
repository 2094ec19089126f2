"""How a network's parameters are drawn: as Flax draws them, or as PyTorch does."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

STARTS = ("flax", "pytorch")


def pytorch_start(params: Any, key: jax.Array, kept: Sequence[str] = ()) -> Any:
    """Parameters drawn anew as `torch.nn.Linear` and `torch.nn.Conv2d` draw theirs.

    Kernels and their biases are uniform in +-1 / sqrt(n), n the numbers that one output sees: the
    product of a kernel's axes but the last. Scales and biases of norms have no kernel beside them
    and stay as they are.

    Flax' own start, LeCun's, is a normal distribution of standard deviation n^-1/2, sqrt(3) times
    as wide, with biases of zero.

    Args:
      params: a tree of modules; a layer is a dictionary with a "kernel".
      key: of the draws.
      kept: regexes of paths such as "head/linear/kernel" that stay as they are.
    """

    def walk(node: Any, path: str, key: jax.Array) -> Any:
        if not isinstance(node, dict):
            return node
        keys = dict(zip(node, jax.random.split(key, max(len(node), 1)), strict=True))
        bound = _bound(node["kernel"].shape) if "kernel" in node else None
        found = {}
        for name, value in node.items():
            here = f"{path}/{name}".lstrip("/")
            drawn = bound is not None and name in ("kernel", "bias")
            if drawn and not any(re.search(pattern, here) for pattern in kept):
                found[name] = jax.random.uniform(
                    keys[name], value.shape, jnp.float32, -bound, bound
                )
            else:
                found[name] = walk(value, here, keys[name])
        return found

    return walk(params, "", key)


def _bound(shape: Sequence[int]) -> float:
    return 1 / math.sqrt(math.prod(shape[:-1]))
