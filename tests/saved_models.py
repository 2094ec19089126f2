"""Untrained models on disk, and folders of small images, for the tests of the commands."""

from __future__ import annotations

import json

import numpy as np
from data_files import picture
from tiny import tiny
from tiny_nets import random_params

from configs.pretrained import get_config
from efae_jax.checkpoint import save_model
from efae_jax.models.build import build_autoencoder


def save(workdir, config):
    """A work directory with the model of a config and random weights; returns it."""
    model = build_autoencoder(config)
    names = ("encoder", "velocity") if model.is_flow else ("encoder", "decoder")
    nets = (model.encoder, model.velocity_net if model.is_flow else model.decoder)
    params = {name: random_params(net) for name, net in zip(names, nets, strict=True)}
    save_model(workdir, {"autoencoder": params}, json.loads(config.to_json_best_effort()))
    return workdir


def conv_config(kind="kl", size=(16, 16), **fields):
    """AutoencoderKL or Aura's, factor 2, with 4 latent channels; z2xz2 acts with a sign."""
    config = get_config(kind)
    with config.unlocked():
        config.data.size = size
        config.model.update(widths=(4, 8), blocks=1, norm_groups=2, latent_channels=4)
        config.model.attention = False
        config.model.update(fields)
        config.group.representation = "3*trivial + sign_h"
        config.latent.clamp = 0.0
    return config


def flow_config(**overrides):
    """EFAE at 8x8, two steps of its flow."""
    config = tiny(**overrides)
    config.eval.steps = 2
    return config


def folder_of_images(folder, sizes, broken=()):
    """PNG files 0.png, 1.png, ... of (height, width); those in `broken` are damaged."""
    folder.mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        picture(17 * i, width, height).save(folder / f"{i}.png")
    for i in broken:
        (folder / f"{i}.png").write_bytes(b"not an image")
    return folder


def pixels(image):
    """A file's pixels, as floats in [-1, 1], [1, H, W, 3]."""
    from PIL import Image

    return np.asarray(Image.open(image).convert("RGB"), np.float32)[None] / 127.5 - 1
