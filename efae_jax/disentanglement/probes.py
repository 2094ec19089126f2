"""Probes: fresh embedders, one for each part of the channels, trained side by side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from efae_jax.models.disentangler import Embedder, change_channels
from efae_jax.models.functional import Net
from efae_jax.sharding import batch_sharding, replicated


class Settings(NamedTuple):
    """How probes are made.

    Attributes:
      width, blocks: of their embedders.
      steps: of their training, by Adam.
      lr: learning rate at the start; it falls to 0 by a cosine.
      seed: of their initial parameters.
    """

    width: int = 16
    blocks: int = 3
    steps: int = 2_000
    lr: float = 3e-3
    seed: int = 0


class Probes:
    """Embedders that learn to predict one target from parts of the channels, side by side.

    Part p sees B_p z on the channels, B_p with K_p orthonormal rows; missing rows are zero, so
    that all parts are of one shape and one compiled program trains each of them. All see the same
    examples and start from draws of their own.

    Args:
      parts: B_p by name, [K_p, C].
      most: rows of the largest part, or more.
      dimension: of the target.
      settings: of the probes.
      mesh: batches are split over all of it.
    """

    def __init__(
        self,
        parts: dict[str, Float[np.ndarray, "K C"]],
        most: int,
        dimension: int,
        settings: Settings,
        mesh: Mesh,
    ):
        self.names = tuple(parts)
        self._settings, self._whole, self._steps = settings, replicated(mesh), 0
        # Many programs under way that join several CPU devices wait for each other's threads.
        self._one_at_a_time = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        self._programs = _programs(most, dimension, settings.width, settings.blocks, mesh)

        def padded(rows: np.ndarray) -> Array:
            rows = np.pad(np.asarray(rows, np.float32), ((0, most - len(rows)), (0, 0)))
            return jax.device_put(rows, self._whole)

        self._rows = [padded(rows) for rows in parts.values()]
        keys = jax.random.split(jax.random.key(settings.seed), len(parts))
        self._states = [self._programs.init(key) for key in keys]

    def learn(self, z: Float[Array, "B h w C"], target: Float[Array, "B D"]) -> list[Array]:
        """One step of every part; returns their losses before it, |e - target|^2, unfetched."""
        done = min(self._steps / self._settings.steps, 1)
        rate = np.float32(self._settings.lr * (1 + math.cos(math.pi * done)) / 2)
        rate, losses = jax.device_put(rate, self._whole), []
        for i, rows in enumerate(self._rows):
            self._states[i], loss = self._programs.step(self._states[i], rows, z, target, rate)
            losses.append(self._paced(loss))
        self._steps += 1
        return losses

    def predict(self, z: Float[Array, "B h w C"]) -> list[Float[Array, "B D"]]:
        """The parts' predictions, unfetched."""
        pairs = zip(self._states, self._rows, strict=True)
        return [self._paced(self._programs.predict(state[0], rows, z)) for state, rows in pairs]

    def _paced(self, result: Array) -> Array:
        return result.block_until_ready() if self._one_at_a_time else result


class _Programs(NamedTuple):
    init: Callable[[Array], Any]
    step: Callable[..., tuple[Any, Array]]
    predict: Callable[..., Array]


@functools.cache  # they take seconds to compile
def _programs(channels: int, dimension: int, width: int, blocks: int, mesh: Mesh) -> _Programs:
    net = Net(lambda rngs: Embedder(channels, dimension, width, blocks, scaled=True, rngs=rngs))
    adam, whole, split = optax.scale_by_adam(), replicated(mesh), batch_sharding(mesh)

    def init(key: Array) -> Any:
        params = net.init(key)
        return params, adam.init(params)

    def predict(params: Any, rows: Array, z: Array) -> Array:
        return net(params, change_channels(rows, z))

    def step(state: Any, rows: Array, z: Array, target: Array, rate: Array) -> tuple[Any, Array]:
        params, moments = state

        def loss(params: Any) -> Array:
            return jnp.square(predict(params, rows, z) - target).sum(-1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(gradient, moments)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), value

    return _Programs(
        jax.jit(init, out_shardings=whole),
        jax.jit(
            step,
            in_shardings=(whole, whole, split, split, whole),
            out_shardings=whole,
            donate_argnums=0,
        ),
        jax.jit(predict, in_shardings=(whole, whole, split), out_shardings=whole),
    )
