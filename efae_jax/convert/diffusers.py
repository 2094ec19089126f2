"""diffusers' folders: config.json and weights of AutoencoderKL, that of FLUX.2, AutoencoderTiny.

Weights alone, without config.json, are read too: names and shapes say all but the units of the
latent, and group norms have diffusers' default of 32 groups.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, kl_table, model, taesd, units
from efae_jax.convert.diffusers_config import (
    DOWN,
    FLUX2,
    KEPT,
    KL,
    TINY,
    UP,
    attended,
    checked_fields,
    require_fields,
)
from efae_jax.convert.hub import CONFIG
from efae_jax.convert.model import Imported, Options, Source
from efae_jax.convert.sources import DESCRIPTION
from efae_jax.convert.weight_names import STEMS
from efae_jax.errors import UserError
from efae_jax.models.taesd import IMAGE_CHANNELS, VARIANTS, Variant

FORMAT = "diffusers"
KINDS = ("kl", "taesd")
OPTIONS = ("padding", "variant")
FOLDER = True
WEIGHTS = f"{STEMS[0]}.safetensors"
NORM_EPS = 1e-6
# Fields that travel in config.json.
IN_CONFIG = ("scaling", "shift", "mean", "std", "norm_groups", "norm_eps")

_NAMES = re.compile(r"(?:encoder|decoder)\.(?:mid_block|down_blocks|up_blocks|layers)\.")
# Names that older versions of diffusers gave to the attention's matrices.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(
    r"((?:encoder|decoder)\.(?:mid_block|(?:down|up)_blocks\.\d+)\.attentions\.\d+)"
    r"\.(query|key|value|proj_attn)\.(weight|bias)"
)


def matches(source: Source) -> bool:
    """Whether there is a config.json, or the names are diffusers'."""
    return source.config is not None or any(_NAMES.match(name) for name in source.tensors)


def read(source: Source, options: Options) -> Imported:
    """Reads an AutoencoderKL, AutoencoderKLFlux2 or AutoencoderTiny.

    Raises:
      UserError: a config with a field or value that is not supported, or names or shapes that
        do not fit (all listed).
    """
    readers: dict[str, Callable] = {
        "AutoencoderKL": _read_kl,
        "AutoencoderKLFlux2": _read_kl,
        "AutoencoderTiny": _read_tiny,
    }
    if source.config is None:
        return _read_alone(source, options)
    name = source.config.get("_class_name")
    if name not in readers:
        raise UserError(
            f"{source.path / CONFIG}: _class_name is {name!r}; supported: {', '.join(readers)}"
        )
    return readers[name](source, options)


def _read_kl(source: Source, options: Options) -> Imported:
    packed = source.config["_class_name"] == "AutoencoderKLFlux2"
    fields = checked_fields(source, FLUX2 if packed else KL)
    widths = tuple(fields["block_out_channels"])
    decoder_widths = tuple(fields.get("decoder_block_out_channels") or ())
    allowed = {"act_fn": ["silu", "swish"], "out_channels": [fields["in_channels"]]}
    if packed:
        allowed["patch_size"] = [[units.PATCH, units.PATCH]]
    require_fields(source, fields, allowed)
    found = units.Found(source.tensors, {})
    if packed:
        found = units.split(source.tensors, source.path)
        if not found.fields:
            raise UserError(f"{source.path}: bn.running_mean and bn.running_var are missing")
        found.fields["eps"] = float(fields["batch_norm_eps"])
    source = dataclasses.replace(source, tensors=_modern(found.tensors))
    config = model.new_config(
        "kl",
        source,
        {
            "widths": widths,
            "decoder_widths": () if decoder_widths == widths else decoder_widths,
            "down_attention": attended(source, fields, "down_block_types", DOWN, len(widths)),
            "up_attention": tuple(
                len(decoder_widths or widths) - 1 - i
                for i in attended(
                    source, fields, "up_block_types", UP, len(decoder_widths or widths)
                )[::-1]
            ),
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
    if packed:
        units.set_known(config, found)
    model.state(config, source, FORMAT, options, IN_CONFIG)
    table = kl_table.table(kl_table.DIFFUSERS, config.model)
    return Imported(config, model.convert(config, table, source, FORMAT, []), FORMAT, {}, [])


def _read_alone(source: Source, options: Options) -> Imported:
    """Weights without config.json."""
    if any(re.match(r"(?:encoder|decoder)\.layers\.", name) for name in source.tensors):
        bias = source.tensors.get("encoder.layers.14.bias")
        channels = TINY["latent_channels"] if bias is None else len(bias.reshape(-1))
        told = {"_class_name": "AutoencoderTiny", "latent_channels": channels}
        return _read_tiny(dataclasses.replace(source, config=told), options)
    found = units.split(source.tensors, source.path)
    source = dataclasses.replace(source, tensors=_modern(found.tensors))
    fields, image, problems = kl_table.infer(source.tensors, kl_table.DIFFUSERS)
    config = model.new_config("kl", source, fields | {"norm_eps": NORM_EPS})
    with config.unlocked():
        config.data.channels = image
    notes = units.set_known(config, found)
    model.state(config, source, FORMAT, options, IN_CONFIG)
    table = kl_table.table(kl_table.DIFFUSERS, config.model)
    params = model.convert(config, table, source, FORMAT, problems)
    note = f"there is no {CONFIG}: the structure is that of names and shapes, the group norms' 32"
    return Imported(config, params, FORMAT, {}, [f"{note} groups are diffusers' default", *notes])


def _read_tiny(source: Source, options: Options) -> Imported:
    fields = checked_fields(source, TINY)
    free = ("latent_channels", "scaling_factor", "shift_factor")
    require_fields(source, fields, {n: [v] for n, v in TINY.items() if n not in free})
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
        factor = fields.get("scaling_factor")
        config.latent.stated = factor is not None or config.model.kind == "taesd"
        config.latent.scaling = float(factor or 1.0)
        config.latent.shift = float(fields.get("shift_factor") or 0.0)
        config.latent.mean = tuple(float(v) for v in fields.get("latents_mean") or ())
        config.latent.std = tuple(float(v) for v in fields.get("latents_std") or ())
        config.model.diffusers = {n: source.config[n] for n in KEPT if n in source.config}


def _modern(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Today's names of the attention's matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        if match := _ATTENTION.fullmatch(name):
            attention, part, kind = match.groups()
            new = f"{attention}.{_OLDER[part]}.{kind}"
            # Both names for one array: the older one is reported as left over.
            name = name if new in tensors else new
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
        fields, table = _tiny_fields(config), taesd.table(config.model.variant, FORMAT)
    else:
        fields = _kl_fields(config)
        table = kl_table.table(kl_table.DIFFUSERS, config.model)
    tensors = model.tensors_of(config, table, params, dtype)
    tensors |= units.batch_statistics(config, dtype or config.model.stored)
    about = {"_class_name": class_name(config), "_diffusers_version": "0.30.0"}
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
    packed = _is_packed(config)
    if tuple(m.decoder_widths) not in ((), tuple(m.widths)) and not packed:
        problems.append("decoder of other widths")
    if packed and len(m.decoder_widths or m.widths) != len(m.widths):
        problems.append("decoder with more levels than its encoder")
    if packed and (latent.scaling, latent.shift) != (1, 0):
        problems.append("scaling and shift beside the statistics of patches")
    if m.norm_eps != NORM_EPS:
        problems.append(f"group norms with eps {m.norm_eps}")
    if problems:
        raise UserError(f"{class_name(config)} has no {', no '.join(problems)}")
    down, up = (getattr(m, name, ()) for name in ("down_attention", "up_attention"))
    places = range(len(m.widths))
    fields = {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "down_block_types": [DOWN.format("Attn" * (i in down)) for i in places],
        "up_block_types": [UP.format("Attn" * (i in up)) for i in reversed(places)],
        "block_out_channels": list(m.widths),
        "layers_per_block": m.blocks,
        "act_fn": "silu",
        "latent_channels": m.latent_channels,
        "norm_num_groups": m.norm_groups,
        "use_quant_conv": m.quant,
        "use_post_quant_conv": m.post_quant,
        "mid_block_add_attention": m.attention,
    }
    if packed:
        return fields | {
            "decoder_block_out_channels": list(m.decoder_widths) or None,
            "batch_norm_eps": latent.eps,
            "batch_norm_momentum": FLUX2["batch_norm_momentum"],
            "patch_size": [latent.patch, latent.patch],
        }
    return fields | {
        "scaling_factor": latent.scaling,
        "shift_factor": latent.shift or None,
        "latents_mean": list(latent.mean) or None,
        "latents_std": list(latent.std) or None,
    }


def class_name(config: Any) -> str:
    """diffusers' class of such a model."""
    if config.model.kind == "taesd":
        return "AutoencoderTiny"
    return "AutoencoderKLFlux2" if _is_packed(config) else "AutoencoderKL"


def _is_packed(config: Any) -> bool:
    return getattr(config.latent, "patch", 1) != 1


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
    return {name: value for name, value in TINY.items() if name != "block_out_channels"} | {
        "in_channels": IMAGE_CHANNELS,
        "latent_channels": variant.latent_channels,
        "scaling_factor": config.latent.scaling,
        "shift_factor": config.latent.shift,
    }
