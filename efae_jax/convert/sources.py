"""From what a user names (file, folder, hub id, address of the hub) to a `Source`.

One search serves folders of this machine, repositories of the hub and what its cache holds: it
works on the names of files (`places.Place`), and asks for a file only to read it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from efae_jax import json_files
from efae_jax.convert import files, hub, places, weight_names, wrappers
from efae_jax.convert.hub import CONFIG
from efae_jax.convert.model import Source
from efae_jax.convert.places import Place
from efae_jax.convert.weight_names import SIDES, Candidate
from efae_jax.errors import UserError
from efae_jax.paths import is_remote, printable, user_path

DESCRIPTION = "efae_jax.json"
# A folder that holds the autoencoder of a pipeline.
VAE = "vae"
# diffusers' classes that are autoencoders, whether this package reads them or says that it cannot.
_AUTOENCODERS = re.compile(r".*(Autoencoder|VQModel|VAE)")
# Of the JSON beside weights; each is FORMAT in the module of that name.
_OUR_FORMATS = ("diffusers", "efae", "ldm", "taesd", "vqgan-training")
_DIFFUSERS = re.compile(r"(?:en|de)coder\.(?:mid_block|down_blocks|up_blocks|layers)\.")
_SEQUENCE = re.compile(r"(|.*?\.)(\d+\.(?:weight|bias|(?:conv|pool)\.\d+\.\w+))")
_COLOURS = 3


def read_source(source: str | os.PathLike[str]) -> Source:
    """Reads weights and whatever JSON belongs to them.

    Args:
      source: a file; a folder with diffusers' weights and config.json, alone or as `vae` of a
        pipeline; a folder with the two files of TAESD, or one of them; a hub id, or a file or
        folder there, also as an address. Of a file with several models, FILE::KEY.

    Raises:
      UserError: nothing there that could be read.
    """
    text, key = _split(source)
    path = Path(text)
    if os.path.lexists(path):
        if path.is_dir():
            return _folder(places.here(path, (VAE,)), "", key)
        return _file(places.beside(path), path.name, key)
    if (address := hub.parse(text)) is None:
        if is_remote(text):
            raise UserError(
                f"{printable(text)}: weights are not read from there; download the file first, "
                "and give its path"
            )
        return _file(places.beside(path), path.name, key)
    place = hub.repository(address, printable(text))
    if not address.inside or any(n.startswith(f"{address.inside}/") for n in place.names):
        found = _folder(place, address.inside, key)
    elif address.inside in place.names:
        found = _file(place, address.inside, key)
    else:
        raise UserError(f"{place.source}: {place.lacks(address.inside)}")
    # The path in the hub's cache is called after a commit.
    name = "/".join(part for part in (address.repository, address.inside) if part)
    return found.renamed(name)


def _split(source: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The path or id, and the key behind it, of FILE::KEY; a file may be called so, too."""
    text = user_path(source)
    if "\0" in text or not text:
        raise UserError(f"{printable(text)!r} is no path, and no id of the hub")
    return (text, None) if os.path.lexists(text) else wrappers.split(text)


def _folder(place: Place, folder: str, key: str | None) -> Source:
    """A model in a folder: diffusers' there or in its `vae`, else TAESD's halves."""
    tried = [folder, f"{folder}/{VAE}" if folder else VAE]
    configs = {f: _config(place, f) for f in tried}
    # A pipeline's root, or a repository of another model, may have a config.json of its own.
    if any(_is_autoencoder(configs[f]) for f in tried[1:]) and not _is_autoencoder(configs[folder]):
        tried = tried[1:]
    for inside in tried:
        if configs[inside] is not None and "method" in configs[inside]:
            raise UserError(
                f"{place.source} is a work directory of efae_jax, which needs no import"
            )
        if found := weight_names.candidates(place.inside(inside)):
            source = _diffusers(place, inside, found[0], configs[inside], key)
            if variant := found[0].variant:
                first = found[0].shards[0]
                note = f"read from {printable(first)}, for want of a file without .{variant}"
                source = dataclasses.replace(source, notes=(note,))
            return source
    halves = weight_names.pairs(place.inside(folder))
    if len(halves) > 1:
        names = sorted(name for sides in halves.values() for name in sides.values())
        raise UserError(
            f"{place.source} holds several models; name one file of "
            f"{', '.join(map(printable, names))}"
        )
    if halves:
        (sides,) = halves.values()
        first = next(iter(sorted(sides.values())))
        return _halves(place, folder, {s: _join(folder, n) for s, n in sides.items()}, first, key)
    if configs[folder] is not None:
        one, other = (f"{weight_names.STEMS[0]}.{suffix}" for suffix in weight_names.SUFFIXES)
        raise UserError(
            f"{place.source} holds {CONFIG}, but no weights beside it: neither {one} nor {other}, "
            f"also as .fp16 and in shards. {_capital(place.lacks(one))}"
        )
    raise UserError(
        f"{place.source} holds neither {CONFIG} with weights (diffusers, there or in {VAE}) nor "
        "files *_encoder* and *_decoder* (TAESD); for other formats name the file: "
        f"{place.lacks(CONFIG)}"
    )


def _file(place: Place, name: str, key: str | None) -> Source:
    """A model in a file, with the files that belong to it."""
    folder, base = _parted(name)
    beside = place.inside(folder)
    found = [c for c in weight_names.candidates(beside) if base in (*c.shards, c.index)]
    if found and (found[0].index or found[0].count > 1 or _describes(place, folder)):
        return _diffusers(place, folder, found[0], _config(place, folder), key)
    if weight_names.side_of(base):
        sides = {weight_names.side_of(base): base}
        if other := weight_names.partner(base, beside):
            sides[weight_names.side_of(other)] = other
        paths = {side: _join(folder, half) for side, half in sides.items()}
        return _halves(place, folder, paths, base, key)
    path = place.file(name)
    return _single(place, folder, base, path, files.read_weights(path, key))


def _single(place: Place, folder: str, base: str, path: Path, weights: files.Weights) -> Source:
    """A file that nothing belongs to but a JSON, or a config.json if the names are diffusers'."""
    if side := _sequence_side(weights.tensors):
        tensors = _on_side(weights.tensors, side)
        return Source(path, tensors, None, None, path.with_name(DESCRIPTION), base, weights.ignored)
    if any(_DIFFUSERS.match(name) for name in weights.tensors):
        config = _config(place, folder) if _describes(place, folder, damaged=True) else None
        if config is not None:
            described = path.with_name(DESCRIPTION)
            description = _read_json(place, _join(folder, DESCRIPTION), "a model's description")
            return Source(
                path.parent, weights.tensors, config, description, described, base, weights.ignored
            )
    beside = files.description_path(path)
    description, notes = None, ()
    if beside.name in place.inside(folder):
        place.file(_join(folder, beside.name))
        description = json_files.read(beside, "a model's description")
        # Web UIs and download programs keep a JSON of their own under the weights' name.
        if description is not None and not _is_ours(description):
            notes = (f"{printable(beside.name)} is another program's, and not read",)
            description = None
    return Source(path, weights.tensors, None, description, beside, base, weights.ignored, notes)


def _diffusers(
    place: Place, folder: str, found: Candidate, config: dict[str, Any] | None, key: str | None
) -> Source:
    """The weights of a folder, in one file or several, with the config beside them."""
    if config is not None and not _is_autoencoder(config):
        # Before anything large is fetched.
        name = config.get("_class_name", config.get("architectures", config.get("model_type")))
        raise UserError(
            f"{place.source}: {_join(folder, CONFIG)} is of {printable(str(name)[:80])}, which is "
            "no autoencoder (AutoencoderKL and AutoencoderTiny are read); name the file of one"
        )
    names, expected = found.shards, None
    if found.index is not None:
        expected = _weight_map(place, folder, found.index)
        names = tuple(sorted(set(expected.values())))
        if lost := [n for n in names if _join(folder, n) not in place.names]:
            raise UserError(
                f"{place.source}: {found.index} lists {', '.join(map(printable, lost[:5]))}, "
                f"which {'is' if len(lost) == 1 else 'are'} not there"
            )
    elif len(names) != found.count:
        raise UserError(
            f"{place.source} holds {len(names)} of {found.count} files "
            f"{printable(names[0])} ...; the others are missing"
        )
    paths = [place.file(_join(folder, name)) for name in names]
    tensors: dict[str, np.ndarray] = {}
    ignored: dict[str, int] = {}
    for path in paths:
        if len(paths) == 1:
            tensors, ignored = files.read_weights(path, key)
            break
        shard = files.read_state_dict(path)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise UserError(
                f"{printable(str(path))} holds {printable(twice[0])}, as another file of the same "
                "weights does"
            )
        tensors |= shard
    if expected is not None and (lost := sorted(expected.keys() - tensors.keys())):
        raise UserError(
            f"{place.source}: {found.index} lists {printable(lost[0])} in "
            f"{printable(expected[lost[0]])}, which does not hold it"
        )
    if len(paths) > 1:
        tensors, ignored = wrappers.choose_names(tensors, key, place.source)
    where = paths[0].parent
    description = _read_json(place, _join(folder, DESCRIPTION), "a model's description")
    path = where if config is not None else paths[0]
    name = place.root.name if not folder else folder.rsplit("/", 1)[-1]
    return Source(path, tensors, config, description, where / DESCRIPTION, name, ignored)


def _weight_map(place: Place, folder: str, index: str) -> dict[str, str]:
    """Name of a tensor -> file that holds it, of the JSON beside shards."""
    path = place.file(_join(folder, index))
    found = (json_files.read_object(path, "an index of weights") or {}).get("weight_map")
    fits = isinstance(found, dict) and found and all(isinstance(f, str) for f in found.values())
    if not fits or any("/" in f or f in ("", ".", "..") for f in found.values()):
        raise UserError(
            f"{printable(str(path))} is not an index of weights: weight_map must give a file of "
            "the folder for each tensor"
        )
    return found


def _halves(
    place: Place, folder: str, sides: Mapping[str, str], named: str, key: str | None
) -> Source:
    """TAESD's two files, or one of them; a whole model may be called like a half."""
    tensors: dict[str, np.ndarray] = {}
    ignored: dict[str, int] = {}
    paths = {side: place.file(name) for side, name in sides.items()}
    order = sorted(paths, key=lambda side: PurePosixPath(sides[side]).name != named)
    for side in order:
        weights = files.read_weights(paths[side], key)
        if _sequence_side(weights.tensors) is None:
            if side != order[0]:
                continue
            return _single(place, folder, named, paths[side], weights)
        if (held := _sequence_side(weights.tensors)) != side:
            where = printable(str(paths[side]))
            raise UserError(f"{where} is called {side}, and holds the weights of TAESD's {held}")
        tensors |= _on_side(weights.tensors, side)
        ignored |= weights.ignored
    tensors = {name: tensors[name] for side in SIDES for name in tensors if name.startswith(side)}
    first = paths.get(SIDES[0]) or paths[SIDES[1]]
    description = _read_json(place, _join(folder, DESCRIPTION), "a model's description")
    beside = first.parent / DESCRIPTION
    alone = len(paths) == 1 and place.root == first.parent
    path = first if alone or named not in ("", first.name) else first.parent
    return Source(path, tensors, None, description, beside, first.name, ignored)


def _sequence_side(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The half of TAESD that names "0.weight", ... are; None for names of other kinds.

    The decoder's sequence starts with a bound, which has no weights.
    """
    matches = [match for name in tensors if (match := _SEQUENCE.fullmatch(name))]
    starts = {match[1] for match in matches}
    if 2 * len(matches) <= len(tensors) or len(starts) != 1:
        return None
    (start,) = starts
    if start in ("encoder.", "decoder."):
        return start[:-1]
    first = tensors.get(f"{start}0.weight")
    return SIDES[first is None or first.ndim != 4 or first.shape[1] != _COLOURS]


def _on_side(tensors: Mapping[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    """TAESD's names of a sequence, with the half that it is."""
    matches = {name: _SEQUENCE.fullmatch(name) for name in tensors}
    return {f"{side}.{m[2] if m else name}": tensors[name] for name, m in matches.items()}


def _config(place: Place, folder: str) -> dict[str, Any] | None:
    return _read_json(place, _join(folder, CONFIG), "a model's config")


def _read_json(place: Place, name: str, wanted: str) -> dict[str, Any] | None:
    return json_files.read_object(place.file(name), wanted) if name in place.names else None


def _is_autoencoder(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json may be an autoencoder's; one without a class may."""
    if config is None:
        return False
    name = config.get("_class_name")
    if name is None:
        return "architectures" not in config and "model_type" not in config
    return isinstance(name, str) and _AUTOENCODERS.match(name) is not None


def _describes(place: Place, folder: str, damaged: bool = False) -> bool:
    """Whether the config.json beside a file that was named is an autoencoder's.

    One of another program (a trainer's settings, say) has nothing to do with the file.

    Args:
      damaged: the answer for one that is no JSON.
    """
    try:
        config = _config(place, folder)
    except UserError:
        return damaged
    own = {"_class_name", "block_out_channels", "latent_channels"}
    return _is_autoencoder(config) and not own.isdisjoint(config or {})


def _is_ours(description: Any) -> bool:
    """Whether a JSON beside weights is one that this package wrote."""
    return isinstance(description, dict) and description.get("format") in _OUR_FORMATS


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _parted(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return folder, base


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
