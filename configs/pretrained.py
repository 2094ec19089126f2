"""Convolutional autoencoders as they are imported; the fields that describe one.

`python -m efae_jax import` fills such a config in; training configs build on the same fields.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

KINDS = ("kl", "aura", "taesd")


def get_config(kind: str = "kl") -> ConfigDict:
    """The fields of a kind of model, with the values of SD 1.x, AuraEquiVAE and TAEF1.

    Raises:
      ValueError: for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"configs/pretrained.py:{kind} is not one of {', '.join(KINDS)}")
    c = common.get_config()
    c.data.source = "folder"
    c.data.path = "images"
    c.data.size = (256, 256)
    add_autoencoder(c, kind)
    c.eval.batch_size = 8
    return c.lock()


def add_autoencoder(c: ConfigDict, kind: str) -> None:
    """Adds `model`, `group` and the latent's clamp to a config."""
    c.model = ConfigDict()
    c.model.kind = kind
    c.model.padding = "zeros"  # zeros or reflect
    c.model.shrink = 1  # side of the data / side that the encoder takes
    c.model.source = ""  # where imported weights came from
    c.model.stored = "float32"  # their type there
    c.group = ConfigDict()
    c.group.name = "z2xz2"
    c.group.representation = ""  # on the channels; empty: trivial, positions only are permuted
    c.latent.clamp = 0.0  # limit of |z|; 0: none
    if kind == "taesd":
        c.model.variant = "taef1"  # taesd, taesdxl, taesd3, taef1, taef2, taesana
        c.model.missing = ""  # encoder or decoder, of one half alone
        return
    c.model.start = "flax"  # of what is trained from scratch: flax or pytorch
    c.model.widths = (128, 256, 512, 512)  # per level, from the image inwards
    c.model.decoder_widths = ()  # empty: as widths
    c.model.blocks = 2  # per level of the encoder
    c.model.latent_channels = 4
    c.model.attention = True  # in the middle
    c.model.down_attention = ()  # encoder's levels, from the image inwards, with attention, too
    c.model.up_attention = ()  # and the decoder's
    c.model.wavelet = False  # instead of the first downsampling
    c.model.quant = kind == "kl"  # 1x1 convolution behind the encoder
    c.model.post_quant = kind == "kl"  # and before the decoder
    c.model.norm_groups = 32
    c.model.norm_eps = 1e-6
    if kind == "kl":
        c.latent.scaling = 0.18215
    else:
        c.model.widths = (256, 512, 1024, 1024)
        c.model.latent_channels = 16
        c.group.representation = "12*trivial + 2*sign_h + 2*sign_v"
        c.latent.clamp = 8.0
