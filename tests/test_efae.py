"""EFAE's loss: what it compares, example by example; its noise, penalty and control."""

from __future__ import annotations

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny import tiny
from tiny_nets import quick_jit, random_params

from efae_jax import groups
from efae_jax.errors import UserError
from efae_jax.flow import expand
from efae_jax.methods import efae, make_method
from efae_jax.methods.base import Context, to_float

BATCH = 6


def batch(count=BATCH, size=8, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    return {"image": image, "label": np.zeros(count, np.int32)}


def images():
    return np.asarray(to_float(jnp.asarray(batch()["image"])))


def keys(count=BATCH, seed=5):
    return jax.random.split(jax.random.key(seed), count)


# ---- with a stand-in for the networks, whose losses are known


class Recorder:
    """Latents that are the images themselves, and a velocity field of one's choice.

    `field(z, x_t, t)`; what the method asks of it is recorded.
    """

    def __init__(self, group, field):
        self.group, self.velocity, self.seen = groups.group(group), field, {}

    def encode(self, params, x):
        self.seen["encoded"] = x
        return x

    def act_image(self, g_B, x):
        self.seen["g_image"] = g_B
        return groups.act_image(self.group, g_B, x)

    def act(self, params, g_B, z):
        self.seen["g_latent"] = g_B
        return groups.act_image(self.group, g_B, z)

    def field(self, params, z):
        self.seen["latent"] = z

        def velocity(x, t_B):
            self.seen |= {"x_t": x, "t": t_B}
            return self.velocity(z, x, t_B)

        return velocity


def knows_the_answer(z, x, t_B):
    """The exact velocity where z is the image that the path starts from."""
    return (x - z) / expand(t_B, x)


def nothing(z, x, t_B):
    return 0 * x


CONTEXT = Context(step=0, variables={}, passed={}, frozen={}, plan=None)


def noise_of(seen):
    """e of x_t = (1 - t) x + t e, where the latents are x."""
    t = expand(seen["t"], seen["x_t"])
    return (seen["x_t"] - (1 - t) * seen["latent"]) / t


def recorded_loss(field, group="z2xz2", data=None, **overrides):
    """The loss of every example, and what the networks saw."""
    no_extras = {"flow__drop_rate": 0.0, "latent__penalty": 0.0}
    model, data = Recorder(group, field), data or batch()
    with mock.patch.object(efae, "build_flow_autoencoder", return_value=model):
        method = make_method(tiny(**no_extras | overrides))

    def run(keys_B):
        outcome = method.loss("autoencoder", {"autoencoder": {}}, data, keys_B, CONTEXT)
        return outcome.loss_B, outcome.metrics, model.seen

    loss_B, figures, seen = jax.device_get(quick_jit(run)(keys(len(data["image"]))))
    return types.SimpleNamespace(loss=loss_B, figures=figures, seen=seen)


@pytest.mark.parametrize("group", ["z2xz2", "d4"])
def test_the_target_is_g_x_given_rho_g_z_with_one_element_for_both(group):
    got = recorded_loss(knows_the_answer, group)
    np.testing.assert_allclose(got.loss, np.zeros(BATCH), atol=1e-8)
    np.testing.assert_allclose(got.seen["encoded"], images(), atol=1e-6)  # never g x
    np.testing.assert_array_equal(got.seen["g_image"], got.seen["g_latent"])
    assert len(set(got.seen["g_image"].tolist())) > 1  # one draw per example
    moved = groups.act_image(groups.group(group), got.seen["g_image"], images())
    np.testing.assert_allclose(got.seen["latent"], moved, atol=1e-6)


def test_the_loss_is_the_mean_square_of_the_velocitys_error():
    got = recorded_loss(nothing)
    x, noise = got.seen["latent"], noise_of(got.seen)
    np.testing.assert_allclose(got.loss, np.mean((noise - x) ** 2, axis=(1, 2, 3)), rtol=1e-4)
    np.testing.assert_array_equal(got.figures["flow"], got.loss)


def test_elements_times_and_noise_have_their_distributions():
    count = 4_000
    data = batch(count, size=1)
    got = recorded_loss(nothing, "d4", data, flow__time_loc=0.5, flow__time_scale=0.8)
    g, t, noise = got.seen["g_image"], got.seen["t"], noise_of(got.seen).reshape(count, 3)
    assert stats.chisquare(np.bincount(g, minlength=8)).pvalue > 0.01
    assert stats.kstest((np.log(t / (1 - t)) - 0.5) / 0.8, "norm").pvalue > 0.01
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    # The draws, and the examples, have nothing to do with each other.
    draws = np.stack([g, t, *noise.T, g[::-1], t[::-1], noise[::-1, 0]])
    correlations = np.abs(np.corrcoef(draws) - np.eye(len(draws)))
    assert correlations.max() < 5 / np.sqrt(count)


def test_latents_are_dropped_at_the_configs_rate():
    data = batch(2_000, size=1)
    got = recorded_loss(knows_the_answer, data=data, flow__drop_rate=0.25)
    gone = (got.seen["latent"] == 0).all(axis=(1, 2, 3))
    assert stats.binomtest(int(gone.sum()), len(gone), 0.25).pvalue > 0.01
    assert got.loss[~gone].max() < 1e-6 < got.loss[gone].min()


def test_the_penalty_adds_its_multiple_of_the_mean_square_before_noise():
    options = {"latent__noise": "additive", "latent__noise_size": 0.5}
    free = recorded_loss(nothing, **options)
    penalised = recorded_loss(nothing, latent__penalty=0.7, **options)
    squares = np.mean(images() ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(penalised.loss - free.loss, 0.7 * squares, rtol=1e-4)
    np.testing.assert_allclose(penalised.figures["latent_square"], squares, rtol=1e-5)
    np.testing.assert_array_equal(penalised.figures["flow"], free.figures["flow"])


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_noise_reaches_the_latent_but_not_the_target(kind):
    options = {"latent__noise": kind, "latent__noise_size": 0.01}
    got = recorded_loss(knows_the_answer, **options)
    x = groups.act_image(groups.group("z2xz2"), got.seen["g_image"], images())
    difference = np.asarray(got.seen["latent"] - x)
    assert 0.003 < difference.std() < 0.02
    t = expand(got.seen["t"], difference)
    # v - (e - x) = -(z - x) / t
    expected = np.mean((difference / t) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(got.loss, expected, rtol=0.05, atol=1e-7)


def test_without_the_group_in_the_objective_nothing_moves():
    got = recorded_loss(knows_the_answer, group__in_objective=False)
    assert not {"g_image", "g_latent"} & set(got.seen)
    np.testing.assert_allclose(got.seen["latent"], images(), atol=1e-6)
    np.testing.assert_allclose(got.loss, np.zeros(BATCH), atol=1e-8)


# ---- with networks


def draw(method, seed=0):
    model = method.autoencoder
    params = {
        "encoder": random_params(model.encoder, seed),
        "velocity": random_params(model.velocity_net, seed),
    }
    if model.learned:
        basis = np.random.default_rng(seed).standard_normal((8, 8))
        params["basis"] = basis.astype(np.float32)
    return {"autoencoder": params}


def loss_of(config):
    method = make_method(config)
    params = draw(method)
    run = quick_jit(
        lambda data, keys_B: method.loss("autoencoder", params, data, keys_B, CONTEXT).loss_B
    )
    return lambda data=None, keys_B=None: np.asarray(
        run(data or batch(), keys() if keys_B is None else keys_B)
    )


OPTIONS = {"flow__drop_rate": 0.5, "latent__noise": "additive", "latent__noise_size": 0.3}


@pytest.fixture(scope="module")
def loss():
    return loss_of(tiny(**OPTIONS))


def test_an_examples_loss_depends_on_its_image_and_its_key_alone(loss):
    first, second, k = batch(), batch(seed=1), keys()
    before = loss(first)
    mixed = {name: np.concatenate([first[name][:2], second[name][2:]]) for name in first}
    after = loss(mixed)
    np.testing.assert_allclose(after[:2], before[:2], rtol=1e-5)
    assert np.abs(after[2:] - before[2:]).min() > 1e-4
    order = np.array([3, 1, 5, 0, 2, 4])
    shuffled = loss({name: value[order] for name, value in first.items()}, k[order])
    np.testing.assert_allclose(shuffled, before[order], rtol=1e-5)
    assert np.abs(loss(first, keys(seed=6)) - before).min() > 1e-4


def test_the_control_equals_the_trivial_group(loss):
    control = loss_of(tiny(group__in_objective=False, **OPTIONS))()
    trivial = {"group__name": "trivial", "group__representation": "8*trivial"}
    np.testing.assert_allclose(control, loss_of(tiny(**trivial, **OPTIONS))(), rtol=1e-5)
    assert np.abs(control - loss()).max() > 1e-3


def test_the_gradient_reaches_every_parameter_and_the_learned_basis():
    method = make_method(tiny(group__learned="cayley", model__velocity__depth=1))
    params = draw(method)
    mean = lambda p: method.loss("autoencoder", p, batch(), keys(), CONTEXT).loss_B.mean()  # noqa: E731
    gradient = quick_jit(jax.grad(mean))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-7, path
    assert "basis" in gradient["autoencoder"]


def test_images_of_eight_bits_become_minus_one_to_one():
    u = jnp.array([0, 51, 255], jnp.uint8)
    np.testing.assert_allclose(to_float(u), [-1, -0.6, 1], rtol=1e-6)


# ---- noise on the latent


@pytest.mark.parametrize("shape", [(3, 3, 2), (5,)])
def test_perturbations_have_their_kind_and_size(shape):
    z = np.random.default_rng(0).uniform(1, 3, (500, *shape)).astype(np.float32)
    add = np.asarray(efae.perturb(keys(500), z, "additive", 0.2))
    assert stats.kstest(((add - z) / 0.2).ravel(), "norm").pvalue > 0.01
    times = np.asarray(efae.perturb(keys(500), z, "multiplicative", 0.2))
    assert stats.kstest(((times / z - 1) / 0.2).ravel(), "norm").pvalue > 0.01
    for kind, size in (("none", 0.2), ("additive", 0.0), ("multiplicative", 0.0)):
        np.testing.assert_array_equal(efae.perturb(keys(500), z, kind, size), z)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"method": "vae"},
            "config.method='vae' is not one of efae, aura_equivae, eq_vae, disentangle",
        ),
        ({"flow__time": "beta"}, "config.flow.time='beta' is not one of uniform, logit_normal"),
        (
            {"latent__noise": "pink"},
            "config.latent.noise='pink' is not one of none, additive, multiplicative",
        ),
    ],
)
def test_unknown_names_are_errors_of_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        make_method(tiny(**overrides))
    assert str(error.value) == message
