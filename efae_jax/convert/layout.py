"""Renaming and transposing between PyTorch's state dicts and this package's parameter trees.

A weight format is a table: one `Entry` per array, with its name there, its path
here ("blocks/0/attention/query/kernel") and the `Layout` that relates the two.
The table must cover both sides exactly; whatever is missing, left over or of
the wrong shape is reported, all of it, in one error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives NumPy the type name bfloat16)
import numpy as np

from efae_jax.errors import UserError

Params = dict[str, Any]
StateDict = dict[str, np.ndarray]

# Types that float32 holds exactly.
STORED_TYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A bijection between an array as PyTorch stores it and as this package does."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(to_torch=lambda a: a, from_torch=lambda a: a)
# [in, out] here, [out, in] there.
LINEAR = Layout(to_torch=lambda a: a.transpose(1, 0), from_torch=lambda a: a.transpose(1, 0))
# [in, out] here, a 1x1 convolution [out, in, 1, 1] there.
LINEAR_AS_CONV = Layout(
    to_torch=lambda a: a.transpose(1, 0)[:, :, None, None],
    from_torch=lambda a: a[:, :, 0, 0].transpose(1, 0),
)
# HWIO here, OIHW there.
CONV = Layout(
    to_torch=lambda a: a.transpose(3, 2, 0, 1), from_torch=lambda a: a.transpose(2, 3, 1, 0)
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: its name in the format's state dict, its path in our tree, its layout."""

    theirs: str
    ours: str
    layout: Layout


Table = Sequence[Entry]


def linear(theirs: str, ours: str, bias: bool = True, layout: Layout = LINEAR) -> list[Entry]:
    """Entries of a linear layer."""
    kernel = Entry(f"{theirs}.weight", f"{ours}/kernel", layout)
    return [kernel, Entry(f"{theirs}.bias", f"{ours}/bias", SAME)] if bias else [kernel]


def conv(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    """Entries of a 2D convolution."""
    kernel = Entry(f"{theirs}.weight", f"{ours}/kernel", CONV)
    return [kernel, Entry(f"{theirs}.bias", f"{ours}/bias", SAME)] if bias else [kernel]


def norm(theirs: str, ours: str) -> list[Entry]:
    """Entries of a layer or group normalisation with scale and bias."""
    return [
        Entry(f"{theirs}.weight", f"{ours}/scale", SAME),
        Entry(f"{theirs}.bias", f"{ours}/bias", SAME),
    ]


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries to one dictionary with paths "a/b/c"."""
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return params


def stored_type(tensors: Mapping[str, np.ndarray]) -> str:
    """The type that all tensors share; float32, which holds every other, if they do not."""
    types = {tensor.dtype.name for tensor in tensors.values()}
    return types.pop() if len(types) == 1 else "float32"


def cast(tensors: Mapping[str, np.ndarray], dtype: str) -> StateDict:
    """The tensors in another type of `STORED_TYPES`.

    Raises:
      UserError: another type, or numbers that would become infinite (names listed).
    """
    if dtype not in STORED_TYPES:
        raise UserError(f"--dtype {dtype}: no such type; allowed: {', '.join(STORED_TYPES)}")
    # NumPy knows bfloat16 by the name that ml_dtypes gives it.
    with np.errstate(over="ignore"):
        done = {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    lost = [n for n, a in done.items() if np.isinf(a).any() and not np.isinf(tensors[n]).any()]
    require(_list("with numbers beyond its range", lost), f"--dtype {dtype}")
    return done


def to_theirs(table: Table, params: Mapping[str, Any]) -> StateDict:
    """Renames and transposes a parameter tree that has exactly the table's paths.

    Values keep their type and bits; arrays are contiguous, as the writer of safetensors needs them.
    """
    flat = flatten(params)
    # Not ascontiguousarray, which gives scalars an axis.
    return {
        e.theirs: np.asarray(e.layout.to_torch(np.asarray(flat[e.ours])), order="C") for e in table
    }


def to_ours(table: Table, tensors: Mapping[str, np.ndarray]) -> Params:
    """Renames and transposes a checked state dict to a parameter tree in float32."""
    return unflatten(
        {
            e.ours: np.array(e.layout.from_torch(tensors[e.theirs]), dtype=np.float32, order="C")
            for e in table
        }
    )


def checked_to_ours(
    table: Table, tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any], problem: str
) -> Params:
    """`to_ours` of a state dict that must have exactly the table's names, shapes and types.

    Args:
      abstract: our parameter tree as `jax.ShapeDtypeStruct`s.
      problem: how the error begins.

    Raises:
      UserError: lists every name that is missing, left over, or of a wrong shape or type.
    """
    problems = name_problems((entry.theirs for entry in table), tensors)
    problems += tensor_problems(table, tensors, abstract) or finite_problems(tensors)
    require(problems, problem)
    return to_ours(table, tensors)


def name_problems(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """Says which names are missing and which are left over; empty if none."""
    expected, found = set(expected), set(found)
    return _list("missing", expected - found) + _list("left over", found - expected)


def tensor_problems(
    table: Table, tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any]
) -> list[str]:
    """Says which of the tensors that are there have a wrong shape or type; empty if none.

    Args:
      abstract: our parameter tree as `jax.ShapeDtypeStruct`s.
    """
    wanted = flatten(abstract)
    shapes, types = [], []
    for entry in table:
        if entry.theirs not in tensors:
            continue
        tensor = tensors[entry.theirs]
        shape = torch_shape(entry, wanted[entry.ours])
        if tensor.shape != shape:
            shapes.append(f"{entry.theirs} is {tensor.shape}, expected {shape}")
        if tensor.dtype.name not in STORED_TYPES:
            types.append(
                f"{entry.theirs} is {tensor.dtype.name}, expected {' or '.join(STORED_TYPES)}"
            )
    return _list("of the wrong shape", shapes, "; ") + _list("of the wrong type", types, "; ")


def finite_problems(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Says which tensors hold NaN or infinite numbers: how many, and the first; empty if none."""
    numbers = {n: a for n, a in tensors.items() if a.dtype.name in (*STORED_TYPES, "float64")}
    bad = [n for n, a in numbers.items() if not np.isfinite(a).all()]
    if not bad:
        return []
    shown = ", ".join(printable(name) for name in bad[:3]) + (", ..." if len(bad) > 3 else "")
    return [f"{len(bad)} of {len(tensors)} tensors hold numbers that are not finite: {shown}"]


def torch_shape(entry: Entry, ours: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape that the state dict must have for our array of this shape."""
    # A broadcast scalar has the shape and costs no memory.
    return entry.layout.to_torch(np.broadcast_to(np.float32(0), ours.shape)).shape


def require(problems: Sequence[str], where: str) -> None:
    """Raises `UserError` with all the problems in one line, if there are any."""
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))


def printable(name: str) -> str:
    """A name from a file, which may hold a line break; errors are one line."""
    return name if name.isprintable() else repr(name)


def _list(what: str, items: Iterable[str], separator: str = ", ") -> list[str]:
    shown = [printable(item) for item in sorted(items)]
    return [f"{len(shown)} {what}: {separator.join(shown)}"] if shown else []
