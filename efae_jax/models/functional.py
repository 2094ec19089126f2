"""A functional boundary around Flax NNX modules: plain pytrees of parameters in, arrays out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


class Net:
    """A Flax NNX module as a pure function of a plain tree of parameters.

    The module's structure is recorded once, without allocating anything; its
    parameters live outside, as nested dictionaries with string keys, and are
    merged with the structure inside whatever jitted function calls the net.

        net = Net(lambda rngs: Encoder(channels=3, rngs=rngs))
        params = jax.jit(net.init)(jax.random.key(0))
        z = net(params, x)                        # Encoder.__call__
        y = net(params, x, method="features")     # another method

    Args:
      build: makes the module from `nnx.Rngs`.
      start: (parameters as the module draws them, key) to those that `init` gives.
      precision: of products in float32, as `jax.default_matmul_precision` names it; JAX's own
        choice unless given.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        start: Callable[[Params, jax.Array], Params] | None = None,
        precision: str | None = None,
    ):
        self._build, self._start, self._precision = build, start, precision
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self.graphdef, self._abstract = nnx.split(module)

    def init(self, key: jax.Array) -> Params:
        """Draws the parameters; jit it, eager initialisation is slow."""
        params = _string_keys(nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)))))
        return params if self._start is None else self._start(params, jax.random.fold_in(key, 1))

    @functools.cached_property
    def abstract(self) -> Params:
        """The parameters' shapes and dtypes."""
        return _string_keys(nnx.to_pure_dict(self._abstract))

    def __call__(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        state = _like(self._abstract, params)
        module = nnx.merge(self.graphdef, state)
        if self._precision is None:
            return getattr(module, method)(*args, **kwargs)
        with jax.default_matmul_precision(self._precision):
            return getattr(module, method)(*args, **kwargs)


def _string_keys(tree: Any) -> Any:
    # nnx.List gives integer keys; checkpoints and path rules want strings.
    if isinstance(tree, dict):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def _like(abstract: nnx.State, params: Params) -> nnx.State:
    def leaf(path: tuple[Any, ...]) -> jax.Array:
        node = params
        for part in path:
            node = node[str(part)]
        return node

    return nnx.from_flat_state(
        [(path, variable.replace(leaf(path))) for path, variable in nnx.to_flat_state(abstract)]
    )
