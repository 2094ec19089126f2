"""Solvers of the flow by their order of convergence, and likelihoods by known densities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from efae_jax import sampling
from efae_jax.flow import expand

# ---- solvers


def curved(x, t):
    """dx/dt = x^2 cos t: not linear and not autonomous, 1/x(t) = 1/x(1) + sin 1 - sin t."""
    return x**2 * jnp.cos(t)


def field(f):
    """The velocity field of a function of x and a time that broadcasts."""
    return lambda x, t_B: f(x, expand(t_B, x))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    with jax.enable_x64(True):
        start = np.array([[0.5], [0.8]])
        exact = 1 / (1 / start + np.sin(1))  # at t = 0, coming from t = 1
        errors = []
        for steps in (16, 32, 64):  # times that float32 holds exactly
            x = sampling.sample(field(curved), jnp.asarray(start), steps, solver)
            assert x.dtype == jnp.float64
            errors.append(np.abs(x - exact).max())
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.08)


def test_one_step_of_each_solver_by_hand():
    f = lambda y, t: y * t + 1  # noqa: E731
    y, t, dt = jnp.float32(2), 0.5, 0.2  # f = 2
    euler = 2.0 + 0.2 * 2.0
    half = 2.0 + 0.1 * 2.0
    assert sampling.euler_step(f, y, t, dt) == pytest.approx(euler)
    assert sampling.midpoint_step(f, y, t, dt) == pytest.approx(2.0 + 0.2 * (half * 0.6 + 1))
    assert sampling.heun_step(f, y, t, dt) == pytest.approx(2.0 + 0.1 * (2.0 + euler * 0.7 + 1))


def test_euler_with_one_and_two_steps_by_hand():
    velocity = field(lambda x, t: x + t**2)
    noise = np.array([[1.0, -2.0]], np.float32)
    one = noise - (noise + 1)
    np.testing.assert_allclose(sampling.sample(velocity, noise, 1), one, rtol=1e-6, atol=1e-7)
    half = noise - (noise + 1) / 2  # at t = 1
    two = half - (half + 0.25) / 2  # at t = 1/2
    np.testing.assert_allclose(sampling.sample(velocity, noise, 2), two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_euler_evaluates_at_times_one_down_to_one_over_n(steps):
    velocity = field(lambda x, t: t + 0 * x)
    _, states = sampling.sample(velocity, np.zeros((2, 3), np.float32), steps, trajectory=True)
    times = -np.diff(states, axis=0) * steps
    expected = np.arange(steps, 0, -1) / steps  # 1, 1 - 1/N, ..., 1/N
    np.testing.assert_allclose(times, np.broadcast_to(expected[:, None, None], times.shape), 1e-5)


def test_trajectory_goes_from_the_noise_to_the_sample():
    velocity, noise = field(curved), np.array([[0.5], [0.8]], np.float32)
    alone = sampling.sample(velocity, noise, 4, "heun")
    last, states = sampling.sample(velocity, noise, 4, "heun", trajectory=True)
    assert states.shape == (5, 2, 1)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_array_equal(states[-1], last)
    np.testing.assert_array_equal(last, alone)
    half = sampling.integrate(lambda x, t: curved(x, t), noise, jnp.array([1, 0.75, 0.5]), "heun")
    np.testing.assert_allclose(states[2], half, rtol=1e-6)


def test_integrate_takes_trees_and_any_grid():
    """dy/dt = 2 t with uneven steps, forwards."""
    start = {"a": jnp.zeros(2), "b": (jnp.ones(()),)}
    f = lambda y, t: jax.tree.map(lambda v: jnp.full_like(v, 2 * t), y)  # noqa: E731
    times = jnp.array([0.0, 0.5, 0.6, 1.0])
    last, states = sampling.integrate(f, start, times, "euler", trajectory=True)
    by_hand = np.cumsum([0, 0.5 * 0, 0.1 * 1.0, 0.4 * 1.2])
    np.testing.assert_allclose(states["b"][0], 1 + by_hand, rtol=1e-6)
    np.testing.assert_allclose(last["a"], np.full(2, by_hand[-1]), rtol=1e-6)
    exact = sampling.integrate(f, start, times, "midpoint")  # exact for a slope linear in t
    np.testing.assert_allclose(exact["a"], np.ones(2), rtol=1e-6)


def test_an_unknown_solver_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"'rk4' is not one of euler, midpoint, heun$"):
        sampling.sample(field(curved), jnp.ones((1, 1)), 2, "rk4")


def test_the_program_does_not_grow_with_the_number_of_steps():
    traced = []

    def velocity(x, t_B):
        traced.append(1)
        return -x

    counts = []
    for steps in (2, 50):
        traced.clear()
        jax.make_jaxpr(lambda x, n=steps: sampling.sample(velocity, x, n))(jnp.ones((1, 4)))
        counts.append(len(traced))
    assert counts[0] == counts[1] < 5


# ---- divergence

SIZE = 20  # more than one group of Jacobian-vector products


@pytest.fixture(scope="module")
def coupled():
    """A field whose Jacobian is full and differs between examples, with its exact trace."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((SIZE, SIZE)).astype(np.float32) / 4
    x = rng.standard_normal((2, 5, 2, 2)).astype(np.float32)
    t_B = np.array([0.3, 0.8], np.float32)

    def one(x, t):
        return (jnp.tanh(weights @ x.ravel()) * (1 + t)).reshape(x.shape)

    trace = lambda x, t: jnp.trace(jax.jacfwd(one)(x, t).reshape(SIZE, SIZE))  # noqa: E731
    return jax.vmap(one), x, t_B, np.array(jax.jit(jax.vmap(trace))(x, t_B))


def test_exact_divergence_is_the_trace_of_the_jacobian(coupled):
    velocity, x, t_B, trace = coupled
    got = jax.jit(lambda x: sampling.divergence_exact(velocity, x, t_B))(x)
    np.testing.assert_allclose(got, trace, rtol=1e-4, atol=1e-4)


def test_hutchinson_is_unbiased(coupled):
    velocity, x, t_B, trace = coupled
    probes = jax.random.rademacher(jax.random.key(0), (4_000, 1, *x.shape), dtype=x.dtype)
    estimate = lambda p: sampling.divergence_hutchinson(velocity, x, t_B, p)  # noqa: E731
    estimates = np.asarray(jax.jit(lambda p: jax.lax.map(estimate, p, batch_size=500))(probes))
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert np.all(estimates.std(axis=0) > 0.1)
    assert np.all(np.abs(estimates.mean(axis=0) - trace) < 4 * error)
    # Several probes at once are the mean of one by one.
    np.testing.assert_allclose(estimate(probes[:8, 0]), estimates[:8].mean(axis=0), rtol=1e-4)


def test_one_probe_of_signs_is_exact_where_the_jacobian_is_diagonal():
    velocity = lambda x, t_B: jnp.sin(3 * x) * expand(t_B, x)  # noqa: E731
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 1)).astype(np.float32)
    t_B = np.array([0.5, 1.0], np.float32)
    trace = (3 * np.cos(3 * x) * t_B[:, None, None, None]).sum((1, 2, 3))
    probe = jax.random.rademacher(jax.random.key(3), (1, *x.shape), dtype=x.dtype)
    got = sampling.divergence_hutchinson(velocity, x, t_B, probe)
    np.testing.assert_allclose(got, trace, rtol=1e-4)


# ---- likelihood


def gaussian_field(x, t_B, mean, std):
    """The exact velocity E[e - x | x_t] when every pixel is N(mean, std^2) by itself."""
    t = expand(t_B, x)
    gain = (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2)
    return -mean + gain * (x - (1 - t) * mean)


IMAGE = (2, 3, 1)
MEAN = np.linspace(-0.5, 0.5, 6, dtype=np.float32).reshape(IMAGE)
STD = np.linspace(0.3, 1.5, 6, dtype=np.float32).reshape(IMAGE)
# Points of the three examples: near the mean, typical, far out.
DEVIATIONS = np.float32([0.3, 1, 2]).reshape(3, 1, 1, 1)
POINTS = MEAN + STD * DEVIATIONS * np.random.default_rng(1).choice([-1, 1], (3, *IMAGE))
POINTS = POINTS.astype(np.float32)
LOG_P = stats.norm.logpdf(POINTS, MEAN, STD).sum((1, 2, 3))


def gaussian(x, t_B):
    return gaussian_field(x, t_B, MEAN, STD)


def likelihood(velocity, x=POINTS, **options):
    return np.asarray(jax.jit(lambda x: sampling.log_likelihood(velocity, x, **options))(x))


def test_likelihood_of_a_gaussian_and_its_convergence():
    fine = likelihood(gaussian, steps=64)
    np.testing.assert_allclose(fine, LOG_P, atol=2e-3)
    for solver, ratio in {"euler": 2, "heun": 4}.items():
        coarse, finer = (
            np.abs(likelihood(gaussian, steps=n, solver=solver) - LOG_P).max() for n in (8, 16)
        )
        assert coarse / finer == pytest.approx(ratio, rel=0.3)


def test_likelihood_given_a_latent():
    """The latent is the mean of the density, example by example."""
    z = np.array([-1.0, 0.0, 0.7], np.float32).reshape(3, 1, 1, 1)
    got = likelihood(lambda x, t_B: gaussian_field(x, t_B, z, 0.5), steps=64)
    expected = stats.norm.logpdf(POINTS, z, 0.5).sum((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3)


def test_hutchinson_likelihood():
    key = jax.random.key(0)
    # Every pixel by itself: the Jacobian is diagonal, and one probe is exact.
    one = likelihood(gaussian, steps=16, key=key)
    np.testing.assert_allclose(one, likelihood(gaussian, steps=16), rtol=1e-4)

    # The same density in a turned basis, whose Jacobian is full.
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0].astype(np.float32)
    turn = lambda x, r: (x.reshape(-1, 6) @ r).reshape(x.shape)  # noqa: E731
    turned = lambda x, t_B: turn(gaussian(turn(x, rotation), t_B), rotation.T)  # noqa: E731
    points = turn(POINTS, rotation.T)
    few = likelihood(turned, points, steps=32, key=key)
    many = likelihood(turned, points, steps=32, key=key, probes=400)
    assert np.abs(few - LOG_P).max() > 0.5
    np.testing.assert_allclose(many, LOG_P, atol=0.2)


# ---- 8 bits


def test_uniform_levels_take_eight_bits():
    size = 12
    # Uniform over 256 bins of width 1 / 127.5 in each of the dimensions.
    log_p = np.full(3, size * np.log(127.5 / 256), np.float32)
    np.testing.assert_allclose(sampling.bits_per_dimension(log_p, size), [8, 8, 8], rtol=1e-6)
    # One bit less each: the density doubles.
    one_less = log_p + size * np.float32(np.log(2))
    np.testing.assert_allclose(sampling.bits_per_dimension(one_less, size), [7, 7, 7], rtol=1e-6)


def test_bits_of_a_known_distribution_of_levels():
    """The code length of levels from a discretised normal density is its entropy."""
    levels = np.arange(256)
    x = levels / 127.5 - 1
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    mass = np.diff(stats.norm.cdf(edges, scale=0.2))
    bits = sampling.bits_per_dimension(jnp.asarray(stats.norm.logpdf(x, scale=0.2)), 1)
    np.testing.assert_allclose((mass * bits).sum(), -(mass * np.log2(mass)).sum(), rtol=1e-3)


def test_dequantised_levels_fill_their_bins():
    levels = np.broadcast_to(np.arange(256), (200, 256))
    x = jnp.asarray(levels / 127.5 - 1, jnp.float32)[..., None, None]
    spread = np.asarray(sampling.dequantise(jax.random.key(0), x), np.float64)[..., 0, 0]
    offset = (spread + 1) * 127.5 - levels
    assert np.abs(offset).max() <= 0.5 + 1e-4
    assert stats.kstest(offset.ravel(), stats.uniform(-0.5, 1).cdf).pvalue > 0.01
