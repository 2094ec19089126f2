"""The training state, and the pure step from one state to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import PRNGKeyArray

from efae_jax.methods.base import Context, Method, Params

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def init_state(
    method: Method, optimizers: dict[str, optax.GradientTransformation], key: PRNGKeyArray
) -> State:
    """The state of step 0. Jit it with sharded outputs.

    {"step", "params" and "opt" by player, "ema" of the first player, "variables"}.
    """
    params = method.init(key)
    first = method.players[0]
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": {first: jax.tree.map(jnp.copy, params[first])},
        "opt": {name: optimizers[name].init(params[name]) for name in method.players},
        "variables": method.init_variables(),
    }


def make_train_step(
    method: Method,
    optimizers: dict[str, optax.GradientTransformation],
    *,
    seed: int,
    ema_decay: float,
    accumulate: int,
) -> Callable[[State, dict[str, jax.Array], Params, Hashable], tuple[State, Metrics]]:
    """The step function (state, batch, frozen, plan); pure, for `jax.jit` with the state donated
    and the plan static.

    Every player in turn: the mean over the batch of its loss, the gradient for its own
    parameters, its optimiser's update. Then the first player's exponential moving average,
    ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), whose
    slow start forgets the initial values.

    Args:
      seed: the step's random keys follow from it and the step's number alone.
      ema_decay: 0 for none.
      accumulate: the batch is taken in that many parts, one after the other, with the
        gradient of the whole. What a loss computes over the batch (norms of gradients,
        batch norm) is then computed over each part.
    """

    def gradient(
        player: str, params: Any, batch: Any, keys_B: PRNGKeyArray, context: Context
    ) -> tuple[Any, Metrics, Params, dict[str, jax.Array]]:
        def mean_loss(own: Any) -> Any:
            outcome = method.loss(player, {**params, player: own}, batch, keys_B, context)
            metrics = jax.tree.map(jnp.mean, {"loss": outcome.loss_B, **outcome.metrics})
            return metrics["loss"], (metrics, outcome.variables, outcome.passed)

        grads, others = jax.grad(mean_loss, has_aux=True)(params[player])
        return grads, *others

    def accumulated(
        player: str, params: Any, batch: Any, keys_B: PRNGKeyArray, context: Context
    ) -> tuple[Any, Metrics, Params, dict[str, jax.Array]]:
        def run(examples: Any, variables: Params) -> Any:
            batch, keys_B, passed = examples
            one = Context(context.step, variables, passed, context.frozen, context.plan)
            return gradient(player, params, batch, keys_B, one)

        if accumulate == 1:
            return run((batch, keys_B, context.passed), context.variables)
        # Part a takes examples a, a + A, a + 2A...: the batch axis stays split over devices.
        # What the players before passed on is in parts already.
        split = jax.tree.map(
            lambda v: rearrange(v, "(b a) ... -> a b ...", a=accumulate), (batch, keys_B)
        )
        parts = (*split, context.passed)
        first = jax.tree.map(lambda v: v[0], parts)
        shapes = jax.eval_shape(run, first, context.variables)[:2]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(carry: Any, part: Any) -> tuple[Any, Any]:
            total, variables = carry
            *sums, variables, passed = run(part, variables)
            return (jax.tree.map(jnp.add, total, tuple(sums)), variables), passed

        (total, variables), passed = jax.lax.scan(add, (zeros, context.variables), parts)
        grads, metrics = jax.tree.map(lambda v: v / accumulate, total)
        return grads, metrics, variables, passed

    def train_step(
        state: State, batch: dict[str, jax.Array], frozen: Params, plan: Hashable
    ) -> tuple[State, Metrics]:
        step, variables, passed = state["step"], state["variables"], {}
        key = jax.random.fold_in(jax.random.key(seed), step)
        params, opt, metrics = dict(state["params"]), dict(state["opt"]), {}
        size = jax.tree.leaves(batch)[0].shape[0]
        for i, player in enumerate(method.players):
            keys_B = jax.random.split(jax.random.fold_in(key, i), size)
            context = Context(step, variables, passed, frozen, plan)
            grads, figures, variables, new = accumulated(player, params, batch, keys_B, context)
            passed = passed | new
            updates, opt[player] = optimizers[player].update(grads, opt[player], params[player])
            params[player] = optax.apply_updates(params[player], updates)
            figures["gradient_norm"] = optax.tree.norm(grads)
            metrics |= {f"{player}/{name}": value for name, value in figures.items()}
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        own = {name: params[name] for name in state["ema"]}
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], own)
        state = {"step": step + 1, "params": params, "ema": ema, "opt": opt, "variables": variables}
        return state, metrics

    return train_step
