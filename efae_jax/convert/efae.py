"""Weights of the original EFAE in PyTorch: state dicts `encoder.*` and `velocity.*`.

The parameter trees are those of `models.original`: {"encoder": OriginalEncoder,
"velocity": OriginalDiT}. An architecture is a dictionary with `channels`,
`width`, `depth`, `heads`, `patch` and `latent_dim` (what builds the networks),
and `group` and `representation` (how the group acts on the latent). The number
of heads and the action leave no trace in the weights, so they travel in a JSON
beside the file; everything else is read from the weights' shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax import groups
from efae_jax.convert import files, layout
from efae_jax.convert.model import Imported, Options, Source
from efae_jax.errors import UserError
from efae_jax.models.functional import Net
from efae_jax.models.original import LATENT_DIM, OriginalDiT, OriginalEncoder

FORMAT = "efae"
KINDS = ("flow",)
OPTIONS = ("heads",)
FOLDER = False
NETWORK_KEYS = ("channels", "width", "depth", "heads", "patch", "latent_dim")
# The original's action on its latent: the horizontal flip negates the last four numbers.
ORIGINAL_ACTION = {
    "group": "z2_h",
    "representation": f"{LATENT_DIM - 4}*trivial + 4*sign",
}
_IN_SHAPES = tuple(key for key in NETWORK_KEYS if key != "heads")
NOT_EXPORTABLE = (
    "format efae holds only the original EFAE's networks; a run of configs/efae.py:mnist or "
    "configs/efae.py:cifar10 gives a model that can be exported"
)


def nets(architecture: Mapping[str, Any]) -> dict[str, Net]:
    """The two networks of an architecture, in float32.

    Raises:
      UserError: sizes that no network of this kind has.
    """
    sizes = [architecture[key] for key in NETWORK_KEYS]
    try:
        return {
            "encoder": Net(lambda rngs: OriginalEncoder(architecture["channels"], rngs=rngs)),
            "velocity": Net(lambda rngs: OriginalDiT(*sizes, rngs=rngs)),
        }
    except ValueError as error:
        raise UserError(str(error)) from error


def table(depth: int) -> layout.Table:
    """The names of all arrays of a model with `depth` transformer blocks."""
    entries = []
    for i in range(4):
        entries += layout.conv(f"encoder.conv.{2 * i}", f"encoder/convs/{i}")
    for i in (1, 2):
        first = 3 * (i - 1)
        entries += layout.conv(f"velocity.init_conv_seq.{first}", f"velocity/stem/conv{i}")
        entries += layout.norm(f"velocity.init_conv_seq.{first + 2}", f"velocity/stem/norm{i}")
    entries += layout.linear("velocity.x_embedder", "velocity/patch_embed")
    entries += layout.linear("velocity.t_embedder.mlp.0", "velocity/time_in")
    entries += layout.linear("velocity.t_embedder.mlp.2", "velocity/time_out")
    entries += layout.linear("velocity.c_embedder", "velocity/latent_embed")
    for i in range(depth):
        entries += _block(f"velocity.layers.{i}", f"velocity/blocks/{i}")
    entries += layout.linear("velocity.final_layer.linear", "velocity/head/linear")
    entries += layout.linear("velocity.final_layer.adaLN_modulation.1", "velocity/head/modulation")
    return entries


def _block(theirs: str, ours: str) -> list[layout.Entry]:
    entries = layout.linear(f"{theirs}.adaLN_modulation.1", f"{ours}/modulation")
    entries += layout.norm(f"{theirs}.attention_norm", f"{ours}/attention_norm")
    entries += layout.norm(f"{theirs}.ffn_norm", f"{ours}/feed_forward_norm")
    for t, o in (("wq", "query"), ("wk", "key"), ("wv", "value"), ("wo", "out")):
        entries += layout.linear(f"{theirs}.attention.{t}", f"{ours}/attention/{o}", bias=False)
    for t, o in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
        entries += layout.norm(f"{theirs}.attention.{t}", f"{ours}/attention/{o}")
    for t, o in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        entries += layout.linear(
            f"{theirs}.feed_forward.{t}", f"{ours}/feed_forward/{o}", bias=False
        )
    return entries


def to_torch(params: Mapping[str, Any]) -> layout.StateDict:
    """The state dict of a parameter tree, in the original's names and layout.

    Raises:
      UserError: the tree is not that of the original's networks.
    """
    try:
        depth = len(params["velocity"]["blocks"])
        entries = table(depth)
        same = layout.flatten(params).keys() == {entry.ours for entry in entries}
    except (KeyError, TypeError):
        same = False
    if not same:
        raise UserError(NOT_EXPORTABLE)
    return layout.to_theirs(entries, params)


def from_torch(
    tensors: Mapping[str, np.ndarray], where: str = "state dict"
) -> tuple[dict[str, int], layout.Params]:
    """Reads a state dict: (architecture without the heads and the action, parameters).

    Parameters are float32; float16 and bfloat16, which it holds exactly, are widened.

    Args:
      tensors: in PyTorch's names and layout.
      where: the source, for errors.

    Raises:
      UserError: lists every name that is missing, left over, or of a wrong shape or type.
    """
    sizes, problems = _infer(tensors)
    # An absurd block number must not make a table of that length.
    numbers = [int(m[1]) for n in tensors if (m := re.match(r"velocity\.layers\.(\d{1,9})\.", n))]
    sizes["depth"] = 1 + max((i for i in numbers if i < len(tensors)), default=0)
    entries = table(sizes["depth"])
    problems = layout.name_problems((e.theirs for e in entries), tensors) + problems
    if sizes.keys() == set(_IN_SHAPES):
        try:
            abstract = {k: net.abstract for k, net in nets({**sizes, "heads": 1}).items()}
        except UserError as error:
            problems.append(str(error))
        else:
            problems += layout.tensor_problems(entries, tensors, abstract)
    layout.require(problems, f"{where} is not a model of format {FORMAT}")
    return {key: sizes[key] for key in _IN_SHAPES}, layout.to_ours(entries, tensors)


def _infer(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, int], list[str]]:
    """Sizes that the shapes of the tensors that are there tell, and what is wrong with them."""
    # The encoder's width is fixed, so the latent's is known.
    sizes, problems = {"latent_dim": LATENT_DIM}, []

    def read(name: str, dims: int) -> tuple[int, ...] | None:
        shape = tensors[name].shape if name in tensors else None
        if shape is not None and (len(shape) != dims or 0 in shape):
            problems.append(f"{name} is {shape}, expected {dims} dimensions, none of them 0")
            return None
        return shape

    if shape := read("encoder.conv.0.weight", 4):
        sizes["channels"] = shape[1]
    if shape := read("velocity.x_embedder.weight", 2):
        sizes["width"] = shape[0]
        pixels, rest = divmod(2 * shape[1], shape[0])
        patch = math.isqrt(pixels)
        if rest or patch < 1 or patch**2 != pixels:
            problems.append(
                f"velocity.x_embedder.weight is {shape}, expected (width, width/2 * patch^2)"
            )
        else:
            sizes["patch"] = patch
    return sizes, problems


def architecture_of(config: Any) -> dict[str, Any]:
    """The architecture that a run's config describes.

    Raises:
      UserError: when its networks are not the original's.
    """
    model = config.model
    if model.encoder.kind != "original" or model.velocity.kind != "original":
        raise UserError(NOT_EXPORTABLE)
    if config.latent.clamp:
        raise UserError("format efae knows no clamp of the latent; the run has config.latent.clamp")
    return {
        "channels": config.data.channels,
        "width": model.velocity.width,
        "depth": model.velocity.depth,
        "heads": model.velocity.heads,
        "patch": model.velocity.patch,
        "latent_dim": model.encoder.latent_channels,
        "group": config.group.name,
        "representation": config.group.representation,
    }


def config_of(architecture: Mapping[str, Any]) -> Any:
    """The config of `configs/efae.py` whose run gives such a model.

    Data and optimiser are those of the variant with as many image channels.
    """
    from configs.efae import get_config

    config = get_config("mnist" if architecture["channels"] == 1 else "cifar10")
    with config.unlocked():
        config.data.channels = architecture["channels"]
        config.model.encoder.latent_channels = architecture["latent_dim"]
        for name in ("width", "depth", "heads", "patch"):
            config.model.velocity[name] = architecture[name]
        config.group.name = architecture["group"]
        config.group.representation = architecture["representation"]
    return config


def matches(source: Source) -> bool:
    """Whether the names are the original EFAE's."""
    return any(name.startswith("velocity.") for name in source.tensors)


def read(source: Source, options: Options) -> Imported:
    """Reads a model of kind "flow".

    Raises:
      UserError: as `from_source`.
    """
    architecture, params = from_source(source, options.heads)
    config = config_of(architecture)
    with config.unlocked():
        config.model.stored = layout.stored_type(source.tensors)
    return Imported(config, params, FORMAT, {}, [])


def write(config: Any, params: Mapping[str, Any], out: Path, dtype: str | None = None) -> list[str]:
    """Writes a safetensors file and the JSON beside it.

    Raises:
      UserError: as `export_efae`.
    """
    stored = dtype or config.model.get("stored", "float32")
    export_efae(params, architecture_of(config), out, stored)
    return []


def export_efae(
    params: Mapping[str, Any],
    architecture: Mapping[str, Any],
    out_path: str | Path,
    dtype: str = "float32",
) -> None:
    """Writes `out_path` (.safetensors) and the JSON beside it that says how to build the model.

    Args:
      params: {"encoder": tree, "velocity": tree}.
      architecture: as in the module's docstring; `group` and `representation` are the
        original's where they are not given.
      dtype: of the stored numbers.

    Raises:
      UserError: not the original's networks, an architecture that disagrees with the
        parameters, or a file that cannot be written. Nothing is left behind.
    """
    where = "the model to export"
    if not set(NETWORK_KEYS) <= architecture.keys():
        raise UserError(NOT_EXPORTABLE)
    architecture = _checked(architecture, where)
    tensors = to_torch(params)
    _require_equal(architecture, from_torch(tensors, where)[0], where)
    nets(architecture)
    description = {"format": FORMAT, "architecture": architecture, "image_range": [-1, 1]}
    files.write_model(out_path, layout.cast(tensors, dtype), description)


def from_source(source: Source, heads: int | None) -> tuple[dict[str, Any], layout.Params]:
    """(architecture, {"encoder": tree, "velocity": tree}).

    Args:
      heads: attention heads of the velocity field; needed where no JSON travels with the
        file. The original uses 4 for MNIST, 8 for CIFAR-10.

    Raises:
      UserError: weights of another model (all names listed), a JSON that disagrees with the
        weights or with `heads`, or heads that nobody states.
    """
    where, beside = str(source.path), str(source.description_path)
    found, params = from_torch(source.tensors, where)
    if source.description is None and heads is None:
        raise UserError(
            f"{where}: the number of attention heads cannot be read from weights, and no JSON of "
            f"this package is beside them ({beside}); give --heads "
            "(the original has 4 for MNIST and 8 for CIFAR-10)"
        )
    if heads is not None:
        found = {**found, "heads": heads}
    if source.description is None:
        architecture = _checked(found, where)
    else:
        architecture = _checked(_stated_architecture(source.description, beside), beside)
        _require_equal(architecture, found, beside)
    # Last: what a JSON states, however absurd, is by now known to be what the weights hold.
    nets(architecture)
    return architecture, params


def _stated_architecture(description: Mapping[str, Any], where: str) -> dict[str, Any]:
    architecture = description.get("architecture")
    if description.get("format") != FORMAT or not isinstance(architecture, dict):
        raise UserError(
            f'{where} does not describe a model of format {FORMAT}: it needs "format": "{FORMAT}" '
            'and "architecture": {...}'
        )
    if description.get("image_range", [-1, 1]) != [-1, 1]:
        raise UserError(f"{where}: image_range must be [-1, 1], not {description['image_range']}")
    return architecture


def _checked(architecture: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The architecture with the original's action by default, every value checked."""
    architecture = ORIGINAL_ACTION | dict(architecture)
    names = (*NETWORK_KEYS, *ORIGINAL_ACTION)
    layout.require(layout.name_problems(names, architecture), f"{where}, architecture")
    for key in NETWORK_KEYS:
        if type(architecture[key]) is not int or architecture[key] < 1:
            raise UserError(
                f"{where}: {key} must be a positive whole number, not {architecture[key]!r}"
            )
    for key in ORIGINAL_ACTION:
        if not isinstance(architecture[key], str):
            raise UserError(f"{where}: {key} must be a string, not {architecture[key]!r}")
    latent_dim, spec = architecture["latent_dim"], architecture["representation"]
    if any(len(n) > 9 or int(n) > latent_dim for n in re.findall(r"\d+", spec)):
        raise UserError(f"{where}: {spec!r} acts on more than the latent's {latent_dim} numbers")
    try:
        action = groups.representation(groups.group(architecture["group"]), spec)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if action.channels != latent_dim:
        raise UserError(
            f"{where}: {spec!r} acts on {action.channels} of the latent's {latent_dim} numbers"
        )
    return {key: architecture[key] for key in names}


def _require_equal(stated: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    wrong = [
        f"{key} is stated as {stated[key]} and found to be {value}"
        for key, value in found.items()
        if stated[key] != value
    ]
    layout.require(wrong, where)
