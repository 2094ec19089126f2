"""Models from configs: the one place that reads `config.model` and `config.group`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from efae_jax import groups
from efae_jax.errors import UserError
from efae_jax.models.dit import DiT
from efae_jax.models.encoder import ConvEncoder, encoder_factor
from efae_jax.models.flow_autoencoder import FlowAutoencoder
from efae_jax.models.functional import Net
from efae_jax.models.original import LATENT_DIM, OriginalDiT, OriginalEncoder
from efae_jax.models.unet import UNet

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of the computation: "auto" is float32 on a CPU, bfloat16 on accelerators."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in DTYPES:
        raise UserError(f"config.dtype={name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def choose(field: str, name: str, table: dict[str, Any]) -> Any:
    """table[name], or an error that lists the names."""
    if name not in table:
        raise UserError(f"{field}={name!r} is not one of {', '.join(table)}")
    return table[name]


def build_flow_autoencoder(config: Any) -> FlowAutoencoder:
    """The autoencoder that `config.model`, `config.group`, `config.latent` describe.

    Raises:
      UserError, ValueError: one line, for parts or sizes that do not fit each other.
    """
    model, channels = config.model, config.data.channels
    for part, names in (
        ("encoder", ("stem", "blocks", "latent_channels")),
        ("velocity", ("patch", "width", "depth", "heads", "blocks")),
    ):
        for name in names:
            if model[part][name] < 1:
                raise UserError(
                    f"config.model.{part}.{name}={model[part][name]} must be at least 1"
                )
        if not model[part].widths or min(model[part].widths) < 1:
            raise UserError(
                f"config.model.{part}.widths={tuple(model[part].widths)} must name at least one "
                "width, all of them at least 1"
            )
    common = {"dtype": compute_dtype(config.dtype), "remat": config.train.remat}
    latent_channels = model.encoder.latent_channels
    encoder = choose("config.model.encoder.kind", model.encoder.kind, ENCODERS)
    velocity = choose("config.model.velocity.kind", model.velocity.kind, VELOCITIES)
    group = groups.group(config.group.name)
    height, width = config.data.size
    if group.needs_square and height != width:
        raise UserError(
            f"config.group.name={group.name!r} rotates or transposes, which needs square images, "
            f"but config.data.size is {height}x{width}; use a group of flips or a square size"
        )
    if config.latent.clamp < 0:
        raise UserError(
            f"config.latent.clamp={config.latent.clamp} must be positive, or 0 for none"
        )
    representation = groups.representation(group, config.group.representation)
    if representation.channels != latent_channels:
        raise UserError(
            f"config.group.representation={config.group.representation!r} has "
            f"{representation.channels} channels, but config.model.encoder.latent_channels is "
            f"{latent_channels}; the two must be equal"
        )
    return FlowAutoencoder(
        Net(lambda rngs: encoder(model.encoder, channels, rngs=rngs, **common)),
        Net(lambda rngs: velocity(model, channels, rngs=rngs, **common)),
        representation,
        learned=config.group.learned or None,
        clamp=config.latent.clamp or None,
    )


def _conv_encoder(c: Any, channels: int, **common: Any) -> ConvEncoder:
    return ConvEncoder(
        channels, c.widths, c.blocks, c.stem, c.latent_channels, vector=c.vector, **common
    )


def _original_encoder(c: Any, channels: int, *, remat: bool, **common: Any) -> OriginalEncoder:
    del remat  # four convolutions: nothing to gain
    if c.latent_channels != LATENT_DIM:
        raise UserError(
            "config.model.encoder.kind='original' gives a latent of "
            f"{LATENT_DIM} numbers, but latent_channels is {c.latent_channels}"
        )
    return OriginalEncoder(channels, **common)


def latent_factor(encoder: Any) -> int | None:
    """Image side / latent side of the encoder that a config describes; None for a vector."""
    if encoder.kind == "original" or encoder.vector:
        return None
    return encoder_factor(encoder.stem, encoder.widths)


def _dit(model: Any, channels: int, **common: Any) -> DiT:
    v = model.velocity
    return DiT(
        channels,
        v.width,
        v.depth,
        v.heads,
        v.patch,
        model.encoder.latent_channels,
        latent_factor(model.encoder),
        **common,
    )


def _unet(model: Any, channels: int, **common: Any) -> UNet:
    v = model.velocity
    return UNet(
        channels,
        v.widths,
        v.blocks,
        v.patch,
        model.encoder.latent_channels,
        latent_factor(model.encoder),
        **common,
    )


def _original_dit(model: Any, channels: int, **common: Any) -> OriginalDiT:
    v = model.velocity
    if latent_factor(model.encoder) is not None:
        raise UserError(
            "config.model.velocity.kind='original' takes a vector latent; set "
            "config.model.encoder.vector=True or config.model.encoder.kind='original'"
        )
    return OriginalDiT(
        channels, v.width, v.depth, v.heads, v.patch, model.encoder.latent_channels, **common
    )


ENCODERS = {"conv": _conv_encoder, "original": _original_encoder}
VELOCITIES = {"dit": _dit, "unet": _unet, "original": _original_dit}
