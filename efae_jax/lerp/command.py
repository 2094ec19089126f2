"""The command: reads two images, writes every mixture, their sheet, and a record."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

import efae_jax
from efae_jax.api import Model, load
from efae_jax.basis import Basis
from efae_jax.data.bad_image import reason_of
from efae_jax.data.image_types import stored
from efae_jax.data.transforms import Transform, make_transform
from efae_jax.disentangled import Disentangled
from efae_jax.errors import UserError
from efae_jax.lerp.mixing import (
    MOST_PAIRED,
    PARTS,
    RECONSTRUCTIONS,
    decode_mixtures,
    mixtures,
    raw_name,
)
from efae_jax.lerp.sheet import Captions, draw_sheet
from efae_jax.logs import console, figures_table, make_output_folder, say
from efae_jax.methods.base import to_float
from efae_jax.models.conv_autoencoder import shrink
from efae_jax.panels import picture
from efae_jax.paths import printable
from efae_jax.pictures import to_pixels

AMPLIFY = 10  # of a difference, in its picture
ENDS = ("original", "target")
GIVEN, DIFFERENCES = ("input", "target"), ("difference", "target-difference")  # names of files


def lerp(
    model_source: str | os.PathLike[str],
    basis: Basis | np.ndarray | str | os.PathLike[str] | None,
    image: str | os.PathLike[str],
    target: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    alpha: float = 0.9,
    size: int | None = None,
    dtype: str | None = None,
    semantic: int | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> dict[str, Any]:
    """Moves some channels of an image's latent towards a target's, and decodes that.

    Channels: the semantic ones of the basis, its style ones, every single channel of the latent
    as the model has it, and every pair of those (`mixing.mixtures`). Into `out`, each as a
    picture of its own: input, target, their reconstructions decode(E(x)), `difference` and
    `target-difference` (|decode(E(x)) - x|, times `AMPLIFY`), semantic, style, raw-I, raw-I-J;
    `lerp.png`, all of them on one sheet; and `lerp.json`, a record.

    Args:
      model_source: for `efae_jax.load`.
      basis: for `Disentangled`; the one that travels with the model where it is None.
      image, target: files; both are resized and cropped to the same size.
      out: the folder.
      alpha: share of the target in the channels that are mixed, 0 to 1.
      size: side of the images; the size of the config's data unless given.
      dtype: of the computation; the model's unless given.
      semantic: number of semantic channels; what the basis says unless given.
      scaling_factor, shift_factor: as for `efae_jax.load`.

    Returns:
      what `lerp.json` holds.

    Raises:
      UserError: for files, numbers, a model or a basis that do not fit.
    """
    paths, out = (Path(image), Path(target)), Path(out)
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha}: the target's share must lie between 0 and 1")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such image file")
    make_output_folder(out)
    model = load(
        model_source, dtype=dtype, scaling_factor=scaling_factor, shift_factor=shift_factor
    )
    model.require("lerp")
    basis = Disentangled(model, basis, semantic).basis
    transform = _transform(model, size)
    images = [_read(path, transform) for path in paths]
    if basis.channels > MOST_PAIRED:
        say(f"{basis.channels} channels are too many for all their pairs: single ones only")

    floats = np.stack([to_float(x) for x in images])
    for name, pixels in zip(GIVEN, images, strict=True):
        picture(pixels).save(out / f"{name}.png")
    reconstructions, distances = _decode(model, floats, mixtures(basis, alpha), out)
    for name, decoded, x in zip(DIFFERENCES, reconstructions, floats, strict=True):
        picture(to_pixels(AMPLIFY * np.abs(decoded - x) - 1)).save(out / f"{name}.png")
    record = {
        "model": model.identity,
        "basis": {
            "source": basis.source,
            "channels": basis.channels,
            "semantic": basis.semantic,
            "sha256": hashlib.sha256(basis.matrix.tobytes()).hexdigest(),
        },
        "alpha": alpha,
        "image": printable(str(image)),
        "target": printable(str(target)),
        "size": list(floats.shape[1:3]),
        "protocol": "mean absolute differences of pixels in [-1, 1], clipped: of reconstructions "
        "from their images; of mixtures from the reconstructions of the original and the target",
        "reconstruction": dict(zip(ENDS, map(_distance, reconstructions, floats), strict=True)),
        "mixtures": {
            name: {f"from_{end}": d for end, d in zip(ENDS, found, strict=True)}
            for name, found in distances.items()
        },
        "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    (out / "lerp.json").write_text(json.dumps(record, indent=2) + "\n")
    paired = basis.channels <= MOST_PAIRED
    sheet = draw_sheet(
        lambda name: Image.open(out / f"{name}.png"), basis.channels, paired, _captions(record)
    )
    sheet.save(out / "lerp.png")
    console.print(_table(record))
    say(f"pictures and figures: {out}")
    return record


def _transform(model: Model, size: int | None) -> Transform:
    data, multiple = model.config.data, (model.factor or 1) * model.upscale
    if size is None:
        return make_transform(data, train=False)
    if size < 1 or size % multiple:
        raise UserError(f"--size {size} must be a positive multiple of {multiple}")
    if model.factor is None and (size, size) != tuple(data.size):
        raise UserError(
            f"--size {size}: the model's latent has no positions, so that it takes images of "
            f"{'x'.join(map(str, data.size))} only"
        )
    return Transform((size, size), data.channels)


def _read(path: Path, transform: Transform) -> UInt8[np.ndarray, "H W c"]:
    try:
        return transform(stored(path.read_bytes(), path.name), Random(0))
    except Exception as error:  # decoders meet damage with errors of every kind
        raise UserError(f"{path} cannot be read as an image: {reason_of(error)}") from error


def _decode(
    model: Model, images: np.ndarray, matrices: Mapping[str, np.ndarray], out: Path
) -> tuple[list[np.ndarray], dict[str, list[float]]]:
    """Saves all pictures; the two reconstructions, and every other's distances from them."""
    reconstructions, distances = [], {}
    try:
        z, target = np.asarray(model.encode(shrink(images, model.upscale)))
        for name, x in decode_mixtures(model, z, target, matrices, images.shape[1:]):
            picture(to_pixels(x)).save(out / f"{name}.png")
            if name in RECONSTRUCTIONS:
                reconstructions.append(x)
            else:
                distances[name] = [_distance(x, other) for other in reconstructions]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{images.shape[2]}x{images.shape[1]} pixels do not fit into the device's memory; "
            "--size makes them smaller"
        ) from error
    except ValueError as error:  # the mathematics and the models know no UserError
        raise UserError(str(error)) from error
    return reconstructions, distances


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean(dtype=np.float64))


def _captions(record: dict[str, Any]) -> Captions:
    alpha, basis = record["alpha"], record["basis"]
    semantic, channels = basis["semantic"], basis["channels"]
    return Captions(
        f"Lerp of some channels: {alpha:g} target + {1 - alpha:g} original",
        f"{semantic} semantic, {channels - semantic} style channels of the basis {basis['source']}",
        AMPLIFY,
    )


def _table(record: dict[str, Any]) -> Any:
    found = record["mixtures"]
    rows = {name: [found[name]] for name in PARTS}
    raw = [name for name in found if name not in PARTS]
    single = {raw_name(i) for i in range(record["basis"]["channels"])}
    rows[f"one raw channel, mean of {len(single)}"] = [
        found[name] for name in raw if name in single
    ]
    if pairs := [found[n] for n in raw if n not in single]:
        rows[f"two raw channels, mean of {len(pairs)}"] = pairs
    cells = [
        [name, *(f"{np.mean([m[f'from_{end}'] for m in some]):.4f}" for end in ENDS)]
        for name, some in rows.items()
    ]
    title = f"mean |difference| of pixels in [-1, 1], {record['alpha']:g} of the target"
    return figures_table(title, ["channels", "from original", "from target"], cells)
