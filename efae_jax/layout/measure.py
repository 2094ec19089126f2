"""The training step of a config compiled for a mesh of devices: memory, operations, collectives."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable
from typing import Any

import jax

from efae_jax.errors import RunError, UserError
from efae_jax.layout.collectives import Collective, collectives
from efae_jax.run import Run
from efae_jax.sharding import batch_sharding, replicated


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of the parameters.

    Attributes:
      path: such as "autoencoder/velocity/blocks/0/mlp_in/kernel".
      shape: of the whole.
      spec: the mesh axis, or "-", of each dimension; "whole" if it is not split.
      total, own: bytes of the whole, and of a device's part.
    """

    path: str
    shape: tuple[int, ...]
    spec: str
    total: int
    own: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a training step takes of each device.

    Attributes:
      held: bytes by what is there from step to step: "parameters", "EMA", "optimiser state",
        "variables", "frozen weights", "batch". By their shapes; a compiler may pad.
      totals: the same of all devices' arrays, each counted once.
      arguments, temporaries, outputs, code: bytes by the compiler: what the program takes;
        activations, gradients and whatever else is made on the way; results that lie in no
        argument's place; instructions.
      operations: floating-point operations of a step on a device; None where the compiler does
        not say. It counts the body of a loop once, so its count is taken times the parts of the
        batch; that takes the optimiser's few as often, too.
      collectives: of the compiled program.
      arrays: the parameters, the largest first.
      seconds: spent on compiling.
    """

    held: dict[str, int]
    totals: dict[str, int]
    arguments: int
    temporaries: int
    outputs: int
    code: int
    operations: float | None
    collectives: list[Collective]
    arrays: list[Array]
    seconds: float

    @property
    def next_batch(self) -> int:
        """Bytes of the batch that is sent while a step runs."""
        return self.held["batch"]

    @property
    def needed(self) -> int:
        """Bytes a device needs while it trains."""
        program = self.arguments + self.temporaries + self.outputs + self.code
        return program + self.next_batch


def measure(run: Run, plan: Hashable) -> Layout:
    """Compiles the step of a plan for shapes alone, and reads what the compiler says of it.

    Raises:
      RunError: where the compiler finds that it does not fit the device's memory; one line.
    """
    start = time.monotonic()
    try:
        lowered = run.lower(plan)
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(does_not_fit(str(error))) from error
    seconds = time.monotonic() - start
    memory = program.memory_analysis()
    operations = program.cost_analysis()
    if run.mesh.devices.flat[0].platform == "gpu":  # whose compiler cannot look into cuDNN's calls
        operations = {"flops": lowered.cost_analysis()["flops"] / run.mesh.size}
    state = run.abstract_state
    parts = {
        "parameters": state["params"],
        "EMA": state["ema"],
        "optimiser state": state["opt"],
        "variables": {"step": state["step"], **state["variables"]},
        "frozen weights": _placed(run.method.frozen, replicated(run.mesh)),
        "batch": _placed(run.abstract_batch(), batch_sharding(run.mesh)),
    }
    return Layout(
        held={name: sum(map(own_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()},
        totals={name: sum(map(_total_bytes, jax.tree.leaves(t))) for name, t in parts.items()},
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        operations=operations and operations["flops"] * run.config.train.accumulate,
        collectives=collectives(program.as_text()),
        arrays=_arrays(state["params"]),
        seconds=seconds,
    )


def choose_plan(run: Run, number: int | None) -> tuple[Hashable, str]:
    """A plan of the method, and which it is in words.

    Args:
      number: from 1, in the order of `Method.plans`; None: the first of those with the largest
        sides.

    Raises:
      UserError: for a number of no plan.
    """
    plans = run.method.plans()
    if number is None:
        number = 1 + max(range(len(plans)), key=lambda i: _extent(plans[i]))
    if not 1 <= number <= len(plans):
        raise UserError(
            f"--plan {number} is not one of 1 to {len(plans)}: {plans[0]}, ... {plans[-1]}"
        )
    plan = plans[number - 1]
    return plan, "" if len(plans) == 1 else f"program {number} of {len(plans)} ({plan})"


def _extent(plan: Any) -> int:
    """Positions of the latent that a plan decodes; 1 where plans have no sides."""
    sides = plan if isinstance(plan, tuple) else ()
    return math.prod(side for side in sides if isinstance(side, int))


def own_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of the part of an array that each device holds."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def does_not_fit(message: str) -> str:
    """The compiler's message, in a line."""
    kept = [line.strip() for line in message.splitlines() if "xceeded" in line or "Used" in line]
    return f"the step does not fit: {' '.join(kept[:1]) or message.splitlines()[0]}"


def _total_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), tree)


def _arrays(params: Any) -> list[Array]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = leaf.sharding.spec
        spec = ", ".join(str(axis or "-") for axis in axes) if any(axes) else "whole"
        found.append(Array(name, leaf.shape, spec, _total_bytes(leaf), own_bytes(leaf)))
    return sorted(found, key=lambda a: (-a.total, a.path))
