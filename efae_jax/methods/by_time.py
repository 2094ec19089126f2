"""A flow's loss by time: which noise levels it is bad at."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efae_jax.methods.base import Weighted

BINS = 10


def by_time(
    name: str, loss_B: Float[Array, " B"], t_B: Float[Array, " B"], bins: int = BINS
) -> dict[str, Weighted]:
    """The mean loss of the examples whose t lies in each of `bins` equal parts of [0, 1].

    {"NAME_t0.0-0.1": ..., "NAME_t0.9-1.0": ...}; a part has its lower end, the last its upper one
    as well.

    Args:
      name: of the loss.
      loss_B: per example.
      t_B: times, 1 is noise.
      bins: their number.
    """
    loss_B = jax.lax.stop_gradient(loss_B)
    bin_B = jnp.clip(jnp.floor(t_B * bins), 0, bins - 1)
    found = {}
    for i in range(bins):
        inside_B = (bin_B == i).astype(loss_B.dtype)
        ends = f"{i / bins:.1f}-{(i + 1) / bins:.1f}"
        found[f"{name}_t{ends}"] = Weighted(loss_B * inside_B, inside_B)
    return found
