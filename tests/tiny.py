"""Configs so small that their programs compile in seconds; shared by the tests that train."""

from configs import aura_equivae, disentangle, efae, eq_vae
from efae_jax import recipes


def tiny(**overrides):
    """EFAE's `smoke` made smaller still; `tiny(train__steps=3)` sets config.train.steps."""
    config = efae.get_config("smoke")
    with config.unlocked():
        config.data.size = (8, 8)
        config.model.encoder.widths = (8,)
        config.model.velocity.width = 16
    return _smaller(config, overrides)


def tiny_aura(recipe="custom", **overrides):
    """AuraEquiVAE's `smoke` made smaller: 8x8 images, latent 4x4x6; L1 alone unless a recipe
    is named."""
    config = aura_equivae.get_config("smoke")
    with config.unlocked():
        if recipe == "custom":
            config.data.size = (8, 8)
            config.loss.recipe = "custom"
            config.loss.gradient = "none"
            config.loss.lpips = config.loss.gan = config.loss.gan_in_discriminator = 0.0
            config.loss.reconstruction, config.loss.reconstruction_weight = "l1", 1.0
            config.latent.penalty = 1e-3
            config.crop.rate = 0.5
        else:
            recipes.apply(config, recipe)
        config.model.widths = (4, 8)
        config.model.attention = False
    return _smaller(config, overrides)


def tiny_eq(**overrides):
    """EQ-VAE's `smoke` made smaller: 8x8 images, latent 4x4x2; L1 and KL alone."""
    config = eq_vae.get_config("smoke")
    with config.unlocked():
        config.data.size = (8, 8)
        config.model.widths = (4, 8)
        config.model.latent_channels = 2
        config.model.attention = False
        config.eq.scale_buckets = 0
        config.loss.lpips = config.loss.gan = 0.0
        config.loss.learn_logvar = False
    return _smaller(config, overrides)


def tiny_disentangle(**overrides):
    """Disentangling's `smoke` made smaller; data__path names the pairs."""
    config = disentangle.get_config("smoke")
    with config.unlocked():
        config.model.blocks = 1
        config.eval.steps = 8
    return _smaller(config, overrides)


def _smaller(config, overrides):
    with config.unlocked():
        if config.data.source == "glyphs":
            config.data.num_train = 96
            config.data.num_test = 21
            config.eval.pictures = 2
        config.data.num_threads = 1
        config.train.batch_size = 8
        config.train.steps = 6
        config.log.every = 2
        config.checkpoint.every = 3
        config.eval.batch_size = 8
        config.mesh.data = 1
        for name, value in overrides.items():
            field = config
            *parents, last = name.split("__")
            for parent in parents:
                field = field[parent]
            if last not in field:
                raise KeyError(name)
            field[last] = value
    return config
