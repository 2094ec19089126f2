"""Optimisers and learning-rate schedules from configs, on optax."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from efae_jax.errors import UserError

SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up to `lr`, then one of `SCHEDULES`.

    "constant" stays at lr. "cosine" falls to 0 at the last step. "linear" stays at lr
    and falls linearly to 0 over the last half of the run.

    Args:
      config: `config.optim`.
      steps: of the whole run.
    """
    warmup = min(config.warmup, steps)
    if config.schedule == "constant":
        main = optax.constant_schedule(config.lr)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, max(steps - warmup, 1))
    elif config.schedule == "linear":
        half = max(min(steps // 2, steps - warmup), 1)
        main = optax.linear_schedule(config.lr, 0.0, half, max(steps - half - warmup, 0))
    else:
        raise UserError(
            f"config.optim.schedule={config.schedule!r} is not one of {', '.join(SCHEDULES)}"
        )
    if warmup == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), main], [warmup])


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm (clip > 0), then AdamW, then rates of single parameters.

    With weight_decay = 0 it is Adam.

    Args:
      config: `config.optim`, or another player's.
      steps: of the whole run.
    """
    parts = [
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        )
    ]
    if config.clip > 0:
        parts.insert(0, optax.clip_by_global_norm(config.clip))
    if config.rates:
        parts.append(_scale_by_rates(config.rates, config.lr))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def _scale_by_rates(rates: Any, lr: float) -> optax.GradientTransformation:
    """Updates times rate / lr, for the first (regex, rate) whose regex is in a path.

    A parameter that no rule covers keeps lr; a rule that covers none is a mistake.
    """
    for rule in rates:
        if len(rule) != 2 or not isinstance(rule[0], str) or not rule[1] >= 0:
            raise UserError(
                f"config.optim.rates: {rule!r} is not (regex, learning rate of at least 0)"
            )
    if not lr > 0:
        raise UserError(f"config.optim.lr={lr} must be positive where rates are given")

    def scale(updates: Any, params: Any) -> Any:
        del params
        used = set()

        def one(path: Any, update: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            for pattern, rate in rates:
                if re.search(pattern, name):
                    used.add(pattern)
                    return update * (rate / lr)
            return update

        scaled = jax.tree_util.tree_map_with_path(one, updates)
        if unused := {pattern for pattern, _ in rates} - used:
            raise UserError(
                f"config.optim.rates: no parameter's path contains {', '.join(sorted(unused))}"
            )
        return scaled

    return optax.stateless(scale)
