"""AuraEquiVAE's training: what is compared with what, windows, recipes, the two players."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_aura
from tiny_nets import quick_jit

from efae_jax import groups, losses, recipes
from efae_jax.errors import UserError
from efae_jax.methods import aura_equivae, make_method
from efae_jax.methods.aura_equivae import Window, cut
from efae_jax.methods.base import Context
from efae_jax.models.conv_autoencoder import shrink
from efae_jax.run import Run

BATCH = 6


class Blocks:
    """Without parameters, exact and equivariant on images of flat 2x2 blocks: their means."""

    group = groups.group("z2xz2")
    matrices = groups.representation(group, "3*trivial").matrices
    factor = upscale = shrink = 1
    is_flow = False

    def __init__(self, factor=2):
        self.factor = factor

    def init(self, key):
        return {}

    def views(self, x):
        return x, x

    def encode(self, params, x):
        return shrink(x, self.factor)

    def act(self, params, g_B, z):
        return groups.act_latent(self.group, self.matrices, g_B, z)

    def act_image(self, g_B, x):
        return groups.act_image(self.group, g_B, x)

    def decode(self, params, z):
        return z.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


def keys(seed=5, count=BATCH):
    return jax.random.split(jax.random.key(seed), count)


def block_images(seed=0, side=4):
    cells = np.random.default_rng(seed).integers(0, 256, (BATCH, side, side, 3), np.uint8)
    return {"image": cells.repeat(2, axis=1).repeat(2, axis=2), "label": np.zeros(BATCH, np.int32)}


def context(plan, step=0, **others):
    given = {"variables": {}, "passed": {}, "frozen": {}} | others
    return Context(step=jnp.asarray(step), plan=plan, **given)


def exact_loss(plan, model=None, seed=5, **overrides):
    """Losses and metrics of a model without parameters, on images that it keeps exactly."""
    with mock.patch.object(aura_equivae, "build_autoencoder", return_value=model or Blocks()):
        method = make_method(tiny_aura(latent__noise="none", **overrides))
    run = quick_jit(
        lambda batch, k: method.loss("autoencoder", {"autoencoder": {}}, batch, k, context(plan))
    )
    return jax.device_get(run(block_images(), keys(seed)))


@pytest.mark.parametrize("plan", [Window(4, 4), Window(2, 2), Window(2, 3)])
def test_target_and_latent_go_through_the_same_element_and_window(plan):
    outcome = exact_loss(plan, latent__penalty=0.0)
    np.testing.assert_allclose(outcome.loss_B, 0, atol=1e-6)


def test_a_model_that_forgets_the_group_is_found_out():
    class Fixed(Blocks):
        def act(self, params, g_B, z):
            return z

    for plan in (Window(4, 4), Window(2, 2)):
        outcome = exact_loss(plan, Fixed(), latent__penalty=0.0)
        assert np.sum(outcome.metrics["reconstruction"] > 0.1) >= 2
        control = exact_loss(plan, Fixed(), latent__penalty=0.0, group__in_objective=False)
        np.testing.assert_allclose(control.loss_B, 0, atol=1e-6)


def test_every_element_comes_up_and_each_example_has_its_own():
    class Seen(Blocks):
        def act(self, params, g_B, z):
            return z + g_B[:, None, None, None]

    found = [exact_loss(Window(4, 4), Seen(), seed=s).metrics["reconstruction"] for s in range(6)]
    # Every element adds its index to the decoded image.
    assert len(np.unique(np.round(np.concatenate(found), 1))) >= 4


def test_penalty_and_noise():
    x = block_images()["image"].astype(np.float32) / 127.5 - 1
    z_square = np.mean(x**2, axis=(1, 2, 3))
    outcome = exact_loss(Window(4, 4), latent__penalty=0.5)
    np.testing.assert_allclose(outcome.loss_B, 0.5 * z_square, rtol=1e-5)
    # The penalty is of the latent before the noise, the reconstruction of the one behind it.
    noisy = {"latent__noise_size": 0.1, "latent__penalty": 0.5}
    with mock.patch.object(aura_equivae, "build_autoencoder", return_value=Blocks()):
        method = make_method(tiny_aura(latent__noise="multiplicative", **noisy))
    outcome = method.loss(
        "autoencoder", {"autoencoder": {}}, block_images(), keys(), context(Window(4, 4))
    )
    np.testing.assert_allclose(outcome.metrics["latent_square"], z_square, rtol=1e-5)
    # |z (1 + 0.1 n) - z| has mean 0.1 sqrt(2 / pi) mean |z|.
    expected = 0.1 * np.sqrt(2 / np.pi) * np.abs(x).mean()
    assert outcome.metrics["reconstruction"].mean() == pytest.approx(expected, rel=0.1)


class Offset(Blocks):
    """Exact but for an offset that is trained: every pixel of it is too bright."""

    def decode(self, params, z):
        return super().decode(params, z) + params["offset"]


PIXELS = 8 * 8 * 3


def offset_gradient(**overrides):
    """The gradient of the mean L1 for the offset, one number per pixel."""
    with mock.patch.object(aura_equivae, "build_autoencoder", return_value=Offset()):
        method = make_method(tiny_aura(latent__penalty=0.0, latent__noise="none", **overrides))

    def loss(offset):
        params = {"autoencoder": {"offset": offset}}
        outcome = method.loss("autoencoder", params, block_images(), keys(), context(Window(4, 4)))
        return outcome.loss_B.mean(), outcome

    gradient, outcome = jax.grad(loss, has_aux=True)(jnp.full((8, 8, 3), 0.25))
    weight = method.config.loss.reconstruction_weight
    np.testing.assert_allclose(outcome.metrics["reconstruction"], 0.25, rtol=1e-4)
    np.testing.assert_allclose(outcome.loss_B, weight * 0.25, rtol=1e-4)
    return np.asarray(gradient)


@pytest.mark.parametrize("weight", [1.0, 0.2])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # of B equal gradients 1 / (B N) at each of N pixels, summed over the batch
        ("none", 1 / PIXELS),
        ("elementwise", np.sqrt(BATCH)),
        ("global", np.sqrt(BATCH / PIXELS)),
    ],
)
def test_gradients_are_normalised_then_weighted(kind, expected, weight, monkeypatch):
    settings = {"loss__gradient": kind, "loss__reconstruction_weight": weight}
    np.testing.assert_allclose(offset_gradient(**settings), weight * expected, rtol=1e-4)
    # The epsilon is compared with the gradient of the plain term: half is left of one its size.
    norms = {"elementwise": 1 / (PIXELS * np.sqrt(BATCH)), "global": 1 / np.sqrt(PIXELS * BATCH)}
    monkeypatch.setattr(losses, "GRADIENT_EPS", norms.get(kind))
    share = 1.0 if kind == "none" else 0.5
    np.testing.assert_allclose(offset_gradient(**settings), share * weight * expected, rtol=1e-4)


def test_lpips_sees_flipped_pairs_where_that_is_asked_for():
    ramp = jnp.arange(64.0).reshape(8, 8, 1)
    found = {}
    for augment in (False, True):
        with mock.patch.object(aura_equivae, "build_autoencoder", return_value=Blocks()):
            method = make_method(
                tiny_aura(
                    loss__lpips=1.0,
                    loss__augment=augment,
                    latent__noise="none",
                    group__in_objective=False,
                )
            )
        method.lpips = lambda params, a, b: jnp.mean(a * b * ramp, axis=(1, 2, 3))
        outcome = method.loss(
            "autoencoder",
            {"autoencoder": {}},
            block_images(),
            keys(),
            context(Window(4, 4), frozen={"lpips": {}}),
        )
        found[augment] = np.asarray(outcome.metrics["lpips"])
    square = (block_images()["image"].astype(np.float32) / 127.5 - 1) ** 2
    flips = [square, square[:, ::-1], square[:, :, ::-1], square[:, ::-1, ::-1]]
    each = np.stack([np.mean(f * ramp, axis=(1, 2, 3)) for f in flips])
    np.testing.assert_allclose(found[False], each[0], rtol=1e-4)
    assert np.abs(found[True] - each).min(axis=0).max() < 1e-3
    assert np.abs(found[True] - each[0]).max() > 1e-2


def test_windows_lie_in_the_latent_and_reach_every_place():
    z = jnp.arange(2000 * 25.0).reshape(2000, 5, 5, 1)
    x = z.repeat(3, axis=1).repeat(3, axis=2)
    z_part, x_part = jax.jit(functools.partial(cut, window=Window(2, 3)))(keys(0, 2000), z, x)
    assert z_part.shape == (2000, 2, 3, 1)
    assert x_part.shape == (2000, 6, 9, 1)
    np.testing.assert_array_equal(x_part, z_part.repeat(3, axis=1).repeat(3, axis=2))
    row, column = np.divmod(np.asarray(z_part[:, 0, 0, 0]) % 25, 5)
    np.testing.assert_array_equal(np.unique(row), [0, 1, 2, 3])
    np.testing.assert_array_equal(np.unique(column), [0, 1, 2])
    for counts in (np.bincount(row.astype(int)) / 500, np.bincount(column.astype(int)) * 3 / 2000):
        np.testing.assert_allclose(counts, 1, atol=0.2)


def test_plans_follow_from_seed_and_step():
    method = make_method(tiny_aura(crop__sides=(0.5, 0.75)))
    plans = [method.plan(step) for step in range(600)]
    assert plans == [make_method(tiny_aura(crop__sides=(0.5, 0.75))).plan(s) for s in range(600)]
    assert set(plans) == set(method.plans()) == {Window(4, 4), Window(2, 2), Window(3, 3)}
    assert plans != [make_method(tiny_aura(crop__sides=(0.5, 0.75), seed=1)).plan(s) for s in
                     range(600)]  # fmt: skip
    share = np.mean([plan == Window(4, 4) for plan in plans])
    assert share == pytest.approx(0.5, abs=0.07)
    assert make_method(tiny_aura(crop__rate=0.0)).plans() == (Window(4, 4),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"crop__sides": (0.3,)}, "from 0.375 to below 1"),
        ({"crop__sides": (0.6,)}, "whole positions"),
        ({"crop__sides": ()}, "config.crop.rate=0.5"),
        ({"loss__recipe": "mine"}, "released, later, first_stage, custom"),
        ({"loss__reconstruction": "l2"}, "none, pooled, low_pass, l1"),
        ({"loss__gradient": "sign"}, "none, elementwise, global"),
        ({"latent__penalty": -1.0}, "latent.penalty=-1.0"),
        ({"model__shrink": 0}, "shrink=0"),
        ({"data__size": (9, 8)}, "config.data.size=9x8: both sides must be multiples of 2"),
        ({"seed": -1}, "config.seed=-1"),
        ({"loss__lecam": 0.1}, "needs a discriminator"),
        ({"loss__gan_loss": "wgan"}, "thresholded, bce, hinge"),
        ({"loss__reconstruction": "none"}, "contradict"),
        ({"model__norm_groups": 3}, "4 channels cannot be split into 3 groups"),
        ({"model__decoder_widths": (4, 8, 8)}, "multiple"),
        ({"optim__rates": (("conv_inn/", 1e-4),)}, "no parameter's path contains conv_inn/"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        Run(tiny_aura(**overrides), jax.devices()[:1])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_recipes_are_presets_that_are_not_mixed():
    for recipe, other in (("released", "later"), ("later", "released")):
        config = tiny_aura(recipe)
        assert recipes.mixed(config) == []
        for name, allowed in recipes.RECIPES[other].items():
            section, field = name.split(".")
            if allowed[0] in recipes.RECIPES[recipe][name]:
                continue
            config = tiny_aura(recipe)
            config[section][field] = allowed[0]
            with pytest.raises(UserError, match=f"config.{name}=.*recipe='custom'"):
                make_method(config)
            config.loss.recipe = "custom"
            assert recipes.mixed(config) == []
