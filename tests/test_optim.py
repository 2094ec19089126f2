"""Learning-rate schedules and optimisers, by the numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.efae import get_config
from efae_jax.errors import UserError
from efae_jax.optim import make_optimizer, make_schedule


def config(**changes):
    c = get_config("smoke").optim
    c.update({"lr": 0.1, "warmup": 0, "schedule": "constant", "clip": 0.0} | changes)
    return c


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 0.1, 50: 0.1, 100: 0.1}),
        ("constant", 10, {0: 0, 5: 0.05, 10: 0.1, 100: 0.1}),
        ("cosine", 0, {0: 0.1, 25: 0.1 * (1 + np.sqrt(0.5)) / 2, 50: 0.05, 100: 0}),
        ("cosine", 20, {0: 0, 10: 0.05, 20: 0.1, 60: 0.05, 100: 0}),
        ("linear", 0, {0: 0.1, 50: 0.1, 75: 0.05, 100: 0}),
        ("linear", 20, {0: 0, 10: 0.05, 20: 0.1, 50: 0.1, 75: 0.05, 100: 0}),
        ("linear", 60, {0: 0, 30: 0.05, 60: 0.1, 80: 0.05, 100: 0}),  # warm-up past the half
        ("cosine", 1_000, {0: 0, 50: 0.05, 100: 0.1}),  # longer than the run
    ],
)
def test_schedules_at_their_key_steps(schedule, warmup, expected):
    rate = make_schedule(config(schedule=schedule, warmup=warmup), 100)
    got = {step: float(rate(step)) for step in expected}
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_of_a_single_step_has_a_schedule(schedule):
    assert float(make_schedule(config(schedule=schedule), 1)(0)) == pytest.approx(0.1)


def updates(c, params, *gradients, steps=100):
    """The updates that one gradient after the other gives."""
    optimizer = make_optimizer(c, steps)
    state, out = optimizer.init(params), []
    for gradient in gradients:
        update, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, update)
        out.append(update)
    return out


def test_adam_by_hand_with_the_configs_averages_and_schedule():
    g = [np.array([1.0, -2.0], np.float32), np.array([-0.5, -1.0], np.float32)]
    got = updates(config(b1=0.8, b2=0.9, schedule="linear"), jnp.zeros(2), *g, steps=2)
    m = v = 0
    for step, gradient in enumerate(g, 1):
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        rate = [0.1, 0.1][step - 1]  # falls from the half of the run on, after step 1
        by_hand = -rate * (m / (1 - 0.8**step)) / np.sqrt(v / (1 - 0.9**step))
        np.testing.assert_allclose(got[step - 1], by_hand, rtol=1e-5)


def test_weight_decay_is_decoupled_from_the_gradient():
    params = {"bias": jnp.full(3, 2.0), "kernel": jnp.full((3, 2), -1.0)}
    (got,) = updates(config(weight_decay=0.3), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(got["bias"], np.full(3, -0.1 * 0.3 * 2), rtol=1e-5)
    np.testing.assert_allclose(got["kernel"], np.full((3, 2), 0.1 * 0.3), rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    # Adam forgets the gradient's scale but for its epsilon, 1e-8: clipped to a norm of
    # 1e-8, (3, 4) becomes (0.6, 0.8) epsilons, and the update lr g / (g + epsilon).
    params, gradient = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.full(1, 3.0)}
    gradient["b"] = jnp.full(1, 4.0)
    (got,) = updates(config(clip=1e-8), params, gradient)
    np.testing.assert_allclose([got["a"][0], got["b"][0]], [-0.06 / 1.6, -0.08 / 1.8], rtol=1e-4)
    (free,) = updates(config(clip=0.0), params, gradient)
    np.testing.assert_allclose([free["a"][0], free["b"][0]], [-0.1, -0.1], rtol=1e-4)
    (small,) = updates(config(clip=10.0), params, gradient)
    np.testing.assert_allclose([small["a"][0], small["b"][0]], [-0.1, -0.1], rtol=1e-4)


def test_rates_of_single_parameters_scale_the_whole_update():
    params = {"conv_in": {"kernel": jnp.ones(2)}, "conv": {"kernel": jnp.ones(2)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    settings = {"weight_decay": 0.5, "schedule": "linear"}
    (plain,) = updates(config(**settings), params, gradient)
    rates = (("conv_in/", 0.01), ("in/", 5.0))  # the first that fits decides
    with pytest.raises(UserError, match="no parameter's path contains in/"):
        updates(config(rates=rates, **settings), params, gradient)
    (got,) = updates(config(rates=rates[:1], **settings), params, gradient)
    np.testing.assert_allclose(got["conv_in"]["kernel"], plain["conv_in"]["kernel"] / 10, rtol=1e-6)
    np.testing.assert_array_equal(got["conv"]["kernel"], plain["conv"]["kernel"])


@pytest.mark.parametrize("rates", [(("a",),), ((1, 0.1),), (("a", -1.0),)])
def test_rates_that_make_no_sense_are_named(rates):
    with pytest.raises(UserError, match=r"is not \(regex, learning rate"):
        make_optimizer(config(rates=rates), 10)


def test_an_unknown_schedule_is_an_error_of_one_line():
    with pytest.raises(UserError) as error:
        make_optimizer(config(schedule="step"), 10)
    allowed = "constant, cosine, linear"
    assert str(error.value) == f"config.optim.schedule='step' is not one of {allowed}"
