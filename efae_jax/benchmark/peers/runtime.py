"""Running PyTorch: its device, its number types, its clock, its compiler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from efae_jax.benchmark.measure import Contender, Memory


def device() -> torch.device:
    """CUDA's first device, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision in bfloat16 on CUDA, where that is the dtype; else nothing."""
    if device().type == "cuda" and dtype == "bfloat16":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def images(array: np.ndarray) -> torch.Tensor:
    """NHWC on the host to NCHW on the device, channels last in memory."""
    tensor = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)
    return tensor.to(device()).contiguous(memory_format=torch.channels_last)


def maybe_compile(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """torch.compile's, with static shapes."""
    return torch.compile(function, dynamic=False) if compiled else function


def contender(call: Callable[[], Any]) -> Contender:
    """A contender that repeats a call; the first one, which may compile, is timed apart."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    _wait()
    seconds = time.perf_counter() - start

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        _wait()
        return (time.perf_counter() - start) / count

    memory = None
    if device().type == "cuda":
        memory = Memory(torch.cuda.max_memory_allocated(), "allocated on the device")
    return Contender(run, seconds, memory=memory)


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def copy_parameters(module: torch.nn.Module, params: Mapping[str, Any]) -> None:
    """Gives a module whose parts are named as a Flax module's that module's parameters.

    Linear kernels [in, out] and convolutions' [p, q, in, out] are transposed.

    Raises:
      ValueError: names or shapes that differ, or parameters that are left over on either side.
    """
    tensors = {}
    for path, value in _flatten(params):
        array, (*parents, last) = np.asarray(value), path
        if last == "kernel":
            array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
        last = {"kernel": "weight", "scale": "weight"}.get(last, last)
        tensors[".".join([*parents, last])] = torch.from_numpy(array.copy())
    own = dict(module.named_parameters())
    shapes = [{name: tuple(v.shape) for name, v in side.items()} for side in (own, tensors)]
    if shapes[0] != shapes[1]:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ValueError(f"parameters differ: {differing}")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> Any:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _flatten(value, (*path, name))
