"""diffusers' folders: config.json and weights, of AutoencoderKL and of AutoencoderTiny."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, kl_table, model, taesd
from efae_jax.convert.hub import CONFIG
from efae_jax.convert.model import Imported, Options, Source
from efae_jax.convert.sources import DESCRIPTION
from efae_jax.convert.weight_names import STEMS
from efae_jax.errors import UserError
from efae_jax.models.taesd import IMAGE_CHANNELS, VARIANTS, Variant

FORMAT = "diffusers"
KINDS = ("kl", "taesd")
OPTIONS = ("scaling_factor", "padding", "variant")
FOLDER = True
WEIGHTS = f"{STEMS[0]}.safetensors"
NORM_EPS = 1e-6
# Fields that travel in config.json.
IN_CONFIG = ("scaling", "shift", "mean", "std", "norm_groups", "norm_eps")

# Fields without a meaning for the numbers; they are kept and written back.
_KEPT = (
    "_name_or_path",
    "sample_size",
    "force_upcast",
    "latent_magnitude",
    "latent_shift",
)
_DROPPED = ("_class_name", "_diffusers_version")
# AutoencoderKL's fields with diffusers' defaults.
_KL = {
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
_TINY = {
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
_NAMES = re.compile(r"(?:encoder|decoder)\.(?:mid_block|down_blocks|up_blocks|layers)\.")
# Names that older versions of diffusers gave to the attention's matrices.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(
    r"((?:encoder|decoder)\.mid_block\.attentions\.0)\.(query|key|value|proj_attn|to_[qkv]|to_out\.0)"
    r"\.(weight|bias)"
)


def matches(source: Source) -> bool:
    """Whether there is a config.json, or the names are diffusers'."""
    return source.config is not None or any(_NAMES.match(name) for name in source.tensors)


def read(source: Source, options: Options) -> Imported:
    """Reads an AutoencoderKL or AutoencoderTiny.

    Raises:
      UserError: a config with a field or value that is not supported, or names or shapes that
        do not fit (all listed).
    """
    readers: dict[str, Callable] = {"AutoencoderKL": _read_kl, "AutoencoderTiny": _read_tiny}
    if source.config is None:
        raise UserError(
            f"{source.path}: the names are diffusers', but there is no {CONFIG}; give the folder "
            f"that holds both, with the weights as {WEIGHTS}"
        )
    name = source.config.get("_class_name")
    if name not in readers:
        raise UserError(
            f"{source.path / CONFIG}: _class_name is {name!r}; supported: {', '.join(readers)}"
        )
    return readers[name](source, options)


def _read_kl(source: Source, options: Options) -> Imported:
    fields = _fields(source, _KL)
    levels = len(fields["block_out_channels"])
    _require_fields(
        source,
        fields,
        {
            "down_block_types": [levels * ["DownEncoderBlock2D"]],
            "up_block_types": [levels * ["UpDecoderBlock2D"]],
            "act_fn": ["silu", "swish"],
            "out_channels": [fields["in_channels"]],
        },
    )
    source = dataclasses.replace(source, tensors=_modern(source.tensors))
    config = model.new_config(
        "kl",
        source,
        {
            "widths": tuple(fields["block_out_channels"]),
            "blocks": fields["layers_per_block"],
            "latent_channels": fields["latent_channels"],
            "attention": fields["mid_block_add_attention"],
            "quant": fields["use_quant_conv"],
            "post_quant": fields["use_post_quant_conv"],
            "norm_groups": fields["norm_num_groups"],
            "norm_eps": NORM_EPS,
        },
    )
    _set_common(config, source, fields)
    model.state(config, source, FORMAT, options, IN_CONFIG)
    table = kl_table.table(kl_table.DIFFUSERS, config.model)
    return Imported(config, model.convert(config, table, source, FORMAT, []), FORMAT, {}, [])


def _read_tiny(source: Source, options: Options) -> Imported:
    fields = _fields(source, _TINY)
    free = ("latent_channels", "scaling_factor", "shift_factor")
    _require_fields(source, fields, {n: [v] for n, v in _TINY.items() if n not in free})
    found = Variant(fields["latent_channels"])
    variant, notes = taesd.choose_variant(found, source, options)
    config = taesd.new_config(variant, source)
    _set_common(config, source, fields)
    taesd.state(config, source, FORMAT, options, IN_CONFIG)
    table = taesd.table(config.model.variant, FORMAT)
    return Imported(config, model.convert(config, table, source, FORMAT, []), FORMAT, {}, notes)


def _set_common(config: Any, source: Source, fields: Mapping[str, Any]) -> None:
    with config.unlocked():
        config.data.channels = fields["in_channels"]
        config.latent.scaling = float(fields["scaling_factor"])
        config.latent.shift = float(fields["shift_factor"] or 0.0)
        config.latent.mean = tuple(float(v) for v in fields.get("latents_mean") or ())
        config.latent.std = tuple(float(v) for v in fields.get("latents_std") or ())
        config.model.diffusers = {n: source.config[n] for n in _KEPT if n in source.config}


def _fields(source: Source, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, those that are not there by default; types checked."""
    where, config = source.path / CONFIG, source.config
    unknown = sorted(set(config) - {*defaults, *_KEPT, *_DROPPED})
    if unknown:
        raise UserError(
            f"{where}: unknown {', '.join(map(repr, unknown))}; known: {', '.join(defaults)}"
        )
    fields = {name: config.get(name, default) for name, default in defaults.items()}
    optional = ("shift_factor", "latents_mean", "latents_std")
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
        elif name.endswith("block_out_channels"):
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
            wanted = "a number"
            fits = model.is_number(value) and (name != "scaling_factor" or value > 0)
        if not fits:
            raise UserError(f"{where}: {name} must be {wanted}, not {value!r}")
    return fields


def _require_fields(
    source: Source, fields: Mapping[str, Any], allowed: Mapping[str, list[Any]]
) -> None:
    wrong = [
        f"{name} is {fields[name]!r}, supported: {' or '.join(map(repr, values))}"
        for name, values in allowed.items()
        if fields[name] not in values
    ]
    if wrong:
        raise UserError(f"{source.path / CONFIG}: {'; '.join(wrong)}")


def _modern(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Today's names of the attention's matrices, which once were 1x1 convolutions."""
    renamed = {}
    for name, tensor in tensors.items():
        if match := _ATTENTION.fullmatch(name):
            attention, part, kind = match.groups()
            new = f"{attention}.{_OLDER.get(part, part)}.{kind}"
            # Both names for one array: the older one is reported as left over.
            name = name if new != name and new in tensors else new
            if kind == "weight" and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def write(config: Any, params: Mapping[str, Any], out: Path, dtype: str | None = None) -> list[str]:
    """Writes a folder that `from_pretrained` loads, with a JSON of what diffusers cannot say.

    Returns:
      what a model loaded by diffusers will lack, one line each.

    Raises:
      UserError: a model that diffusers cannot hold, or a folder that cannot be written.
    """
    if missing := config.model.get("missing", ""):
        raise UserError(f"AutoencoderTiny has both halves, and the {missing} is missing")
    if config.model.kind == "taesd":
        name, fields = "AutoencoderTiny", _tiny_fields(config)
        table = taesd.table(config.model.variant, FORMAT)
    else:
        name, fields = "AutoencoderKL", _kl_fields(config)
        table = kl_table.table(kl_table.DIFFUSERS, config.model)
    tensors = model.tensors_of(config, table, params, dtype)
    about = {"_class_name": name, "_diffusers_version": "0.30.0"}
    files.write_folder(
        out,
        {
            CONFIG: files.json_text(about | dict(config.model.get("diffusers", {})) | fields),
            WEIGHTS: files.safetensors_bytes(tensors),
            DESCRIPTION: files.json_text(model.describe(config, FORMAT, IN_CONFIG)),
        },
    )
    notes = []
    if config.model.padding != "zeros":
        notes.append(
            f"diffusers always pads by zeros: there the model is not the same, which pads by "
            f"{config.model.padding}; {DESCRIPTION} says so to efae_jax"
        )
    if config.latent.clamp:
        notes.append(f"diffusers does not clamp the latent to {config.latent.clamp:g}")
    return notes


def _kl_fields(config: Any) -> dict[str, Any]:
    m, latent = config.model, config.latent
    problems = []
    if m.wavelet:
        problems.append("wavelet input")
    if tuple(m.decoder_widths) not in ((), tuple(m.widths)):
        problems.append("decoder of other widths")
    if m.norm_eps != NORM_EPS:
        problems.append(f"group norms with eps {m.norm_eps}")
    if problems:
        raise UserError(f"AutoencoderKL has no {', no '.join(problems)}")
    levels = len(m.widths)
    return {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "down_block_types": levels * ["DownEncoderBlock2D"],
        "up_block_types": levels * ["UpDecoderBlock2D"],
        "block_out_channels": list(m.widths),
        "layers_per_block": m.blocks,
        "act_fn": "silu",
        "latent_channels": m.latent_channels,
        "norm_num_groups": m.norm_groups,
        "scaling_factor": latent.scaling,
        "shift_factor": latent.shift or None,
        "latents_mean": list(latent.mean) or None,
        "latents_std": list(latent.std) or None,
        "use_quant_conv": m.quant,
        "use_post_quant_conv": m.post_quant,
        "mid_block_add_attention": m.attention,
    }


def _tiny_fields(config: Any) -> dict[str, Any]:
    variant = VARIANTS[config.model.variant]
    if variant.branch or variant.deep:
        allowed = [n for n, v in VARIANTS.items() if not v.branch and not v.deep]
        raise UserError(
            f"AutoencoderTiny has no form for {config.model.variant}, only for "
            f"{', '.join(allowed)}; format taesd holds it"
        )
    if config.latent.mean:
        raise UserError("AutoencoderTiny has no mean and std per channel")
    # diffusers derives block_out_channels, and warns where it is stated.
    return {name: value for name, value in _TINY.items() if name != "block_out_channels"} | {
        "in_channels": IMAGE_CHANNELS,
        "latent_channels": variant.latent_channels,
        "scaling_factor": config.latent.scaling,
        "shift_factor": config.latent.shift,
    }
