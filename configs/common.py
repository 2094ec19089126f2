"""The fields that every config has, with their defaults."""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A config without a method; `configs/efae.py` and its siblings complete it."""
    c = ConfigDict()
    c.method = ""
    c.seed = 0
    # auto: float32 on a CPU, bfloat16 on accelerators. Parameters are float32 always.
    c.dtype = "auto"
    # A work directory, a file of weights or a hub id whose autoencoder a new run starts from.
    c.init_from = ""

    c.data = ConfigDict()
    c.data.source = "glyphs"  # glyphs, folder, tfds, array_record, webdataset
    c.data.path = ""  # folder, file pattern, or the name of a tfds data set
    c.data.data_dir = ""  # where tfds data sets are prepared; empty: its own default
    c.data.size = (32, 32)  # height, width
    c.data.channels = 3  # 3: RGB, 1: grey
    # Of training images: random, center, native (the centre at the image's own resolution), mixed
    # (half at their own), or zoom (a square of 0.5 to 1 times the shorter side, anywhere).
    c.data.crop = "random"
    c.data.flip = False  # mirror half of the training images
    c.data.pad = 0  # black pixels on every side, within `size`
    c.data.train_split = "train"
    c.data.test_split = "test"
    c.data.test_fraction = 0.02  # held out where the source has no split of its own
    c.data.num_train = 1_000_000  # glyphs only
    c.data.num_test = 1_000  # glyphs only
    c.data.num_threads = 8  # that read and decode; 0: none
    c.data.num_workers = 0  # processes instead of threads
    c.data.max_bad = 100  # unreadable images after which the run stops
    c.data.max_pixels = 80_000_000  # larger images count as unreadable

    c.latent = ConfigDict()  # to a diffusion model's units: (z - shift) * scaling
    c.latent.scaling = 1.0
    c.latent.shift = 0.0
    c.latent.mean = ()  # per channel: (z - mean) / std * scaling
    c.latent.std = ()

    c.train = ConfigDict()
    c.train.batch_size = 64
    c.train.steps = 1_000
    c.train.accumulate = 1  # parts of a batch, one after the other
    c.train.remat = False  # recompute activations in the backward pass

    c.optim = ConfigDict()
    c.optim.lr = 1e-3
    c.optim.b1 = 0.9
    c.optim.b2 = 0.99
    c.optim.weight_decay = 0.0
    c.optim.warmup = 100  # steps
    c.optim.schedule = "cosine"  # constant, cosine, linear
    c.optim.clip = 1.0  # global norm of the gradient; 0: none
    c.optim.rates = ()  # ((regex, lr), ...): other peak rates of single parameters

    c.ema = ConfigDict()
    c.ema.decay = 0.999  # of the averaged weights that evaluation uses; 0: none

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch only; -1: what fsdp leaves
    c.mesh.fsdp = 1  # devices that split parameters too
    c.mesh.rules = ((".*", "fsdp"),)  # (regex, spec); see efae_jax.sharding.tree_shardings

    c.log = ConfigDict()
    c.log.every = 50  # steps

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1_000  # steps
    c.checkpoint.keep = 2

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations while training; 0: at the end only
    c.eval.num_images = 0  # 0: all that are held out
    c.eval.batch_size = 64
    c.eval.pictures = 6  # images in the pictures
    return c
