"""The mesh of devices, and where every array of the training state lies on it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efae_jax.errors import UserError

AXES = ("data", "fsdp")
# Smaller arrays stay whole on every device: splitting them costs more than it saves.
SMALL = 1024


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices as data x fsdp.

    Batches are split over both axes, parameters over `fsdp` only.

    Args:
      data: size of that axis; -1 takes what `fsdp` leaves.
      fsdp: size of that axis.
      devices: all of them unless told otherwise.

    Raises:
      UserError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and fsdp > 0 and len(devices) % fsdp == 0:
        data = len(devices) // fsdp
    if data < 1 or fsdp < 1 or data * fsdp != len(devices):
        raise UserError(
            f"config.mesh: data={data}, fsdp={fsdp} does not arrange {len(devices)} devices; "
            "data x fsdp must equal their number (data=-1 takes what fsdp leaves)"
        )
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((data, fsdp), AXES, axis_types=auto, devices=devices)
    owners = [device.process_index for device in mesh.devices.flat]
    if owners == sorted(owners):
        return mesh
    # JAX arranges a TPU's chips by their wires. A process reads consecutive rows of a batch, so
    # its devices must be consecutive as well, or examples would change places with the machine.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(data, fsdp), AXES, axis_types=auto)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over every device."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from each process's share of a batch."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def whole_batch(mesh: Mesh, share: np.ndarray) -> np.ndarray:
    """The whole batch of which each process has a share, on every process."""
    if jax.process_count() == 1:
        return share
    return np.asarray(_gather(mesh)(put_batch(mesh, {"share": share})["share"]))


@functools.cache
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda v: v, out_shardings=replicated(mesh))


def fitting_devices(devices: Sequence[Any], batch_size: int | None) -> Sequence[Any]:
    """As many of the devices as divide a batch, where they are cores of a CPU; else all.

    Who asks for a batch of one on a laptop has not asked for a device per core.
    """
    if batch_size is None or batch_size < 1 or devices[0].platform != "cpu":
        return devices
    return devices[: math.gcd(batch_size, len(devices))]


def tree_shardings(tree: Any, rules: Sequence[tuple[str, Any]], mesh: Mesh) -> Any:
    """A sharding for every array of a tree of shapes, by rules.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      rules: (regex, spec) pairs. The first regex found in the array's path, such as
        "params/autoencoder/velocity/blocks/0/mlp_in/kernel", decides. The spec is
        "fsdp": split the largest dimension that the axis divides, if the array has at
        least 1024 elements; or "replicate"; or a tuple with a mesh axis or None for
        each dimension.
      mesh: from `make_mesh`.

    Raises:
      UserError: for a path that no rule covers, or a spec that does not fit its array.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            try:
                found = re.search(pattern, name)
            except re.error as error:
                raise UserError(f"config.mesh.rules: {pattern!r} is no regex: {error}") from error
            if found:
                return NamedSharding(mesh, _partition(name, leaf.shape, spec, mesh))
        raise UserError(f"config.mesh.rules: no rule covers {name}; end with ('.*', 'fsdp')")

    return jax.tree_util.tree_map_with_path(place, tree)


def _partition(name: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> P:
    if spec == "replicate":
        return P()
    if spec == "fsdp":
        size = mesh.shape["fsdp"]
        dims = [i for i, n in enumerate(shape) if n % size == 0]
        if size == 1 or math.prod(shape) < SMALL or not dims:
            return P()
        largest = max(dims, key=lambda i: shape[i])
        return P(*("fsdp" if i == largest else None for i in range(len(shape))))
    fits = isinstance(spec, tuple | list) and len(spec) == len(shape)
    fits = fits and all(
        axis is None or (axis in AXES and n % mesh.shape[axis] == 0)
        for axis, n in zip(spec, shape, strict=True)
    )
    if not fits:
        raise UserError(
            f"config.mesh.rules: {spec!r} does not fit {name} of shape {shape} on a mesh "
            f"{dict(mesh.shape)}; allowed are 'fsdp', 'replicate', or one of {AXES} or None "
            "for each dimension, dividing it"
        )
    return P(*spec)
