"""Optimisers and learning-rate schedules from configs, on optax."""

from __future__ import annotations

from typing import Any

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
    """Gradient clipping by global norm (clip > 0), then AdamW.

    With weight_decay = 0 it is Adam.

    Args:
      config: `config.optim`.
      steps: of the whole run.
    """
    optimizer = optax.adamw(
        make_schedule(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
    if config.clip > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip), optimizer)
    return optimizer
