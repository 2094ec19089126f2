"""Devices to compile for: those here, simulated CPUs, or TPUs that are elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from efae_jax.errors import UserError

GIB = 2**30


class Generation(NamedTuple):
    """One of Google Cloud's generations of TPUs.

    Attributes:
      topology: its name in libtpu.
      memory: of one device of JAX, in bytes.
      cores: what the number in the accelerator type counts, in a device of JAX: TensorCores of v4
        and v5p, of which a device has two; chips of the others.
      options: further arguments of the topology.
    """

    topology: str
    memory: int
    cores: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


# Accelerator types are these names, a dash and a number.
GENERATIONS = {
    # Without it, libtpu takes the two cores of a v4 for devices of their own, as JAX does not.
    "v4": Generation("v4", 32 * GIB, cores=2, options={"chip_config_name": "megacore"}),
    "v5e": Generation("v5e", 16 * GIB),
    "v5litepod": Generation("v5e", 16 * GIB),
    "v5p": Generation("v5p", 95 * GIB, cores=2),
    "v6e": Generation("v6e", 32 * GIB),
}
# Shapes of so many chips, as Google Cloud arranges them.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# Those that are on one host; libtpu takes four chips for a host unless told otherwise.
ONE_HOST = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
# Device memory by what JAX calls the kind of device.
MEMORY = {
    "TPU v4": 32 * GIB,
    "TPU v5 lite": 16 * GIB,
    "TPU v5": 95 * GIB,
    "TPU v5p": 95 * GIB,
    "TPU v6 lite": 32 * GIB,
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: in words.
      devices: of JAX, of which a mesh can be made.
      memory: of each, in bytes; None where it is not known.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None


def parse_target(name: str) -> tuple[Generation, str]:
    """An accelerator type, such as "v5e-8", as (generation, topology).

    Raises:
      UserError: for what is none.
    """
    found = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    if not found or found[1] not in GENERATIONS:
        raise UserError(
            f"--target {name} is no accelerator type of Google Cloud; they are "
            f"{', '.join(GENERATIONS)}, a dash and a number, such as v5e-8 or v4-32"
        )
    generation, number = GENERATIONS[found[1]], int(found[2])
    shapes = CUBES if generation.cores == 2 else FLAT
    if number % generation.cores or number // generation.cores not in shapes:
        allowed = ", ".join(f"{found[1]}-{chips * generation.cores}" for chips in shapes)
        raise UserError(f"--target {name} is not one of {allowed}")
    return generation, f"{generation.topology}:{shapes[number // generation.cores]}"


def prepare_environment(devices: int | None, target: str | None) -> None:
    """Sets what JAX reads when it is imported; must come before that.

    Raises:
      UserError: for a target that is none, or without libtpu; both options together.
    """
    if target is not None and devices is not None:
        raise UserError("--devices and --target exclude each other: a target has its own number")
    if target is not None:
        parse_target(target)
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--target {target} takes the TPU's compiler, which runs without a TPU: "
                f"pip install '{_libtpu_requirement()}'"
            )
        # There is no machine to ask what it is, and several of these commands may run side by side.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": target.replace("v5e-", "v5litepod-"),
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    if target is None and devices is None:
        return
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices} must be at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "").split()
    of_devices = "--xla_force_host_platform_device_count"
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if not f.startswith(of_devices))
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices or 1)


def find_target(target: str | None) -> Target:
    """The devices of an accelerator type, or all that JAX has here."""
    import jax
    from jax.experimental import topologies

    if target is not None:
        generation, topology = parse_target(target)
        options = dict(generation.options)
        if bounds := ONE_HOST.get(topology.partition(":")[2]):
            options["chips_per_host_bounds"] = bounds
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
        hosts = len({d.process_index for d in found})
        name = f"{target}: {len(found)} x {found[0].device_kind}, {hosts} host(s)"
        return Target(name, found, generation.memory)
    found = jax.devices()
    kind = found[0].device_kind
    if found[0].platform == "cpu":
        return Target(f"{len(found)} x CPU", found, None)
    statistics = found[0].memory_stats() or {}
    return Target(
        f"{len(found)} x {kind}", found, MEMORY.get(kind) or statistics.get("bytes_limit")
    )


@contextlib.contextmanager
def default_platform(platform: str) -> Iterator[None]:
    """Has `jax.default_backend()` name a platform that is not there.

    The models ask it, while they are traced, which of several ways to compute is the fastest.
    """
    import jax

    original = jax.default_backend
    jax.default_backend = lambda: platform
    try:
        yield
    finally:
        jax.default_backend = original


def _libtpu_requirement() -> str:
    """What this version of JAX wants of libtpu."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        wanted = [r for r in requires("jax") or () if r.startswith("libtpu")]
    except PackageNotFoundError:
        wanted = []
    return wanted[0].partition(";")[0].strip() if wanted else "libtpu"
