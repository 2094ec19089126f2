"""diffusers' config.json of an autoencoder: its fields, their defaults, what is supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efae_jax.convert import model, units
from efae_jax.convert.hub import CONFIG
from efae_jax.convert.model import Source
from efae_jax.errors import UserError

# Fields without a meaning for the numbers; they are kept and written back.
KEPT = (
    "_name_or_path",
    "sample_size",
    "force_upcast",
    "latent_magnitude",
    "latent_shift",
)
_DROPPED = ("_class_name", "_diffusers_version")
# AutoencoderKL's fields with diffusers' defaults.
KL = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Those of AutoencoderKLFlux2, whose units are batch statistics among the weights.
_UNITS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
FLUX2 = {name: value for name, value in KL.items() if name not in _UNITS} | {
    "down_block_types": 4 * ["DownEncoderBlock2D"],
    "up_block_types": 4 * ["UpDecoderBlock2D"],
    "block_out_channels": [128, 256, 512, 512],
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "latent_channels": 32,
    "batch_norm_eps": units.PATCH_EPS,
    "batch_norm_momentum": 0.1,
    "patch_size": [units.PATCH, units.PATCH],
}
DOWN, UP = "{}DownEncoderBlock2D", "{}UpDecoderBlock2D"
TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "block_out_channels": [64, 64, 64, 64],
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}


def attended(
    source: Source, fields: Mapping[str, Any], name: str, block: str, levels: int
) -> tuple[int, ...]:
    """The places of the blocks with attention, of `levels` blocks.

    Raises:
      UserError: for another number of blocks, or other ones.
    """
    plain, attention = block.format(""), block.format("Attn")
    types = fields[name]
    if len(types) != levels or any(t not in (plain, attention) for t in types):
        raise UserError(
            f"{source.path / CONFIG}: {name} is {types!r}, supported: {levels} of {plain!r} and "
            f"{attention!r}"
        )
    return tuple(i for i, t in enumerate(types) if t == attention)


def checked_fields(source: Source, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, those that are not there by default; types checked."""
    where, config = source.path / CONFIG, source.config
    unknown = sorted(set(config) - {*defaults, *KEPT, *_DROPPED})
    if unknown:
        raise UserError(
            f"{where}: unknown {', '.join(map(repr, unknown))}; known: {', '.join(defaults)}"
        )
    fields = {name: config.get(name, default) for name, default in defaults.items()}
    optional = (*_UNITS, "decoder_block_out_channels")
    for name, value in fields.items():
        default = defaults[name]
        if value is None and name in optional:
            continue
        if isinstance(default, bool):
            wanted, fits = "true or false", isinstance(value, bool)
        elif isinstance(default, int):
            wanted, fits = "a positive whole number", type(value) is int and value > 0
        elif isinstance(default, str):
            wanted, fits = "a string", isinstance(value, str)
        elif name.endswith("block_out_channels"):  # None, where it may be, was passed over
            wanted = "a list of positive whole numbers"
            fits = (
                isinstance(value, list) and value and all(type(v) is int and v > 0 for v in value)
            )
        elif isinstance(default, list):
            wanted, fits = "a list", isinstance(value, list)
        elif name in ("latents_mean", "latents_std"):
            wanted = "a list of numbers, or null"
            fits = isinstance(value, list) and all(model.is_number(v) for v in value)
        else:
            positive = name in ("scaling_factor", "batch_norm_eps")
            wanted = "a positive number" if positive else "a number"
            fits = model.is_number(value) and (not positive or value > 0)
        if not fits:
            raise UserError(f"{where}: {name} must be {wanted}, not {value!r}")
    return fields


def require_fields(
    source: Source, fields: Mapping[str, Any], allowed: Mapping[str, list[Any]]
) -> None:
    """Raises `UserError`, naming all fields whose value is none of those allowed."""
    wrong = [
        f"{name} is {fields[name]!r}, supported: {' or '.join(map(repr, values))}"
        for name, values in allowed.items()
        if fields[name] not in values
    ]
    if wrong:
        raise UserError(f"{source.path / CONFIG}: {'; '.join(wrong)}")
