"""Starting a run from another model's autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax

from efae_jax.api import load_asking
from efae_jax.checkpoint import differences
from efae_jax.convert import units
from efae_jax.errors import UserError
from efae_jax.logs import say

# Fields of `config.model` that do not change what it computes; those of `config.latent` that do.
MODEL_RECORD = ("source", "stored", "diffusers", "shrink", "batches", "start")
UNITS = ("scaling", "shift", "mean", "std")
PACKED = ("patch", "variance", "eps")
# Fields that models saved before there were such do not have.
LATER = {"down_attention": [], "up_attention": []}


def read_autoencoder(config: Any, source: str) -> Any:
    """The parameters of another model, if it is the one that the run's config describes.

    Weights of the same shapes may belong to another model (other group norms, padding, units of
    the latent), so the configs are compared, not the shapes. The group may differ. Where nobody
    has stated the other model's units, they are the config's.

    Raises:
      UserError: for another model than the config describes, naming every field.
    """
    model, _ = load_asking(source)
    model.require("config.init_from")
    if not units.is_stated(model.config):
        latent = config.latent
        with model.config.unlocked():
            model.config.latent.update({name: latent[name] for name in UNITS})
        say(
            f"{source} does not say how its latent is scaled; the config does: scaling "
            f"{latent.scaling:g}, shift {latent.shift:g}"
            + (", mean and std per channel" if latent.mean else "")
        )
    ours, theirs = (
        {
            "model": LATER | {k: v for k, v in c["model"].items() if k not in MODEL_RECORD},
            "latent": {k: c["latent"].get(k) for k in (*UNITS, "clamp", *PACKED)},
        }
        for c in (json.loads(c.to_json_best_effort()) for c in (config, model.config))
    )
    problems = [
        f"config.{name}: {there!r} there, {given!r} given"
        for name, there, given in differences(theirs, ours)
    ]
    if problems:
        raise UserError(
            f"config.init_from={source} is another model than the config describes: "
            f"{'; '.join(problems)}; give the config those fields" + _way_out(problems)
        )
    say(f"starting from the autoencoder of {source}")
    return jax.device_get(model.params)


def _way_out(problems: Sequence[str]) -> str:
    if not all(problem.startswith("config.latent.") for problem in problems):
        return ""
    return (
        ", or the model other units first: python -m efae_jax import MODEL WORKDIR "
        "--scaling-factor X --shift-factor Y"
    )
