"""Starting a run from another model's autoencoder."""

from __future__ import annotations

import json
from typing import Any

import jax

from efae_jax.api import load
from efae_jax.checkpoint import differences
from efae_jax.errors import UserError
from efae_jax.logs import say

# Fields of `config.model` that do not change what it computes; those of `config.latent` that do.
MODEL_RECORD = ("source", "stored", "diffusers", "shrink")
LATENT_UNITS = ("scaling", "shift", "mean", "std", "clamp")


def read_autoencoder(config: Any, source: str) -> Any:
    """The parameters of another model, if it is the one that the run's config describes.

    Weights of the same shapes may belong to another model (other group norms, padding, units of
    the latent), so the configs are compared, not the shapes. The group may differ.
    """
    model = load(source)
    model.require("config.init_from")
    ours, theirs = (
        {
            "model": {k: v for k, v in c["model"].items() if k not in MODEL_RECORD},
            "latent": {k: c["latent"].get(k) for k in LATENT_UNITS},
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
            f"{'; '.join(problems)}"
        )
    say(f"starting from the autoencoder of {source}")
    return jax.device_get(model.params)
