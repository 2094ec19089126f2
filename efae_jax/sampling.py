"""Solvers of dx/dt = v(x, t), and the samples, trajectories and likelihoods they give.

Every solver takes a grid of times and steps through it under `lax.scan`, so that the
number of steps does not change the size of the compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from efae_jax.flow import Velocity

Derivative = Callable[[Any, Array], Any]


def _advance(y: Any, dt: Array, slope: Any) -> Any:
    return jax.tree.map(lambda a, s: a + (dt * s).astype(a.dtype), y, slope)


def euler_step(f: Derivative, y: Any, t: Array, dt: Array) -> Any:
    """y + dt f(y, t). Order 1, one evaluation."""
    return _advance(y, dt, f(y, t))


def midpoint_step(f: Derivative, y: Any, t: Array, dt: Array) -> Any:
    """y + dt f(y + dt/2 f(y, t), t + dt/2). Order 2, two evaluations."""
    half = _advance(y, dt / 2, f(y, t))
    return _advance(y, dt, f(half, t + dt / 2))


def heun_step(f: Derivative, y: Any, t: Array, dt: Array) -> Any:
    """y + dt/2 (f(y, t) + f(y + dt f(y, t), t + dt)). Order 2, two evaluations."""
    first = f(y, t)
    second = f(_advance(y, dt, first), t + dt)
    return _advance(y, dt, jax.tree.map(lambda a, b: (a + b) / 2, first, second))


SOLVERS = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}


def integrate(
    f: Derivative,
    y: Any,
    times: Float[Array, " N+1"],
    solver: str = "euler",
    trajectory: bool = False,
) -> Any:
    """Solves dy/dt = f(y, t) from times[0] to times[-1].

    Args:
      f: derivative of a pytree y of arrays at a scalar time.
      y: value at times[0].
      times: the grid; rising or falling.
      solver: one of `SOLVERS`.
      trajectory: also return y at every time of the grid, stacked in front.

    Returns:
      y at times[-1], or (y, all N + 1 values).

    Raises:
      ValueError: for another solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    step = SOLVERS[solver]
    times = jnp.asarray(times, jnp.float32)

    def body(y_t: Any, interval: tuple[Array, Array]) -> tuple[Any, Any]:
        start, stop = interval
        y_next = step(f, y_t, start, stop - start)
        return y_next, y_next if trajectory else None

    last, rest = jax.lax.scan(body, y, (times[:-1], times[1:]))
    if not trajectory:
        return last
    return last, jax.tree.map(lambda first, more: jnp.concatenate([first[None], more]), y, rest)


def _per_example(velocity: Velocity) -> Derivative:
    return lambda x, t: velocity(x, jnp.full(x.shape[:1], t, jnp.float32))


def sample(
    velocity: Velocity,
    noise: Float[Array, "B ..."],
    steps: int,
    solver: str = "euler",
    trajectory: bool = False,
) -> Any:
    """Carries noise at t = 1 to an image at t = 0 in equal steps.

    With Euler and N steps: x <- x - v(x, t) / N at t = 1, 1 - 1/N, ..., 1/N.

    Returns:
      the images, or with `trajectory` (images, all N + 1 states from noise to image).
    """
    times = jnp.linspace(1.0, 0.0, steps + 1)
    return integrate(_per_example(velocity), noise, times, solver, trajectory)


def divergence_exact(velocity: Velocity, x: Array, t_B: Array) -> Float[Array, " B"]:
    """Trace of dv/dx per example, one Jacobian-vector product for each of the D elements."""
    shape, size = x.shape[1:], math.prod(x.shape[1:])

    def diagonal(i: Array) -> Array:
        tangent = jnp.zeros(size, x.dtype).at[i].set(1).reshape(shape)
        _, slope = jax.jvp(lambda y: velocity(y, t_B), (x,), (jnp.broadcast_to(tangent, x.shape),))
        return slope.reshape(x.shape[0], size)[:, i]

    return jnp.sum(jax.lax.map(diagonal, jnp.arange(size), batch_size=min(size, 16)), axis=0)


def divergence_hutchinson(
    velocity: Velocity, x: Array, t_B: Array, probes: Float[Array, "P B ..."]
) -> Float[Array, " B"]:
    """Unbiased estimate of the trace: mean over probes of e^T (dv/dx) e.

    Rademacher probes, whose variance is the smallest (Hutchinson 1989).
    """

    def estimate(probe: Array) -> Array:
        _, slope = jax.jvp(lambda y: velocity(y, t_B), (x,), (probe,))
        return jnp.sum(probe * slope, axis=tuple(range(1, x.ndim)))

    return jnp.mean(jax.lax.map(estimate, probes), axis=0)


def log_likelihood(
    velocity: Velocity,
    x: Float[Array, "B ..."],
    steps: int,
    solver: str = "heun",
    key: PRNGKeyArray | None = None,
    probes: int = 1,
) -> Float[Array, " B"]:
    """log p(x) of the flow, in nats, by the instantaneous change of variables.

    log p_0(x_0) = log N(x_1; 0, I) + integral over t from 0 to 1 of div v(x_t, t) dt
    along the path that starts at x (Chen et al. 2018, arXiv:1806.07366). For p(x | z),
    pass the conditional field.

    Args:
      velocity: the field.
      x: points, at t = 0.
      steps: number of solver steps; the error falls with the solver's order.
      solver: one of `SOLVERS`.
      key: None for the exact trace (D products a step: small inputs); a key for
        Hutchinson's estimate (Grathwohl et al. 2018, arXiv:1810.01367), whose probes
        stay the same along the path.
      probes: number of Hutchinson probes.
    """
    if key is not None:
        signs = jax.random.rademacher(key, (probes, *x.shape), dtype=x.dtype)

    def f(state: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        y, _ = state
        t_B = jnp.full(y.shape[:1], t, jnp.float32)
        if key is None:
            trace = divergence_exact(velocity, y, t_B)
        else:
            trace = divergence_hutchinson(velocity, y, t_B, signs)
        return velocity(y, t_B), trace

    start = (x, jnp.zeros(x.shape[:1], jnp.float32))
    noise, log_det = integrate(f, start, jnp.linspace(0.0, 1.0, steps + 1), solver)
    size = math.prod(x.shape[1:])
    squares = jnp.sum(jnp.square(noise), axis=tuple(range(1, x.ndim)))
    return -0.5 * (squares + size * math.log(2 * math.pi)) + log_det


def dequantise(key: PRNGKeyArray, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Spreads 8-bit images u / 127.5 - 1 over their bins: adds uniform noise of one bin's width."""
    return x + (jax.random.uniform(key, x.shape) - 0.5) / 127.5


def bits_per_dimension(log_p: Float[Array, " B"], size: int) -> Float[Array, " B"]:
    """Bits per dimension of 8-bit images with D = size elements, scaled to [-1, 1].

    -log2 p(x) / D + log2(127.5): the second term turns the density of x = u / 127.5 - 1
    into that of the levels u, whose bins have width 1 (Theis et al. 2015, arXiv:1511.01844).
    """
    return -log_p / (size * math.log(2)) + math.log2(127.5)
