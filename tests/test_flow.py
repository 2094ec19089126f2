"""The rectified-flow path, its times, its loss, the dropped latent, guidance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logit

from efae_jax import flow

SHAPE = (3, 4, 6, 2)
T = np.array([0.0, 0.25, 1.0], np.float32)


@pytest.fixture(scope="module")
def x_and_noise():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, *SHAPE)).astype(np.float32)


def test_path_is_straight_from_image_to_noise(x_and_noise):
    x, noise = x_and_noise
    x_t = flow.path(x, noise, T)
    np.testing.assert_array_equal(x_t[0], x[0])
    np.testing.assert_allclose(x_t[1], 0.75 * x[1] + 0.25 * noise[1], rtol=1e-6)
    np.testing.assert_array_equal(x_t[2], noise[2])


def test_target_is_the_paths_derivative(x_and_noise):
    x, noise = x_and_noise
    _, slope = jax.jvp(lambda t: flow.path(x, noise, t), (T,), (np.ones(3, np.float32),))
    np.testing.assert_allclose(flow.velocity_target(x, noise), slope, rtol=1e-6)


def test_expand_appends_axes_of_length_one():
    assert flow.expand(jnp.zeros(3), jnp.zeros(SHAPE)).shape == (3, 1, 1, 1)
    assert flow.expand(jnp.zeros(3), jnp.zeros((3, 5))).shape == (3, 1)


@pytest.mark.parametrize(
    ("density", "parameters", "cdf"),
    [
        ("uniform", {}, lambda t: t),
        ("logit_normal", {}, lambda t: stats.norm.cdf(logit(t))),
        (
            "logit_normal",
            {"loc": 0.7, "scale": 1.6},
            lambda t: stats.norm.cdf(logit(t), loc=0.7, scale=1.6),
        ),
    ],
)
def test_times_have_the_density_they_are_said_to_have(density, parameters, cdf):
    keys = jax.random.split(jax.random.key(0), 20_000)
    t = jax.jit(jax.vmap(lambda k: flow.sample_time(k, density, **parameters)))(keys)
    assert t.min() >= 0
    assert t.max() < 1
    # With 20,000 draws a shift of the distribution by 0.02 would give p < 1e-6.
    assert stats.kstest(np.asarray(t, np.float64), cdf).pvalue > 0.01


def test_an_unknown_time_density_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"'cosine' is not one of uniform, logit_normal$"):
        flow.sample_time(jax.random.key(0), "cosine")


def test_loss_is_zero_for_the_exact_field(x_and_noise):
    x, noise = x_and_noise
    t = np.array([0.1, 0.5, 0.9], np.float32)
    # Where the only image is x, the velocity at x_t is (x_t - x) / t.
    loss = flow.matching_loss(lambda x_t, t_B: (x_t - x) / flow.expand(t_B, x_t), x, noise, t)
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-11)


def test_loss_is_the_mean_square_of_each_example(x_and_noise):
    x, noise = x_and_noise
    t = np.array([0.1, 0.5, 0.9], np.float32)
    seen = []

    def velocity(x_t, t_B):
        seen.append(t_B)
        return (2 * x_t + flow.expand(t_B, x_t)).astype(jnp.bfloat16)

    loss = flow.matching_loss(velocity, x, noise, t)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(seen[0], t)
    for i in range(3):
        x_t = (1 - t[i]) * x[i] + t[i] * noise[i]
        by_hand = np.mean((2 * x_t + t[i] - (noise[i] - x[i])) ** 2)
        np.testing.assert_allclose(loss[i], by_hand, rtol=5e-3)  # bfloat16 field


@pytest.mark.parametrize("shape", [(2, 2, 3), (5,)])
def test_drop_zeroes_whole_examples_at_the_rate(shape):
    count, rate = 5_000, 0.3
    keys = jax.random.split(jax.random.key(1), count)
    z = np.random.default_rng(2).uniform(1, 2, (count, *shape)).astype(np.float32)
    dropped = np.asarray(jax.jit(flow.drop, static_argnums=2)(keys, z, rate))
    gone = (dropped == 0).all(axis=tuple(range(1, z.ndim)))
    np.testing.assert_array_equal(dropped[~gone], z[~gone])
    assert stats.binomtest(int(gone.sum()), count, rate).pvalue > 0.01


def test_drop_of_none_and_of_all():
    keys, z = jax.random.split(jax.random.key(1), 50), jnp.ones((50, 4))
    np.testing.assert_array_equal(flow.drop(keys, z, 0.0), z)
    np.testing.assert_array_equal(flow.drop(keys, z, 1.0), 0 * z)


def velocity(x, t_B, z):
    """Not linear in anything, and as wide as the batch it is given."""
    return jnp.sin(x) * flow.expand(t_B, x) + jnp.exp(flow.expand(z.sum(-1), x))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_formula(x_and_noise, scale):
    x, _ = x_and_noise
    z = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    conditional, null = velocity(x, T, z), velocity(x, T, 0 * z)
    assert np.abs(conditional - null).max() > 0.5
    guided = flow.guided(velocity, z, scale)(x, T)
    np.testing.assert_allclose(guided, null + scale * (conditional - null), rtol=2e-5, atol=1e-5)


def test_guidance_evaluates_once_and_with_scale_one_at_the_batchs_own_size(x_and_noise):
    x, _ = x_and_noise
    sizes = []

    def recorded(x, t_B, z):
        sizes.append((len(x), len(t_B), len(z)))
        return velocity(x, t_B, z)

    z = jnp.ones((3, 5))
    flow.guided(recorded, z, 1.0)(x, T)
    flow.guided(recorded, z, 2.0)(x, T)
    assert sizes == [(3, 3, 3), (6, 6, 6)]
