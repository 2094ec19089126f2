"""From what a user names (file, folder, hub id) to a `Source`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from efae_jax.convert import files, hub
from efae_jax.convert.hub import CONFIG, WEIGHTS
from efae_jax.convert.model import Source
from efae_jax.errors import UserError

DESCRIPTION = "efae_jax.json"
SIDES = ("encoder", "decoder")


def read_source(source: str | os.PathLike[str]) -> Source:
    """Reads weights and whatever JSON belongs to them.

    Args:
      source: a file; a folder with diffusers' config.json, alone or as `vae` of a pipeline;
        a folder with the two files of TAESD, or one of them; or a hub id.

    Raises:
      UserError: nothing there that could be read.
    """
    path = Path(source)
    if not path.exists() and hub.is_id(str(source)):
        # The path in the hub's cache is called after a commit.
        return dataclasses.replace(_read(_fetch(str(source))), name=str(source))
    return _read(path)


def _fetch(source: str) -> Path:
    path = hub.fetch(source)
    for side, other in (SIDES, SIDES[::-1]):
        if _is_side(path, side):
            file = Path(source)
            hub.fetch(file.with_stem(file.stem.removesuffix(side) + other).as_posix())
    return path


def _read(path: Path) -> Source:
    if path.is_dir():
        return _folder(path)
    if path.name in WEIGHTS and (path.parent / CONFIG).exists():
        return _folder(path.parent)
    if path.exists() and (pair := _pair(path)):
        return _taesd(path, pair)
    tensors = files.read_state_dict(path)
    beside = files.description_path(path)
    return Source(path, tensors, None, files.read_json(beside), beside, path.name)


def _folder(path: Path) -> Source:
    if not (path / CONFIG).exists() and (path / "vae" / CONFIG).exists():
        path = path / "vae"
    description = files.read_json(path / DESCRIPTION)
    if (config := files.read_json(path / CONFIG)) is not None:
        if "method" in config:
            raise UserError(f"{path} is a work directory of efae_jax, which needs no import")
        for name in WEIGHTS:
            if (path / name).exists():
                tensors = files.read_state_dict(path / name)
                beside = path / DESCRIPTION
                return Source(path, tensors, config, description, beside, path.name)
        raise UserError(f"{path} holds {CONFIG}, but none of {' and '.join(WEIGHTS)}")
    found = {side: [p for p in path.iterdir() if _is_side(p, side)] for side in SIDES}
    if any(len(paths) > 1 for paths in found.values()):
        names = ", ".join(sorted(p.name for paths in found.values() for p in paths))
        raise UserError(f"{path} holds several models; name one file of {names}")
    if not all(found.values()):
        raise UserError(
            f"{path} holds neither {CONFIG} (diffusers) nor files *_encoder* and *_decoder* "
            "(TAESD); for other formats name the file"
        )
    return _taesd(path, {side: paths[0] for side, paths in found.items()})


def _is_side(path: Path, side: str) -> bool:
    return path.is_file() and path.stem.endswith(f"_{side}") and path.suffix != ".json"


def _pair(path: Path) -> dict[str, Path] | None:
    for side, other in (SIDES, SIDES[::-1]):
        if _is_side(path, side):
            partner = path.with_stem(path.stem.removesuffix(side) + other)
            return {side: path, other: partner} if partner.exists() else None
    return None


def _taesd(path: Path, pair: dict[str, Path]) -> Source:
    tensors: dict[str, Any] = {}
    for side in SIDES:
        read = files.read_state_dict(pair[side])
        tensors |= {f"{side}.{name}": tensor for name, tensor in read.items()}
    encoder = pair[SIDES[0]]
    beside = encoder.parent / DESCRIPTION
    return Source(path, tensors, None, files.read_json(beside), beside, encoder.name)
