"""EFAE: an encoder trained end to end with a conditional flow as decoder.

    python main.py --config=configs/efae.py:VARIANT --workdir=runs/NAME

| variant | what | machine |
|---|---|---|
| quickstart | built-in images at 32x32, latent 8x8x16, Z2 x Z2 | 2 CPU cores, 10 minutes |
| mnist | the original's MNIST setting, start of the parameters included | one GPU (not measured) |
| cifar10 | the original's CIFAR-10 setting, likewise | one GPU (not measured) |
| folder256 | a folder of images at 256x256, latent 32x32x16, Z2 x Z2 | 80 GB GPU (not measured) |
| rotation | built-in images, C4 with a RoPE-like representation | 2 CPU cores |
| smoke | everything small, for a look and for tests | a laptop |
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("quickstart", "mnist", "cifar10", "folder256", "rotation", "smoke")


def get_config(variant: str = "quickstart") -> ConfigDict:
    """The config of a variant.

    Raises:
      ValueError: for another name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/efae.py:{variant} is not one of {', '.join(VARIANTS)}")
    c = common.get_config()
    _efae(c)
    globals()[f"_{variant}"](c)
    return c.lock()


def _efae(c: ConfigDict) -> None:
    c.method = "efae"

    c.model = ConfigDict()
    c.model.kind = "flow"
    c.model.start = "flax"  # or pytorch, of the original networks
    c.model.encoder = ConfigDict()
    c.model.encoder.kind = "conv"  # conv or original
    c.model.encoder.latent_channels = 8
    c.model.encoder.vector = False  # a latent without positions
    c.model.encoder.stem = 4  # side of the first convolution; each further level halves
    c.model.encoder.widths = (128,)  # one per level
    c.model.encoder.blocks = 2  # per level
    c.model.velocity = ConfigDict()
    c.model.velocity.kind = "dit"  # dit, unet, original
    c.model.velocity.patch = 4  # pixels that make a token (dit), or the unet's first stride
    c.model.velocity.width = 128  # dit, original
    c.model.velocity.depth = 4
    c.model.velocity.heads = 4
    c.model.velocity.widths = (64, 128)  # unet: one per level
    c.model.velocity.blocks = 2  # unet: per level

    c.group = ConfigDict()
    c.group.name = "z2xz2"  # trivial, z2_h, z2_v, z2xz2, c4, d4
    c.group.representation = "4*trivial + 2*sign_h + 2*sign_v"
    c.group.learned = ""  # cayley or expm: Q rho Q^T with a learned orthogonal Q
    c.group.in_objective = True  # False: g is the identity in training, the control

    c.latent.noise = "none"  # none, additive, multiplicative
    c.latent.noise_size = 0.0
    c.latent.clamp = 0.0  # limit of |z|; 0: none
    c.latent.penalty = 1e-4  # times mean z^2

    c.flow = ConfigDict()
    c.flow.time = "logit_normal"  # or uniform
    c.flow.time_loc = 0.0
    c.flow.time_scale = 1.0
    c.flow.drop_rate = 0.1  # of the latents, for guidance

    c.eval.steps = 10
    c.eval.solver = "euler"  # euler, midpoint, heun
    c.eval.guidance = 1.0


def _quickstart(c: ConfigDict) -> None:
    c.model.encoder.latent_channels = 16
    c.group.representation = "12*trivial + 2*sign_h + 2*sign_v"
    c.model.encoder.blocks = 1
    c.model.velocity.depth = 3
    c.flow.time_loc = 0.5  # towards noise, where the latent decides
    c.train.batch_size = 32
    c.train.steps = 2_800
    c.optim.lr = 2e-3
    c.optim.schedule = "linear"
    c.checkpoint.every = 700
    c.eval.num_images = 512
    c.eval.steps = 4


def _original(c: ConfigDict) -> None:
    c.dtype = "float32"
    c.data.source = "tfds"
    c.model.start = "pytorch"
    c.model.encoder.kind = "original"
    c.model.encoder.latent_channels = 256
    c.model.velocity.kind = "original"
    c.model.velocity.patch = 2
    c.group.name = "z2_h"
    c.group.representation = "252*trivial + 4*sign"
    c.latent.penalty = 0.0
    c.train.batch_size = 512
    c.optim.lr = 2e-3
    c.optim.b2 = 0.999
    c.optim.warmup = 0
    c.optim.schedule = "constant"
    c.optim.clip = 0.0
    c.data.crop = "center"
    c.ema.decay = 0.0
    c.eval.steps = 50
    c.eval.guidance = 2.0
    c.eval.batch_size = 256


def _mnist(c: ConfigDict) -> None:
    _original(c)
    c.data.path = "mnist"
    c.data.channels = 1
    c.data.pad = 2
    c.model.velocity.width, c.model.velocity.depth, c.model.velocity.heads = 64, 6, 4
    c.train.steps = 11_700  # 100 epochs of 60,000


def _cifar10(c: ConfigDict) -> None:
    _original(c)
    c.data.path = "cifar10"
    c.data.flip = True
    c.model.velocity.width, c.model.velocity.depth, c.model.velocity.heads = 256, 10, 8
    c.train.steps = 9_700  # 100 epochs of 50,000


def _folder256(c: ConfigDict) -> None:
    c.data.source = "folder"
    c.data.path = "images"
    c.data.size = (256, 256)
    c.data.num_threads = 16
    c.model.encoder.latent_channels = 16
    c.model.encoder.stem = 2
    c.model.encoder.widths = (128, 256, 512)
    c.model.velocity.width, c.model.velocity.depth, c.model.velocity.heads = 768, 12, 12
    c.model.velocity.patch = 8
    c.group.representation = "12*trivial + 2*sign_h + 2*sign_v"
    c.train.batch_size = 256
    c.train.steps = 200_000
    c.train.accumulate = 4
    c.train.remat = True
    c.optim.lr = 3e-4
    c.optim.warmup = 2_000
    c.ema.decay = 0.9999
    c.checkpoint.every = 5_000
    c.eval.every = 5_000
    c.eval.num_images = 1_000
    c.eval.steps = 25


def _rotation(c: ConfigDict) -> None:
    _quickstart(c)
    c.group.name = "c4"
    c.group.representation = "rope(0,0,0,0,1,1,1,1)"


def _smoke(c: ConfigDict) -> None:
    c.data.size = (16, 16)
    c.data.num_test = 40
    c.data.num_threads = 2
    c.model.encoder.widths = (16,)
    c.model.encoder.blocks = 1
    c.model.velocity.width, c.model.velocity.depth, c.model.velocity.heads = 32, 1, 2
    c.train.batch_size = 16
    c.train.steps = 20
    c.optim.warmup = 5
    c.log.every = 5
    c.checkpoint.every = 10
    c.eval.batch_size = 16
    c.eval.steps = 2
    c.eval.pictures = 4
