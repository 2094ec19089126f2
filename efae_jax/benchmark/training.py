"""Training steps as contenders: those of `run.Run`, and the velocity field's alone."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from efae_jax import data, flow
from efae_jax.benchmark.measure import Contender, clock, high_water, memory_of, operations
from efae_jax.benchmark.sizes import DiTSizes
from efae_jax.models.dit import DiT
from efae_jax.models.functional import Net
from efae_jax.run import Run
from efae_jax.sharding import put_batch

ADAM = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.99}


def training_step(config: Any, devices: Sequence[Any], branch: str | None = None) -> Contender:
    """The step that `main.py` runs, on random images that stay on the devices.

    The state is donated and nothing is fetched between steps. Players start from random weights,
    whatever `config.init_from` says.

    Args:
      config: of a training run.
      devices: that split the batch.
      branch: of EQ-VAE's plans, the middle one of which is taken; the first step's plan unless
        given.
    """
    before = high_water(devices[0])
    run = Run(config, devices)
    plan = choose_plan(run.method, branch)
    # Adam's state and the average are arrays of their own: nothing of it is shared when donated.
    held = {"state": run.init({})}
    batch = put_batch(run.mesh, random_batch(config))
    run.frozen  # noqa: B018  (put on the devices before the clock starts)

    def step() -> Array:
        held["state"], metrics = run.step(held["state"], batch, plan)
        return metrics

    jax.block_until_ready(step())  # compiles
    program = run.programs[plan]

    return Contender(
        run=lambda count: clock(step, count, wait=False),
        compile_seconds=run.compile_seconds,
        operations=operations(lambda: run.lower(plan), program),
        memory=memory_of(program, devices[0], before),
    )


def choose_plan(method: Any, branch: str | None) -> Hashable:
    """The middle one of a method's plans of a branch; of the first step, where none is named."""
    if branch is None:
        return method.plan(0)
    plans = sorted(plan for plan in method.plans() if plan.branch == branch)
    return plans[len(plans) // 2]


def random_batch(config: Any) -> dict[str, np.ndarray]:
    """Uniform pixels and labels 0, as the config's reader would give them."""
    random, size = np.random.default_rng(0), config.train.batch_size
    blank = data.make_reader(config.data, train=True).blank()
    return {
        name: (
            random.integers(0, 256, (size, *array.shape), np.uint8)
            if array.dtype == np.uint8
            else np.zeros((size, *np.shape(array)), array.dtype)
        )
        for name, array in blank.items()
    }


def dit_net(sizes: DiTSizes, dtype: Any) -> Net:
    """The velocity field of the job `dit`."""
    return Net(
        lambda rngs: DiT(
            3,
            sizes.width,
            sizes.depth,
            sizes.heads,
            sizes.patch,
            sizes.latent_channels,
            sizes.factor,
            dtype=dtype,
            rngs=rngs,
        )
    )


def dit_batch(sizes: DiTSizes, batch_size: int) -> dict[str, np.ndarray]:
    """Images x and latents z, both standard normal."""
    random, latent = np.random.default_rng(0), sizes.side // sizes.factor
    shapes = {"x": (sizes.side, sizes.side, 3), "z": (latent, latent, sizes.latent_channels)}
    return {
        name: random.standard_normal((batch_size, *shape), np.float32)
        for name, shape in shapes.items()
    }


def dit_step(sizes: DiTSizes, batch_size: int, dtype: Any, device: Any) -> Contender:
    """Flow matching with uniform times, and Adam; noise and times are drawn in the step."""
    before = high_water(device)
    net, optimizer = dit_net(sizes, dtype), optax.adam(**ADAM)

    def init(key: Any) -> Any:
        params = net.init(key)
        return {"params": params, "opt": optimizer.init(params), "key": jax.random.fold_in(key, 1)}

    def loss(params: Any, batch: dict[str, Array], noise: Array, t_B: Array) -> Array:
        def field(x: Array, t_B: Array) -> Array:
            return net(params, x, t_B, batch["z"])

        return jnp.mean(flow.matching_loss(field, batch["x"], noise, t_B))

    def train(state: Any, batch: dict[str, Array]) -> tuple[Any, Array]:
        key, noise_key, time_key = jax.random.split(state["key"], 3)
        noise = jax.random.normal(noise_key, batch["x"].shape)
        t_B = jax.random.uniform(time_key, (batch_size,))
        value, grads = jax.value_and_grad(loss)(state["params"], batch, noise, t_B)
        updates, opt = optimizer.update(grads, state["opt"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "key": key}, value

    held = {"state": jax.device_put(jax.jit(init)(jax.random.key(0)), device)}
    batch = jax.device_put(dit_batch(sizes, batch_size), device)
    lowered = jax.jit(train, donate_argnums=0).lower(held["state"], batch)
    program, seconds = compile_timed(lowered)

    def step() -> Array:
        held["state"], value = program(held["state"], batch)
        return value

    jax.block_until_ready(step())
    return Contender(
        run=lambda count: clock(step, count, wait=False),
        compile_seconds=seconds,
        operations=operations(lambda: lowered, program),
        memory=memory_of(program, device, before),
    )


def compile_timed(lowered: Any) -> tuple[Any, float]:
    """(the compiled program, seconds that it took)."""
    start = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - start
