"""The training state, and the pure step from one state to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import PRNGKeyArray

from efae_jax.methods.base import Method

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def init_state(
    method: Method, optimizers: dict[str, optax.GradientTransformation], key: PRNGKeyArray
) -> State:
    """{"step", "params", "ema", "opt"}; the last three by player. Jit it with sharded outputs."""
    params = method.init(key)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": {name: optimizers[name].init(params[name]) for name in method.players},
    }


def make_train_step(
    method: Method,
    optimizers: dict[str, optax.GradientTransformation],
    *,
    seed: int,
    ema_decay: float,
    accumulate: int,
) -> Callable[[State, dict[str, jax.Array]], tuple[State, Metrics]]:
    """The step function; pure, for `jax.jit` with the state donated.

    Every player in turn: the mean over the batch of its loss, the gradient for its own
    parameters, its optimiser's update. Then the exponential moving average,
    ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), whose
    slow start forgets the initial values.

    Args:
      seed: the step's random keys follow from it and the step's number alone.
      ema_decay: 0 for none.
      accumulate: the batch is taken in that many parts, one after the other, with the
        gradient of the whole.
    """

    def gradient(player: str, params: State, batch: Any, keys_B: PRNGKeyArray) -> Any:
        def mean_loss(own: Any) -> tuple[jax.Array, Metrics]:
            loss_B, extra = method.loss(player, {**params, player: own}, batch, keys_B)
            metrics = {"loss": loss_B, **extra}
            return jnp.mean(loss_B), jax.tree.map(jnp.mean, metrics)

        return jax.grad(mean_loss, has_aux=True)(params[player])

    def accumulated(player: str, params: State, batch: Any, keys_B: PRNGKeyArray) -> Any:
        if accumulate == 1:
            return gradient(player, params, batch, keys_B)
        # Part a takes examples a, a + A, a + 2A...: the batch axis stays split over devices.
        parts = jax.tree.map(
            lambda v: rearrange(v, "(b a) ... -> a b ...", a=accumulate), (batch, keys_B)
        )
        first = jax.eval_shape(
            lambda p, part: gradient(player, p, *part), params, jax.tree.map(lambda v: v[0], parts)
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(player, params, *part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda v: v / accumulate, total)

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        step = state["step"]
        key = jax.random.fold_in(jax.random.key(seed), step)
        params, opt, metrics = dict(state["params"]), dict(state["opt"]), {}
        for i, player in enumerate(method.players):
            keys_B = jax.random.split(jax.random.fold_in(key, i), batch["image"].shape[0])
            grads, figures = accumulated(player, params, batch, keys_B)
            updates, opt[player] = optimizers[player].update(grads, opt[player], params[player])
            params[player] = optax.apply_updates(params[player], updates)
            figures["gradient_norm"] = optax.tree.norm(grads)
            metrics |= {f"{player}/{name}": value for name, value in figures.items()}
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
        return {"step": step + 1, "params": params, "ema": ema, "opt": opt}, metrics

    return train_step
