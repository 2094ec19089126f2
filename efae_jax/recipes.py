"""AuraEquiVAE's training recipes, as plain data: they are never mixed unnoticed.

"released" is the program that trained the released model (vqgan-training at 03e0440), "later" what
its repository became (379fe36). Each gives the allowed values of fields of a config, the first of
them being the preset: the terms of the losses, the treatment of the latent, and what encoder and
decoder see of an image. "first_stage" is "released" without its GAN: the released model's run went
on from one. Sizes and optimisers are the variants' own. `config.loss.recipe = "custom"` allows
anything.
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
        # The program does not clear the discriminator's gradient behind the generator's loss.
        "loss.gan_in_discriminator": (1.0,),
        "loss.reconstruction": ("pooled", "low_pass"),
        "loss.reconstruction_weight": (0.2,),
        "loss.discriminator": ("released",),
        "loss.discriminator_loss": ("bce",),
        "loss.halved": (False,),
        "loss.lecam": (0.0,),
        "latent.noise": ("multiplicative",),
        "latent.noise_size": (0.1,),
        "latent.penalty": (1.0,),
        "data.crop": ("native",),
        "data.flip": (False,),
        "crop.rate": (0.0,),
    },
    "later": {
        "loss.gradient": ("global",),
        "loss.lpips": (1.0,),
        "loss.gan": (1.0,),
        "loss.gan_loss": ("bce", "hinge"),
        "loss.gan_start": (0,),
        "loss.gan_in_discriminator": (0.0,),
        "loss.reconstruction": ("none",),
        "loss.reconstruction_weight": (0.0,),
        "loss.discriminator": ("later",),
        "loss.discriminator_loss": ("bce", "hinge"),
        "loss.halved": (True,),
        "loss.lecam": (0.0, 0.1),
        "latent.noise": ("none",),
        "latent.noise_size": (0.0,),
        "latent.penalty": (0.1,),
        "data.crop": ("mixed",),
        "data.flip": (True,),
        "crop.rate": (0.0, 0.5),
    },
}
RECIPES["first_stage"] = RECIPES["released"] | {
    "loss.gan": (0.0,),
    "loss.gan_in_discriminator": (0.0,),
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
