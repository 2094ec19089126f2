"""AuraEquiVAE's two training recipes, as plain data: they are never mixed unnoticed.

"released" is the program that trained the released model, "later" what its repository became.
Each gives the allowed values of fields of a config, the first of them being the preset: the terms
of the losses and the treatment of the latent. Data and optimisers are the variants' own.
`config.loss.recipe = "custom"` allows anything.
"""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "released": {
        "loss.gradient": ("elementwise",),
        "loss.lpips": (1.0,),
        "loss.gan": (1.0,),
        "loss.gan_loss": ("thresholded",),
        "loss.gan_start": (20,),
        "loss.reconstruction": ("pooled", "low_pass"),
        "loss.reconstruction_weight": (0.2,),
        "loss.discriminator": ("released",),
        "loss.discriminator_loss": ("bce",),
        "loss.halved": (False,),
        "loss.lecam": (0.0,),
        "latent.noise": ("multiplicative",),
        "latent.noise_size": (0.1,),
        "latent.penalty": (1.0,),
    },
    "later": {
        "loss.gradient": ("global",),
        "loss.lpips": (1.0,),
        "loss.gan": (1.0,),
        "loss.gan_loss": ("bce", "hinge"),
        "loss.gan_start": (0,),
        "loss.reconstruction": ("none",),
        "loss.reconstruction_weight": (0.0,),
        "loss.discriminator": ("later",),
        "loss.discriminator_loss": ("bce", "hinge"),
        "loss.halved": (True,),
        "loss.lecam": (0.0, 0.1),
        "latent.noise": ("none",),
        "latent.noise_size": (0.0,),
        "latent.penalty": (0.1,),
    },
}


def apply(config: Any, recipe: str) -> None:
    """Sets the fields of a config to a recipe's preset."""
    config.loss.recipe = recipe
    for name, allowed in RECIPES[recipe].items():
        section, field = name.split(".")
        config[section][field] = allowed[0]


def mixed(config: Any) -> list[str]:
    """Says which fields of a config are not those of the recipe that it names; empty if none."""
    return [
        f"config.{name}={_get(config, name)!r} (there: {' or '.join(map(repr, allowed))})"
        for name, allowed in RECIPES.get(config.loss.recipe, {}).items()
        if _get(config, name) not in allowed
    ]


def _get(config: Any, name: str) -> Any:
    section, field = name.split(".")
    return config[section][field]
