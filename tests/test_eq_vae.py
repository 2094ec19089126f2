"""EQ-VAE's step: latent-diffusion's loss, the branches, what a step compares with what."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_discriminators import read_patchgan
from test_lpips import needs_weights
from tiny import tiny_eq
from tiny_nets import random_params
from weights import SHARED, needs, nhwc

from efae_jax import convert, groups, losses
from efae_jax.convert.perceptual import read_lpips
from efae_jax.errors import UserError
from efae_jax.methods import eq_vae, make_method
from efae_jax.methods.base import Context, to_float
from efae_jax.models.latent import Posterior

KEYS = jax.random.split(jax.random.key(3), 4)


def pixels(size, count=4, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, *size, channels), np.uint8)


def prepared(config, seed=0):
    """(method, params) with random parameters, all of them alive."""
    method = make_method(config)
    model = method.autoencoder
    own = {"encoder": random_params(model.encoder), "decoder": random_params(model.decoder)}
    params = jax.jit(method.init)(jax.random.key(seed)) | {"autoencoder": own}
    return method, params


def context(method, plan, step=7, passed=None, frozen=None):
    return Context(jnp.asarray(step), method.init_variables(), passed or {}, frozen or {}, plan)


# Latent-diffusion's numbers.


@needs("fixtures/ldm_loss.npz")
@needs("fixtures/ldm_autoencoder_kl.npz")
@needs_weights
def test_golden_numbers_of_ldms_loss(monkeypatch):
    with np.load(SHARED / "fixtures" / "ldm_loss.npz") as file:
        arrays = dict(file)
    numbers = {k: float(v) for k, v in arrays.items() if v.ndim == 0}
    read = convert.read_model(SHARED / "fixtures" / "ldm_autoencoder_kl.npz")
    config = tiny_eq(data__size=(64, 64), loss__lpips=1.0, loss__gan=0.5, loss__learn_logvar=True)
    with config.unlocked():
        config.model = read.config.model
    method = make_method(config)
    discriminator, statistics = read_patchgan(arrays)
    params = {
        "autoencoder": read.params,
        "discriminator": discriminator,
        "logvar": {"value": jnp.float32(0)},
    }
    frozen = {"lpips": read_lpips("vgg")}
    # The original's latent is the mode here, and its images are no bytes.
    monkeypatch.setattr(Posterior, "sample_each", lambda self, keys: self.mean)
    monkeypatch.setattr(eq_vae, "to_float", lambda image: image)
    batch = {"image": jnp.asarray(nhwc(arrays["in/x"]))}
    plan = eq_vae.Plan("plain", *method.whole)

    def both(params, batch):
        start = Context(jnp.int32(0), {"discriminator": statistics}, {}, frozen, plan)
        one = method.loss("autoencoder", params, batch, KEYS[:2], start)
        then = Context(jnp.int32(0), one.variables, one.passed, frozen, plan)
        two = method.loss("discriminator", params, batch, KEYS[:2], then)
        three = method.loss("logvar", params, batch, KEYS[:2], then)
        return jax.tree.map(jnp.mean, (one[:2], two[:2], three[:2])), one.passed["decoded"]

    (one, two, three), decoded = jax.jit(both)(params, batch)
    np.testing.assert_allclose(decoded, nhwc(arrays["out/recon"]), atol=1e-4)
    metrics = one[1]
    for ours, theirs in (
        (one[0], "generator_total"),
        (metrics["nll"], "nll_loss"),
        (metrics["reconstruction"], "rec_loss"),
        (metrics["kl"], "kl_loss"),
        (metrics["weight"], "d_weight"),
        (metrics["gan"], "g_loss"),
        (two[0], "discriminator_total"),
        (two[0], "disc_loss"),
        (two[1]["logit_real"], "logits_real"),
        (two[1]["logit_fake"], "logits_fake"),
        (three[0], "nll_loss"),
    ):
        np.testing.assert_allclose(ours, numbers[f"out/{theirs}"], rtol=1e-4, err_msg=theirs)


def test_the_gradient_is_that_of_the_weighted_sum():
    """However it is put together: against one plain expression, its weight a constant."""
    config = tiny_eq(data__size=(24, 24), loss__gan=0.5, loss__logvar=0.3, loss__kl=0.1)
    method, params = prepared(config)
    model, batch = method.autoencoder, {"image": pixels((24, 24))}
    plan = eq_vae.Plan("plain", *method.whole)
    sample_keys = jax.vmap(lambda k: jax.random.split(k, 2)[0])(KEYS)

    def ours(own):
        every = params | {"autoencoder": own}
        outcome = method.loss("autoencoder", every, batch, KEYS, context(method, plan))
        return outcome.loss_B.mean(), outcome.metrics["weight"].mean()

    def terms(own):
        x = to_float(batch["image"])
        posterior = model.posterior(own, x)
        decoded = model.decode(own, posterior.sample_each(sample_keys))
        logits, _ = method.discriminator(
            params["discriminator"],
            decoded,
            method.init_variables()["discriminator"],
            training=True,
        )
        nll = (jnp.abs(x - decoded) * jnp.exp(-0.3) + 0.3).sum() / len(x)
        return nll, -logits.mean(), 0.1 * posterior.kl().mean()

    def expected(own):
        def last(kernel, i):
            conv = own["decoder"]["conv_out"] | {"kernel": kernel}
            return terms(own | {"decoder": own["decoder"] | {"conv_out": conv}})[i]

        kernel = own["decoder"]["conv_out"]["kernel"]
        norms = [jnp.linalg.norm(jax.grad(last)(kernel, i)) for i in (0, 1)]
        weight = jax.lax.stop_gradient(0.5 * norms[0] / (norms[1] + 1e-4))
        nll, gan, kl = terms(own)
        return nll + kl + weight * gan, weight

    own = params["autoencoder"]
    results = [jax.jit(jax.value_and_grad(f, has_aux=True))(own) for f in (ours, expected)]
    ((value, weight), gradient), ((value_2, weight_2), gradient_2) = results
    np.testing.assert_allclose(value, value_2, rtol=1e-5)
    np.testing.assert_allclose(weight, weight_2, rtol=1e-3)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient_2))
    assert largest > 1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(gradient_2), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest, err_msg=str(path))


def test_the_weight_is_bounded_and_a_vanishing_gradient_gives_no_nan():
    weight = losses.adaptive_weight
    assert weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])) == pytest.approx(5 / 2.0001)
    assert weight(jnp.ones(3), jnp.zeros(3)) == 1e4
    assert weight(jnp.zeros(3), jnp.zeros(3)) == 0


def test_before_its_start_the_discriminator_has_no_say():
    config = tiny_eq(data__size=(24, 24), loss__gan=0.5, loss__gan_start=5)
    method, params = prepared(config)
    batch, plan = {"image": pixels((24, 24))}, eq_vae.Plan("plain", *method.whole)

    @jax.jit
    def at(step):
        now = context(method, plan, step)
        one = method.loss("autoencoder", params, batch, KEYS, now)
        then = context(method, plan, step, one.passed)
        return one, method.loss("discriminator", params, batch, KEYS, then)

    (early, silent), (late, speaks) = at(4), at(5)
    np.testing.assert_allclose(early.loss_B, early.metrics["nll"] + 1e-6 * early.metrics["kl"])
    assert not np.any(silent.loss_B)
    assert np.all(speaks.loss_B > 0)
    gan = late.metrics["weight"] * late.metrics["gan"]
    np.testing.assert_allclose(late.loss_B - early.loss_B, gan, rtol=1e-3, atol=1e-2)


# The branches.


def test_latents_and_targets_are_transformed_alike(monkeypatch):
    """With the identity for an encoder, s g z is s g x, whatever s and g are."""
    method = make_method(tiny_eq(model__latent_channels=3))
    model, c4 = method.autoencoder, method.autoencoder.group
    monkeypatch.setattr(model, "posterior", lambda own, x: Posterior(x, jnp.full(x.shape, -30.0)))
    monkeypatch.setattr(model, "factor", 1)
    keys, images = jax.random.split(jax.random.key(0), 64), pixels((8, 8), 64)
    x = to_float(images)
    transformed = jax.jit(method._transformed, static_argnums=3)
    for plan in (eq_vae.Plan("equivariance", 8, 8), eq_vae.Plan("equivariance", 3, 5)):
        encoded, z, _, target = transformed({}, {"image": images}, keys, plan)
        np.testing.assert_allclose(encoded, x, atol=1e-6)
        assert target.shape == (64, plan.height, plan.width, 3)
        np.testing.assert_allclose(target, z, atol=1e-5)
        if plan.height == 8:  # every rotation but the identity comes up
            seen = {
                name: int(np.isclose(groups.act_image(c4, np.full(64, g), x), target, atol=1e-5)
                          .all((1, 2, 3)).sum())
                for g, name in enumerate(c4.elements)
            }  # fmt: skip
            assert seen["e"] == 0
            assert sum(seen.values()) == 64
            assert min(seen[g] for g in ("r90", "r180", "r270")) >= 10
    encoded, z, _, target = transformed({}, {"image": images}, keys, eq_vae.Plan("prior", 4, 4))
    for image in (encoded, target):
        np.testing.assert_allclose(image, groups.scale(x, (4, 4)), atol=1e-5)
    np.testing.assert_allclose(z, target, atol=1e-5)


def test_the_branches_come_up_as_often_as_they_should():
    config = tiny_eq(data__size=(64, 64), eq__p_prior=0.4, eq__p_prior_s=0.25, eq__min_scale=0.25)
    method = make_method(config)
    assert method.whole == (32, 32)
    plans = [method.plan(step) for step in range(4000)]
    shares = Counter(plan.branch for plan in plans)
    for branch, share in (("equivariance", 0.6), ("prior", 0.1), ("plain", 0.3)):
        assert shares[branch] / 4000 == pytest.approx(share, abs=0.03)
    assert {p.height for p in plans if p.branch == "equivariance"} == set(range(8, 32))
    assert {p.height for p in plans if p.branch == "prior"} == set(range(8, 32))
    assert all(p.height == p.width for p in plans)
    assert set(plans) == set(method.plans())
    assert len(method.plans()) == 24 + 24 + 1
    assert {p.height for p in method.plans_to_check()} == {8, 32}
    # They follow from seed and step.
    again = make_method(config)
    assert [again.plan(step) for step in range(3990, 4000)] == plans[-10:]
    other = make_method(tiny_eq(data__size=(64, 64), seed=1))
    assert [other.plan(step) for step in range(100)] != plans[:100]


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({"uniform_sample_scale": False}, {8, 16, 24}),
        ({"scale_buckets": 4}, {8, 16, 23, 31}),
        ({"scale_buckets": 1}, {20}),
        ({"min_scale": 0.9}, {29, 30, 31}),
        ({"min_scale": 1}, {32}),
    ],
)
def test_the_scales_to_choose_from(options, sides):
    options = {"min_scale": 0.25} | options
    config = tiny_eq(data__size=(64, 64), **{f"eq__{k}": v for k, v in options.items()})
    method = make_method(config)
    assert {p.height for p in method.plans() if p.branch == "equivariance"} == sides
    plans = {method.plan(step) for step in range(500)}
    assert plans == set(method.plans())


def test_anisotropic_scales_are_drawn_per_axis_and_only_there():
    config = tiny_eq(eq__anisotropic=True, eq__min_scale=0.25)
    method = make_method(config)
    plans = {method.plan(step) for step in range(300)}
    equivariant = {p[1:] for p in plans if p.branch == "equivariance"}
    assert equivariant == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}
    assert all(p.height == p.width for p in plans if p.branch == "prior")
    assert plans == set(method.plans())


def test_sides_that_are_not_equal_keep_their_ratio():
    config = tiny_eq(data__size=(8, 16), group__name="z2xz2", eq__min_scale=0.25)
    method = make_method(config)
    assert {p[1:] for p in method.plans()} == {(1, 2), (2, 4), (3, 6), (4, 8)}


def test_the_scale_regulariser_adds_the_loss_of_decoded_scaled_latents():
    config = tiny_eq(regulariser="scale", scale__weight=0.25, loss__logvar=0.5)
    method, params = prepared(config)
    assert {method.plan(step) for step in range(30)} == set(method.plans())
    assert set(method.plans()) == {eq_vae.Plan("scale", 1, 1), eq_vae.Plan("scale", 2, 2)}
    batch, plan = {"image": pixels((8, 8))}, eq_vae.Plan("scale", 2, 2)
    one = jax.jit(lambda p: method.loss("autoencoder", p, batch, KEYS, context(method, plan)))(
        params
    )
    plain = method.loss(
        "autoencoder", params, batch, KEYS, context(method, eq_vae.Plan("plain", 4, 4))
    )
    own, x = params["autoencoder"], to_float(batch["image"])
    keys = jax.vmap(lambda k: jax.random.split(k, 2)[0])(KEYS)
    z = method.autoencoder.posterior(own, x).sample_each(keys)
    small = method.autoencoder.decode(own, groups.scale(z, (2, 2)))
    error_B = jnp.abs(groups.scale(x, (4, 4)) - small).mean(axis=(1, 2, 3))
    # Per number of an image, so that the weight compares with the whole image's loss.
    expected = 0.25 * 8 * 8 * 3 * error_B * np.exp(-0.5)
    np.testing.assert_allclose(one.loss_B - plain.loss_B, expected, rtol=1e-3)
    gradient = jax.grad(
        lambda own: (
            method.loss(
                "autoencoder", params | {"autoencoder": own}, batch, KEYS, context(method, plan)
            )
            .metrics["scaled"]
            .mean()
        )
    )(own)
    assert float(jnp.abs(gradient["encoder"]["conv_in"]["kernel"]).max()) > 0


def test_logvar_learns_the_logarithm_of_the_error():
    config = tiny_eq(loss__learn_logvar=True)
    method, params = prepared(config)
    assert method.players == ("autoencoder", "logvar")
    plan, error = eq_vae.Plan("plain", 4, 4), jnp.full(4, 8 * 8 * 3 * 0.2)
    at = context(method, plan, passed={"error": error})
    slope = jax.grad(
        lambda v: method.loss("logvar", params | {"logvar": {"value": v}}, {}, KEYS, at)
        .loss_B.mean()
    )  # fmt: skip
    assert abs(slope(jnp.log(0.2))) < 1e-3
    assert slope(jnp.log(0.3)) > 1
    assert slope(jnp.log(0.1)) < -1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"regulariser": "ec"}, "config.regulariser='ec' is not one of eq, scale, none"),
        ({"resampling": "area"}, "config.resampling='area' is not one of bilinear"),
        ({"eq__p_prior": 1.5}, "config.eq.p_prior=1.5 must be from 0 to 1"),
        ({"eq__min_scale": 0.0}, "config.eq.min_scale=0.0 must be above 0"),
        ({"loss__kl": -1.0}, "config.loss.kl=-1.0 must be at least 0"),
        ({"data__size": (9, 9)}, "multiples of the encoder's factor 2"),
        ({"scale__factors": (3,), "regulariser": "scale"}, "config.scale.factors=(3,)"),
        ({"scale__factors": (2.5,), "regulariser": "scale"}, "config.scale.factors=(2.5,)"),
        ({"group__name": "trivial", "eq__min_scale": 1.0}, "transforms nothing"),
        ({"data__size": (2, 2)}, "has no smaller side"),
        ({"model__decoder_widths": (4, 8, 8), "data__size": (16, 16)}, "decoder"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message):
    with pytest.raises((UserError, ValueError)) as error:
        make_method(tiny_eq(**overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
