"""What all formats share: what is read, what reading gives, and the fields that travel along.

Weights do not say how a latent is scaled, how convolutions pad or how a group acts. Where a
format has no place for such a field, it is written to a JSON beside the weights (in a folder:
`efae_jax.json`) and read back from there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from efae_jax.convert import layout, units
from efae_jax.errors import UserError
from efae_jax.models.build import build_autoencoder
from efae_jax.models.conv_blocks import PADDINGS

IMAGE_RANGE = [-1, 1]


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights as they lie in a file or a folder.

    Attributes:
      path: the file or folder, for errors.
      tensors: the state dict; of TAESD's two files, `encoder.*` and `decoder.*`.
      config: diffusers' config.json, or None.
      description: the JSON that this package wrote beside the weights, or None.
      description_path: where that lies or would lie.
      name: what the file or folder is called; of TAESD's two files, the encoder; of the hub,
        the id.
      ignored: how many tensors lay beside the model's, by the start of their names.
      notes: on how it was found, one line each.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    config: dict[str, Any] | None
    description: dict[str, Any] | None
    description_path: Path
    name: str
    ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def renamed(self, name: str) -> Source:
        """The same under another name."""
        return dataclasses.replace(self, name=name)


class Options(NamedTuple):
    """What a user may state about a source because its weights cannot; None: not stated.

    Attributes:
      scaling_factor, shift_factor: of the latent, whatever the weights say.
      padding: "zeros" or "reflect".
      variant: of TAESD.
      heads: of the original EFAE.
    """

    scaling_factor: float | None = None
    shift_factor: float | None = None
    padding: str | None = None
    variant: str | None = None
    heads: int | None = None


class Imported(NamedTuple):
    """A model that was read.

    Attributes:
      config: as `efae_jax.models.build.build_autoencoder` takes it.
      params: the parameter tree, NumPy, float32.
      format: name of the format.
      ignored: how many tensors lay outside the autoencoder, by the start of their names.
      notes: what was assumed, one line each.
      asks: what the user might state about the latent's units, if nobody has; else empty.
    """

    config: ConfigDict
    params: layout.Params
    format: str
    ignored: Mapping[str, int]
    notes: Sequence[str]
    asks: str = ""


def new_config(kind: str, source: Source, fields: Mapping[str, Any]) -> ConfigDict:
    """A config of `configs/pretrained.py` with neutral latent units and these model fields."""
    from configs.pretrained import get_config

    config = get_config(kind)
    with config.unlocked():
        config.model.update(fields)
        config.model.source = str(source.path)
        config.group.representation = ""
        config.latent.clamp = 0.0
        config.latent.scaling, config.latent.shift = 1.0, 0.0
        config.latent.mean, config.latent.std = (), ()
        config.latent.stated = False
    return config


def state(
    config: ConfigDict,
    source: Source,
    format_name: str,
    options: Options,
    without: Sequence[str] = (),
) -> None:
    """Sets the fields that travel: from the JSON beside the weights, then from the options.

    Args:
      without: fields for which the format has a place of its own.

    Raises:
      UserError: values that make no sense.
    """
    if source.description is not None:
        expected = describe(config, format_name, without)
        _apply(config, source.description, expected, str(source.description_path))
    if options.padding is not None:
        _set(config, {"padding": options.padding}, "the options")


def describe(config: ConfigDict, format_name: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON beside the weights; the inverse of `state`."""
    latent, model = config.latent, config.model
    described = {
        "format": format_name,
        "image_range": IMAGE_RANGE,
        "padding": model.padding,
        "group": config.group.name,
        "representation": config.group.representation,
        "clamp": latent.clamp,
        "scaling": latent.scaling,
        "shift": latent.shift,
        "mean": list(latent.mean),
        "std": list(latent.std),
    }
    if not units.is_stated(config):
        described |= {"scaling": None, "shift": None}
    own = ("variant",) if model.kind == "taesd" else ("norm_groups", "norm_eps")
    described |= {name: model[name] for name in own}
    return {name: value for name, value in described.items() if name not in without}


def convert(
    config: ConfigDict, table: layout.Table, source: Source, format_name: str, problems: list[str]
) -> layout.Params:
    """The parameters, once every name, shape and type is as the model wants it.

    Args:
      problems: found on the way to `config`.

    Raises:
      UserError: all problems in one line.
    """
    tensors = source.tensors
    problems = layout.name_problems((entry.theirs for entry in table), tensors) + problems
    try:
        model = build_autoencoder(config)
    except (UserError, ValueError) as error:
        problems.append(str(error))
    else:
        abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
        tensors = _reshaped(table, tensors, abstract)
        problems += layout.tensor_problems(table, tensors, abstract)
        problems = problems or layout.finite_problems(tensors)
    layout.require(problems, f"{source.path} is not a model of format {format_name}")
    with config.unlocked():
        config.model.stored = layout.stored_type(tensors)
    return layout.to_ours(table, tensors)


def _reshaped(
    table: layout.Table, tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any]
) -> layout.StateDict:
    """The tensors, those in the shape that the table wants that are it but for axes of 1.

    A product with a matrix is a 1x1 convolution: programs store either, and mix them.
    """
    wanted, tensors = layout.flatten(abstract), dict(tensors)
    for entry in table:
        if entry.theirs in tensors:
            shape = layout.torch_shape(entry, wanted[entry.ours])
            there = tensors[entry.theirs]
            if there.shape != shape and _as_matrix(there.shape) == _as_matrix(shape):
                tensors[entry.theirs] = there.reshape(shape)
    return tensors


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def tensors_of(
    config: ConfigDict, table: layout.Table, params: Mapping[str, Any], dtype: str | None
) -> layout.StateDict:
    """The state dict of a model, in the type that it was stored in unless told otherwise."""
    tree = jax.tree.map(np.asarray, dict(params))
    return layout.cast(layout.to_theirs(table, tree), dtype or config.model.stored)


def _apply(
    config: ConfigDict, description: Mapping[str, Any], expected: Mapping[str, Any], where: str
) -> None:
    name = expected["format"]
    if description.get("format") != name:
        raise UserError(
            f'{where} does not describe a model of format {name}, for want of "format": "{name}"; '
            "if it belongs to something else, move it away"
        )
    layout.require(layout.name_problems(expected, description), where)
    if description["image_range"] != IMAGE_RANGE:
        raise UserError(
            f"{where}: image_range must be {IMAGE_RANGE}, not {description['image_range']}"
        )
    values = {k: description[k] for k in expected if k not in ("format", "image_range")}
    if "scaling" in values:
        stated = values["scaling"] is not None
        with config.unlocked():
            config.latent.stated = stated
        if not stated:
            del values["scaling"]
            values.pop("shift", None)
    _set(config, values, where)


def _set(config: ConfigDict, values: Mapping[str, Any], where: str) -> None:
    places = {"group": (config.group, "name"), "representation": (config.group, "representation")}
    places |= {n: (config.latent, n) for n in ("clamp", "scaling", "shift", "mean", "std")}
    for name, value in values.items():
        place, field = places.get(name, (config.model, name))
        value = _checked(name, value, place[field], where)
        with config.unlocked():
            place[field] = value
    spec = config.group.representation
    if any(len(n) > 6 for n in re.findall(r"\d+", spec)):
        raise UserError(f"{where}: representation {spec!r} has absurdly many channels")


def _checked(name: str, value: Any, old: Any, where: str) -> Any:
    if isinstance(old, str):
        allowed = {"padding": PADDINGS}.get(name)
        if not isinstance(value, str) or (allowed and value not in allowed):
            wanted = f"one of {', '.join(allowed)}" if allowed else "a string"
            raise UserError(f"{where}: {name} must be {wanted}, not {value!r}")
        return value
    if isinstance(old, tuple):
        if not isinstance(value, list) or not all(is_number(v) for v in value):
            raise UserError(f"{where}: {name} must be a list of numbers")
        return tuple(float(v) for v in value)
    whole = type(old) is int
    if not is_number(value) or (whole and type(value) is not int):
        kind = "whole" if whole else "finite"
        raise UserError(f"{where}: {name} must be a {kind} number, not {value!r}")
    if name in ("scaling", "norm_eps", "norm_groups") and not value > 0:
        raise UserError(f"{where}: {name} must be positive, not {value}")
    return value if whole else float(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float."""
    return type(value) in (int, float) and math.isfinite(value)
