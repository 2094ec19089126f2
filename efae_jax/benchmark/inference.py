"""Encoding, decoding and sampling as contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from efae_jax.benchmark.measure import Contender, clock, high_water, memory_of, operations
from efae_jax.benchmark.training import compile_timed
from efae_jax.sharding import batch_sharding, make_mesh, replicated


def program(
    function: Callable[..., Any],
    params: Any,
    arrays: Sequence[np.ndarray],
    devices: Sequence[Any],
    counted: tuple[Callable[..., Any], int] | None = None,
) -> Contender:
    """A jitted function of parameters and batches, the batches split over the devices.

    Args:
      function: of (params, *arrays).
      params, arrays: on the host, or anywhere.
      devices: that split the arrays' first axis.
      counted: another function of the same arguments, and how many times its operations the
        function has: XLA counts the body of a loop once.
    """
    before, mesh = high_water(devices[0]), make_mesh(devices=devices)
    params = jax.device_put(params, replicated(mesh))
    arrays = [jax.device_put(array, batch_sharding(mesh)) for array in arrays]
    lowered = jax.jit(function).lower(params, *arrays)
    compiled, seconds = compile_timed(lowered)
    wait = devices[0].platform == "cpu"

    def run(count: int) -> float:
        return clock(lambda: compiled(params, *arrays), count, wait=wait)

    if counted is None:
        total = operations(lambda: lowered, compiled)
    else:
        once = jax.jit(counted[0])
        total = counted[1] * operations(lambda: once.lower(params, *arrays))
    run(1)
    return Contender(run, seconds, total, memory_of(compiled, devices[0], before))
