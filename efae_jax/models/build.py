"""Models from configs: the one place that reads `config.model` and `config.group`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efae_jax import groups
from efae_jax.errors import UserError
from efae_jax.models.conv_autoencoder import ConvAutoencoder
from efae_jax.models.conv_blocks import PADDINGS
from efae_jax.models.dit import DiT
from efae_jax.models.encoder import ConvEncoder, encoder_factor
from efae_jax.models.flow_autoencoder import FlowAutoencoder
from efae_jax.models.functional import Net, Params
from efae_jax.models.kl import Decoder, Encoder, level_factor
from efae_jax.models.latent import Normalisation
from efae_jax.models.original import LATENT_DIM, OriginalDiT, OriginalEncoder
from efae_jax.models.starts import STARTS, pytorch_start
from efae_jax.models.taesd import IMAGE_CHANNELS, VARIANTS, TAESDDecoder, TAESDEncoder
from efae_jax.models.unet import UNet

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What the published programs do not leave to PyTorch's modules: AuraEquiVAE and EFAE.
_KEPT_OF_AURA, _KEPT_OF_ORIGINAL = ("attention.*/out/",), ("^head/linear/", "^patch_embed/bias")


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of the computation: "auto" is float32 on a CPU, bfloat16 on accelerators."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in DTYPES:
        raise UserError(f"config.dtype={name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def larger_range(dtype: str) -> str:
    """What to advise where numbers computed in this type are not finite; of float32, nothing."""
    return "" if dtype == "float32" else "; --dtype float32 computes with more digits"


def choose(field: str, name: str, table: dict[str, Any]) -> Any:
    """table[name], or an error that lists the names."""
    if name not in table:
        raise UserError(f"{field}={name!r} is not one of {', '.join(table)}")
    return table[name]


def build_autoencoder(config: Any) -> FlowAutoencoder | ConvAutoencoder:
    """The autoencoder that a config describes, whatever its kind.

    Raises:
      UserError, ValueError: one line, for what does not fit.
    """
    return choose("config.model.kind", config.model.kind, KINDS)(config)


def build_conv_autoencoder(config: Any) -> ConvAutoencoder:
    """AutoencoderKL or Aura's VAE, from `config.model`.

    Raises:
      UserError, ValueError: one line, for sizes that do not fit each other.
    """
    model, channels = config.model, config.data.channels
    widths = tuple(model.widths)
    decoder_widths = tuple(model.decoder_widths) or widths
    if not widths or min(widths + decoder_widths) < 1 or min(model.blocks, model.norm_groups) < 1:
        raise UserError(
            f"config.model: widths={widths}, decoder_widths={decoder_widths}, "
            f"blocks={model.blocks} and norm_groups={model.norm_groups} must all be at least 1"
        )
    if model.latent_channels < 1 or not model.norm_eps > 0:
        raise UserError(
            f"config.model.latent_channels={model.latent_channels} must be at least 1 and "
            f"norm_eps={model.norm_eps} positive"
        )
    choose("config.model.padding", model.padding, PADDINGS)
    if len(decoder_widths) < len(widths) or (model.wavelet and len(widths) < 2):
        raise UserError(
            f"config.model: {len(widths)} widths, {len(decoder_widths)} decoder_widths: the "
            "decoder needs at least as many levels as the encoder, and a wavelet at least two"
        )
    for name, levels in (("down_attention", widths), ("up_attention", decoder_widths)):
        # Models that were saved before there was such a field have none of it.
        if any(not 0 <= level < len(levels) for level in getattr(model, name, ())):
            raise UserError(
                f"config.model.{name}={tuple(model[name])}: there are levels 0 to {len(levels) - 1}"
            )
    variational = model.kind == "kl"
    common = {
        "attention": ("single" if variational else "heads") if model.attention else "none",
        "groups": model.norm_groups,
        "eps": model.norm_eps,
        "padding": model.padding,
        "dtype": compute_dtype(config.dtype),
        "remat": config.train.remat,
    }
    start = build_start(model, () if variational else _KEPT_OF_AURA)
    out_channels = model.latent_channels * (2 if variational else 1)
    return _conv_autoencoder(
        config,
        Net(
            lambda rngs: Encoder(
                channels,
                widths,
                model.blocks,
                out_channels,
                wavelet_input=model.wavelet,
                quant=model.quant,
                level_attention=tuple(getattr(model, "down_attention", ())),
                rngs=rngs,
                **common,
            ),
            start,
        ),
        Net(
            lambda rngs: Decoder(
                channels,
                decoder_widths,
                model.blocks,
                model.latent_channels,
                post_quant=model.post_quant,
                level_attention=tuple(getattr(model, "up_attention", ())),
                rngs=rngs,
                **common,
            ),
            start,
        ),
        model.latent_channels,
        factor=level_factor(widths),
        variational=variational,
        upscale=level_factor(decoder_widths) // level_factor(widths),
    )


def build_taesd(config: Any) -> ConvAutoencoder:
    """TAESD, in the variant that `config.model` names.

    Raises:
      UserError, ValueError: one line, for what does not fit.
    """
    model = config.model
    variant = choose("config.model.variant", model.variant, VARIANTS)
    choose("config.model.padding", model.padding, PADDINGS)
    if config.data.channels != IMAGE_CHANNELS:
        raise UserError(
            f"config.data.channels={config.data.channels}: TAESD takes {IMAGE_CHANNELS}"
        )
    missing = model.get("missing", "")
    choose("config.model.missing", missing, dict.fromkeys(("", "encoder", "decoder")))
    common = {
        "padding": model.padding,
        "dtype": compute_dtype(config.dtype),
        "remat": config.train.remat,
    }
    return _conv_autoencoder(
        config,
        Net(lambda rngs: TAESDEncoder(model.variant, rngs=rngs, **common)),
        Net(lambda rngs: TAESDDecoder(model.variant, rngs=rngs, **common)),
        variant.latent_channels,
        factor=variant.factor,
        missing=missing,
    )


def _conv_autoencoder(
    config: Any, encoder: Net, decoder: Net, latent_channels: int, **sizes: Any
) -> ConvAutoencoder:
    return ConvAutoencoder(
        encoder,
        decoder,
        build_representation(config, latent_channels),
        clamp=_clamp(config),
        normalisation=build_normalisation(config),
        shrink=config.model.shrink,
        **sizes,
    )


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
    encoder = choose("config.model.encoder.kind", model.encoder.kind, ENCODERS)
    velocity = choose("config.model.velocity.kind", model.velocity.kind, VELOCITIES)
    start = build_start(model, _KEPT_OF_ORIGINAL)
    if start and (model.encoder.kind, model.velocity.kind) != ("original", "original"):
        raise UserError(
            "config.model.start='pytorch' is of the original networks: config.model.encoder.kind "
            "and config.model.velocity.kind both 'original'"
        )
    return FlowAutoencoder(
        Net(lambda rngs: encoder(model.encoder, channels, rngs=rngs, **common), start),
        Net(lambda rngs: velocity(model, channels, rngs=rngs, **common), start),
        build_representation(config, model.encoder.latent_channels),
        learned=config.group.learned or None,
        clamp=_clamp(config),
        normalisation=build_normalisation(config),
        factor=latent_factor(model.encoder),
    )


def build_start(model: Any, kept: tuple[str, ...]) -> Callable[[Params, jax.Array], Params] | None:
    """What `config.model.start` does to the parameters that Flax draws; nothing of "flax".

    Raises:
      UserError: for another start.
    """
    # Models that were saved before there was such a field started as Flax draws.
    start = getattr(model, "start", "flax")
    choose("config.model.start", start, dict.fromkeys(STARTS))
    return functools.partial(pytorch_start, kept=kept) if start == "pytorch" else None


def build_representation(config: Any, latent_channels: int) -> groups.Representation:
    """The group and how it acts on the latent's channels; trivially, where none is named.

    Raises:
      UserError, ValueError: for a representation of another number of channels, and for a
        group that needs square images where the data's are not.
    """
    group = groups.group(config.group.name)
    height, width = config.data.size
    if group.needs_square and height != width:
        raise UserError(
            f"config.group.name={group.name!r} rotates or transposes, which needs square images, "
            f"but config.data.size is {height}x{width}; use a group of flips or a square size"
        )
    spec = config.group.representation or f"{latent_channels}*trivial"
    representation = groups.representation(group, spec)
    if representation.channels != latent_channels:
        raise UserError(
            f"config.group.representation={config.group.representation!r} has "
            f"{representation.channels} channels, but the latent has {latent_channels}; "
            "the two must be equal"
        )
    return representation


def _clamp(config: Any) -> float | None:
    if config.latent.clamp < 0:
        raise UserError(
            f"config.latent.clamp={config.latent.clamp} must be positive, or 0 for none"
        )
    return config.latent.clamp or None


def build_normalisation(config: Any) -> Normalisation:
    """The units that `config.latent` describes; std^2 = variance + eps where it has a variance.

    Raises:
      ValueError: for numbers that exclude each other.
    """
    latent = config.latent
    std = tuple(latent.std)
    if variance := getattr(latent, "variance", ()):
        std = tuple(math.sqrt(v + latent.eps) for v in variance)
    patch = getattr(latent, "patch", 1)
    return Normalisation(latent.scaling, latent.shift, tuple(latent.mean), std, patch)


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
KINDS = {
    "flow": build_flow_autoencoder,
    "kl": build_conv_autoencoder,
    "aura": build_conv_autoencoder,
    "taesd": build_taesd,
}
