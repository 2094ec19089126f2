"""Weights inside other things: under keys of a checkpoint, and behind prefixes of names.

A training program saves {"model": {...}, "ema": {...}, "optimizer": {...}}, PyTorch's wrappers put
`module.` or `_orig_mod.` into names, a larger model holds its autoencoder as `vae.`. Here the one
mapping and the one prefix are found under which names lie as some format has them. Where several
serve as well, the user says which: `FILE::KEY`, in which KEY is a path of keys and the prefix.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from efae_jax.convert import kl_table
from efae_jax.errors import UserError
from efae_jax.paths import printable

MARK = "::"
# Parts that wrappers put into names: DistributedDataParallel, torch.compile, FSDP, checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What lies beside a module's own weights: of averages and of training loops.
_COUNTERS = ("n_averaged", "num_updates", "epoch", "global_step", "step", "iteration")
_LAYER = r"(?:weight|bias|conv\.\d|pool\.\d)"
_LDM = r"(?:en|de)coder\.(?:(?:down|up)\.\d|mid\.)"
# A part of the names of each format by which it is known.
_KNOWN = re.compile(
    r"((?:.*\.)?)(?:"
    + "|".join(
        [
            _LDM,
            r"(?:en|de)coder\.(?:mid_block|down_blocks|up_blocks)\.",  # diffusers
            rf"(?:en|de)coder\.layers\.\d+\.{_LAYER}",  # diffusers' AutoencoderTiny
            rf"(?:en|de)coder\.\d+\.{_LAYER}",  # TAESD
            r"velocity\.(?:init_conv_seq|[xtc]_embedder|layers|final_layer)\.",  # EFAE
            r"encoder\.conv\.\d+\.",
            r"z_transform\.weight$|(?:sem|style)_embedder\.",  # disentangler
        ]
    )
    + ")"
)
_FIRST_STAGE = "first_stage_model."
_DEPTH, _MOST = 6, 10_000  # of dictionaries in dictionaries


def split(text: str) -> tuple[str, str | None]:
    """("path", "key") of "path::key"; ("path", None) where no key is given."""
    path, mark, key = text.rpartition(MARK)
    return (path, key) if mark and path else (text, None)


def choose_mapping(tree: Any, key: str | None, where: str) -> tuple[Any, str | None]:
    """The dictionary of a checkpoint that holds the weights, and what of the key is left.

    Args:
      tree: dictionaries in dictionaries; what else they hold is not looked at.
      key: as the user names it, or None.
      where: the file, for errors.

    Raises:
      UserError: no such key, or several dictionaries that serve as well (their keys listed).
    """
    if not isinstance(tree, dict):
        return tree, key
    tree = _joined(tree)
    path, rest = "", key
    if key is not None:
        path, tree, rest = _followed(tree, key)
    if rest and rest.strip("."):
        held = [d for _, d in _mappings(tree, path) if _holds(d, f"{rest.strip('.')}.")]
        if not held:
            _refuse_key(
                where, key or "", [k for p, d in _mappings(tree, path) for k in _keys(d, p)]
            )
        return held[0], rest
    found = [(p, d, _most(d)) for p, d in _mappings(tree, path)]
    most = max((n for *_, n in found), default=0)
    if not most:
        return _only_mapping(tree, where), rest
    equal = [(p, d) for p, d, n in found if 2 * n >= most]
    if len(equal) > 1:
        _ask(where, [p for p, _ in equal])
    return equal[0][1], rest


def _joined(tree: dict[Any, Any]) -> dict[Any, Any]:
    """A model that is kept as {"encoder": its names, "decoder": its names}, under whole names."""
    halves = [tree.get(side) for side in ("encoder", "decoder")]
    if not all(isinstance(half, dict) and half for half in halves):
        return tree
    rest = {k: v for k, v in tree.items() if k not in ("encoder", "decoder")}
    for side, half in zip(("encoder", "decoder"), halves, strict=True):
        rest |= {f"{side}.{name}": value for name, value in half.items()}
    return rest


def holds_weights(mapping: Mapping[Any, Any]) -> bool:
    """Whether names of a format are in a dictionary, so that others in it are strangers."""
    return _most(mapping) > 0


def choose_names(
    tensors: Mapping[str, np.ndarray], key: str | None, where: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors of one model by their own names, and how many lay outside it.

    LDM's names keep their prefix: its reader tells by it what else the file holds.

    Args:
      tensors: a whole file's.
      key: the prefix; "", or one that ends in a dot, means the names that have no further one.
      where: the file, for errors.

    Raises:
      UserError: no such prefix, or several that serve as well (listed).
    """
    tensors = _unwrapped(tensors)
    outside: list[str] = []
    given = (key or "").strip(".")
    if given:
        inside = _inside(tensors, f"{given}.")
        if not inside:
            _refuse_key(where, given, _keys(tensors))
        outside += [name for name in tensors if not name.startswith(f"{given}.")]
        tensors = inside
    found = _prefixes(tensors)
    most = max(found.values(), default=0)
    equal = [p for p, n in found.items() if 2 * n >= most]
    first = [p for p in equal if p.endswith(_FIRST_STAGE)]
    equal = first if len(first) == 1 else equal
    if key is not None and (not key or key.endswith(".")) and "" in equal:
        equal = [""]
        others = tuple(p for p in found if p)
        if others:
            outside += [name for name in tensors if name.startswith(others)]
            tensors = {n: a for n, a in tensors.items() if not n.startswith(others)}
    if len(equal) > 1:
        start = f"{given}." if given else ""
        _ask(where, [start + p[:-1] if p else start for p in equal])
    if equal and (prefix := equal[0]):
        inside = _inside(tensors, prefix)
        own = any(re.match(_LDM, name) for name in inside) and not kl_table.is_fused(inside)
        if not own:
            outside += [name for name in tensors if not name.startswith(prefix)]
            tensors = inside
    if most:
        outside += [name for name in tensors if name in _COUNTERS]
    kept = {name: a for name, a in tensors.items() if name not in _COUNTERS or not most}
    return kept, dict(collections.Counter(map(_top, outside)))


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without the parts that wrappers put in; where that makes two equal, one keeps them."""
    plain = {name for name in tensors if _without_wrappers(name) == name}
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        short = _without_wrappers(name)
        taken = short != name and (short in plain or short in renamed)
        renamed[name if taken else short] = tensor
    return renamed


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    return ".".join(p for p in parts if p not in _WRAPPERS) if len(parts) > 1 else name


def _prefixes(names: Iterable[str]) -> collections.Counter[str]:
    """What stands before names of a format, and how often."""
    return collections.Counter(m[1] for name in names if (m := _KNOWN.match(name)))


def _most(mapping: Mapping[Any, Any]) -> int:
    """How many names of a format a dictionary itself holds under one prefix."""
    names = (
        _without_wrappers(name)
        for name, value in mapping.items()
        if isinstance(name, str) and value is not None and not isinstance(value, dict)
    )
    return max(_prefixes(names).values(), default=0)


def _mappings(tree: Any, path: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dictionaries in a tree that are reached by texts, each once, the outer ones first."""
    todo, seen = [(path, tree, 0)], set()
    while todo and len(seen) < _MOST:
        path, node, depth = todo.pop(0)
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if depth < _DEPTH:
            todo += [
                (f"{path}.{k}" if path else k, v, depth + 1)
                for k, v in node.items()
                if isinstance(k, str) and isinstance(v, dict)
            ]


def _only_mapping(tree: dict[Any, Any], where: str) -> dict[Any, Any]:
    """Of names that no format has: under `state_dict`, or the one dictionary of objects alone."""
    if isinstance(tree.get("state_dict"), dict):
        return tree["state_dict"]
    plain = (type(None), bool, int, float, str, bytes, list, tuple, dict)
    if any(not isinstance(v, plain) for v in tree.values()):
        return tree
    alone = [
        (path, d)
        for path, d in _mappings(tree)
        if d and all(isinstance(k, str) and not isinstance(v, plain) for k, v in d.items())
    ]
    if len(alone) > 1:
        _ask(where, [path for path, _ in alone])
    return alone[0][1] if alone else tree


def _followed(tree: Any, key: str) -> tuple[str, Any, str]:
    """The dictionary that the start of a key leads to: (its path, itself, what is left)."""
    path, rest = "", key
    while isinstance(tree, dict) and rest.strip("."):
        steps = [k for k, v in tree.items() if isinstance(k, str) and isinstance(v, dict)]
        step = next((k for k in steps if k == rest or rest.startswith(f"{k}.")), None)
        if not step:
            break
        path = f"{path}.{step}" if path else step
        tree = tree[step]
        # A dot at the end stays: it says that no further prefix is meant.
        rest = rest[len(step) + 1 :] or ("." if rest[len(step) :] else "")
        if not rest:
            return path, tree, None
    return path, tree, rest


def _holds(mapping: Mapping[Any, Any], prefix: str) -> bool:
    return any(isinstance(k, str) and _without_wrappers(k).startswith(prefix) for k in mapping)


def _inside(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}


def _top(name: str) -> str:
    first, dot, _ = name.partition(".")
    return first + dot


def _keys(mapping: Mapping[Any, Any], path: str = "") -> list[str]:
    """What can be asked of a dictionary: its own path, and the prefixes of models in it."""
    names = [_without_wrappers(name) for name in mapping if isinstance(name, str)]
    inside = [prefix[:-1] for prefix in _prefixes(names) if prefix]
    return [key for key in (path, *(f"{path}.{k}" if path else k for k in inside)) if key]


def _ask(where: str, keys: Sequence[str]) -> None:
    shown = [f"{where}{MARK}{printable(key)}" for key in keys[:8]]
    raise UserError(
        f"{where} holds several models, as its names tell; say which: {' or '.join(shown)}"
    )


def _refuse_key(where: str, key: str, keys: Sequence[str]) -> None:
    some = ", ".join(printable(k[:60]) for k in keys[:8]) or "none"
    raise UserError(f"{where} holds nothing under {printable(key)}; allowed keys: {some}")
