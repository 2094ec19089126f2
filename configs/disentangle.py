"""Disentangling: semantic and style channels of a frozen autoencoder's latents.

    python -m efae_jax embed --model MODEL --data DATA --out PAIRS
    python main.py --config=configs/disentangle.py:VARIANT --workdir=runs/NAME \\
        --config.data.path=PAIRS

| variant | what | machine |
|---|---|---|
| taesd4 | the published setting: 4 channels, 2 semantic, soft orthogonality | any (not measured) |
| kl16 | 16 channels (FLUX.1, SD3, AuraEquiVAE), exact orthogonality | any (not measured) |
| glyphs | the built-in captioned images, latents of any model | 2 CPU cores |
| smoke | everything small, for a look and for tests | a laptop, a minute |

The sizes of latents and embeddings are those of PAIRS. `--config.loss.form=l1` is the loss of the
published program, `mse` that of its readme.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = ("taesd4", "kl16", "glyphs", "smoke")


def get_config(variant: str = "taesd4") -> ConfigDict:
    """The config of a variant.

    Raises:
      ValueError: for another name.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/disentangle.py:{variant} is not one of {', '.join(VARIANTS)}")
    c = common.get_config()
    _disentangle(c)
    globals()[f"_{variant}"](c)
    return c.lock()


def _disentangle(c: ConfigDict) -> None:
    c.method = "disentangle"
    threads, bad = c.data.num_threads, c.data.max_bad
    c.data = ConfigDict()
    c.data.source = "pairs"
    c.data.path = "pairs"  # what `python -m efae_jax embed` wrote
    c.data.latent = ()  # shape; empty: as it is there
    c.data.text = 0  # dimensions of the embeddings; 0: as they are there
    c.data.image = 0
    c.data.identity = ""  # of the pairs; found there, so that a run goes on with no others
    c.data.num_threads = threads
    c.data.num_workers = 0
    c.data.max_bad = bad

    c.model = ConfigDict()
    c.model.kind = "disentangler"
    c.model.semantic = 0  # channels; 0: half of them
    c.model.orthogonality = "cayley"  # soft, cayley, expm
    c.model.width = 4  # of the embedders before their first block; each block doubles it
    c.model.blocks = 3
    c.model.scaled = True  # their last layer works in numbers of size one; False: as published

    c.latent = ConfigDict()
    c.latent.clip = 3.0  # limit of |z| in training; 0: none

    c.loss = ConfigDict()
    c.loss.form = "distance"  # distance; mse, l1: as published
    c.loss.orthogonality = 1.0  # weight, soft only

    del c.train.remat  # there is little to recompute
    c.ema.decay = 0.0
    c.optim.b2 = 0.999
    c.optim.clip = 0.0

    del c.eval
    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations while training; 0: at the end only
    c.eval.batch_size = 64
    c.eval.num_images = 0  # held-out pairs; 0: all
    c.eval.draws = 5  # of random orthogonal bases
    c.eval.steps = 2_000  # of the probes
    c.eval.lr = 3e-3


def _taesd4(c: ConfigDict) -> None:
    c.model.semantic = 2
    c.model.orthogonality = "soft"
    c.model.scaled = False
    c.loss.form = "mse"
    c.train.batch_size = 64
    c.train.steps = 8_320  # 5 epochs of 90% of COCO's 118,287 images
    c.optim.lr = 1e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup = 0
    c.optim.schedule = "constant"


def _kl16(c: ConfigDict) -> None:
    _taesd4(c)
    c.model.semantic = 8
    c.model.orthogonality = "cayley"
    c.model.scaled = True
    c.loss.form = "distance"
    c.model.width = 16
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"


def _glyphs(c: ConfigDict) -> None:
    c.model.width = 16
    c.train.batch_size = 64
    c.train.steps = 1_500
    c.optim.lr = 3e-3
    c.checkpoint.every = 500
    c.eval.steps = 600


def _smoke(c: ConfigDict) -> None:
    c.data.num_threads = 2
    c.train.batch_size = 8
    c.train.steps = 20
    c.optim.warmup = 5
    c.log.every = 5
    c.checkpoint.every = 10
    c.eval.batch_size = 8
    c.eval.draws = 2
    c.eval.steps = 20
