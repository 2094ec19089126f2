"""The convolutional autoencoders' interface: posterior, units, sides, padding, types, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from tiny_nets import quick_jit

from configs.pretrained import KINDS, get_config
from efae_jax.errors import UserError
from efae_jax.models.build import build_autoencoder
from efae_jax.models.conv_autoencoder import shrink
from efae_jax.models.conv_blocks import GroupNorm, local_statistics
from efae_jax.models.functional import Net
from efae_jax.models.latent import Normalisation, Posterior
from efae_jax.models.wavelet import HIGH, LOW, wavelet

GOLDEN = ROOT.parent / "shared" / "fixtures" / "aura_losses.npz"
SIDES = (16, 24)  # not square


def small(kind="kl", **fields):
    config = get_config(kind)
    with config.unlocked():
        config.dtype = "float32"
        config.data.size = SIDES
        config.model.widths = (8, 16)
        config.model.blocks = 1
        config.model.latent_channels = 4
        config.model.norm_groups = 4
        config.model.attention = kind == "kl"
        config.group.representation = ""
        for name, value in fields.items():
            place = config
            *parents, last = name.split("__")
            for parent in parents:
                place = place[parent]
            place[last] = value
    return config


def draw(model, seed=0):
    """Parameters of which none is zero, so that no block is the identity."""
    random = np.random.default_rng(seed)

    def one(path, leaf):
        draw = random.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.2 * draw
        fan_in = max(np.prod(leaf.shape[:-1]), 1) if leaf.ndim > 1 else 100
        return draw / np.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


@functools.cache
def model_of(kind="kl", **fields):
    model = build_autoencoder(small(kind, **fields))
    return model, draw(model)


def images(sides=SIDES, batch=2, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, *sides, 3)).astype(np.float32)


def run(model, params, x):
    return quick_jit(lambda p, x: (model.posterior(p, x), model.decode(p, model.encode(p, x))))(
        params, x
    )


# --- posterior ------------------------------------------------------------------------------


def test_kl_is_its_closed_form_and_an_average_over_samples():
    mean, log_variance = jnp.array([0.5, -1.0]), jnp.array([-0.3, 0.8])
    posterior = Posterior(mean.reshape(1, 1, 1, 2), log_variance.reshape(1, 1, 1, 2))
    keys = jax.random.split(jax.random.key(0), 40_000)
    z = jax.vmap(posterior.sample)(keys)[:, 0, 0, 0]
    std = jnp.exp(0.5 * log_variance)
    np.testing.assert_allclose(z.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(z.std(0), std, rtol=0.02)
    log_ratio = 0.5 * (z**2 - ((z - mean) / std) ** 2) - jnp.log(std)
    assert posterior.kl()[0] == pytest.approx(float(log_ratio.sum(-1).mean()), abs=0.03)


def test_log_variances_are_limited():
    posterior = Posterior.from_moments(jnp.array([1.0, 2.0, -99.0, 99.0]).reshape(1, 1, 1, 4))
    np.testing.assert_array_equal(posterior.mean[0, 0, 0], [1, 2])
    np.testing.assert_array_equal(posterior.log_variance[0, 0, 0], [-30, 20])


def test_a_deterministic_posterior_is_its_mean():
    posterior = Posterior(jnp.ones((1, 2, 2, 3)))
    np.testing.assert_array_equal(posterior.sample(jax.random.key(0)), posterior.mean)
    with pytest.raises(ValueError, match="deterministic"):
        posterior.kl()


# --- units ----------------------------------------------------------------------------------


@given(
    scaling=st.floats(0.01, 10),
    shift=st.floats(-3, 3),
    per_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_normalise_and_back(scaling, shift, per_channel, seed):
    random = np.random.default_rng(seed)
    z = random.standard_normal((2, 3, 3, 4)).astype(np.float32)
    mean, std = random.standard_normal(4), random.uniform(0.1, 3, 4)
    if per_channel:
        units = Normalisation(scaling, mean=tuple(mean), std=tuple(std))
        expected = (z - mean) / std * scaling
    else:
        units = Normalisation(scaling, shift)
        expected = (z - shift) * scaling
    np.testing.assert_allclose(units.normalise(z), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(units.denormalise(units.normalise(z)), z, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling": 0.0}, "positive"),
        ({"mean": (1.0,), "std": (0.0,)}, "positive"),
        ({"mean": (1.0,)}, "1 means but 0"),
        ({"mean": (1.0,), "std": (1.0,), "shift": 0.1}, "exclude"),
    ],
)
def test_units_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Normalisation(**fields)


def test_the_units_travel_with_the_model():
    model, _ = model_of(latent__scaling=0.5, latent__shift=1.0)
    np.testing.assert_allclose(model.normalise(np.full(4, 3.0)), 1.0)
    with pytest.raises(ValueError, match="2 means for 4 latent channels"):
        model_of(latent__mean=(0.0, 0.0), latent__std=(1.0, 1.0))


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "aura"])
def test_shapes_and_types(kind):
    model, params = model_of(kind)
    posterior, decoded = run(model, params, images())
    assert posterior.mean.shape == (2, 8, 12, 4)
    assert (posterior.log_variance is None) == (kind == "aura")
    assert decoded.shape == (2, *SIDES, 3)
    assert decoded.dtype == posterior.mean.dtype == jnp.float32


def test_clamped_latents():
    model, params = model_of("aura", latent__clamp=0.5)
    free, _ = model_of("aura")
    z, unclamped = (quick_jit(m.encode)(params, images()) for m in (model, free))
    assert np.abs(unclamped).max() > 0.6
    np.testing.assert_allclose(z, np.clip(unclamped, -0.5, 0.5), atol=1e-5)


def test_sides_that_do_not_fit_are_named():
    model, params = model_of()
    with pytest.raises(ValueError, match="image 16x25, but the factor 2 .* nearest are 16x24"):
        model.encode(params, images((16, 25)))


def test_every_parameter_matters():
    """No part of the tree is left unused, and gradients reach all of it."""
    for kind, fields in (
        ("kl", {}),
        ("aura", {"model__attention": True, "model__widths": (8, 64)}),
    ):
        model, _ = model_of(kind, **fields)
        params = draw(model)

        def loss(p, model=model):
            posterior = model.posterior(p, images())
            spread = 0.0 if posterior.log_variance is None else posterior.log_variance.sum()
            return jnp.sum(model.decode(p, posterior.mean) ** 2) + spread

        gradient = quick_jit(jax.grad(loss))(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            name = jax.tree_util.keystr(path)
            # A softmax does not see a constant added to all its scores.
            if "'key'" not in name or "'bias'" not in name:
                assert np.abs(leaf).max() > 1e-6, name


def test_blocks_start_near_the_identity():
    model = build_autoencoder(small("aura", model__attention=True, model__widths=(8, 64)))
    params = jax.jit(model.init)(jax.random.key(0))
    middle = params["encoder"]["middle"]
    assert np.std(middle["block1"]["conv2"]["kernel"]) == pytest.approx(1e-4 / 64, rel=0.05)
    assert np.std(middle["attention"]["out"]["kernel"]) == pytest.approx(0.2 / 8, rel=0.05)
    assert set(middle["attention"]) == {"norm", "qkv", "out"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not np.any(leaf), path


def test_rematerialisation_changes_nothing():
    plain, params = model_of()
    remat, _ = model_of(train__remat=True)

    def loss(model, p):
        return jnp.mean(jnp.square(model.decode(p, model.encode(p, images()))))

    a, b = (quick_jit(jax.grad(functools.partial(loss, m)))(params) for m in (plain, remat))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b)
    text = str(jax.make_jaxpr(functools.partial(loss, remat))(params))
    assert "checkpoint" in text or "remat" in text


def test_reflect_padding_mirrors_the_border_and_leaves_the_interior():
    """The first convolution under both paddings; at the border the mirrored image decides."""
    zeros, params = model_of()
    reflect, _ = model_of(model__padding="reflect")
    x = images()
    kernel, bias = params["encoder"]["conv_in"]["kernel"], params["encoder"]["conv_in"]["bias"]
    mirrored = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = jax.lax.conv_general_dilated(
        mirrored, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def first(model):
        net = Net(model.encoder._build)
        return net(params["encoder"], x, method="conv_in")

    np.testing.assert_allclose(first(reflect), expected + bias, atol=1e-5)
    interior = (slice(None), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(first(zeros)[interior], first(reflect)[interior], atol=1e-5)
    assert np.abs(first(zeros) - first(reflect)).max() > 0.1
    a, b = (
        quick_jit(m.decode)(params, np.ones((1, 8, 12, 4), np.float32)) for m in (zeros, reflect)
    )
    assert np.abs(a - b).max() > 1e-2


def test_bfloat16_keeps_float32_parameters_and_norms():
    model, params = model_of(dtype="bfloat16")
    exact, _ = model_of()
    (z, x), (z16, x16) = (run(m, params, images()) for m in (exact, model))
    assert z16.mean.dtype == x16.dtype == jnp.float32
    for a, b in ((z.mean, z16.mean), (x, x16)):
        error = np.abs(a - b).max() / np.abs(a).max()
        assert 1e-4 < error < 0.05  # it is computed in bfloat16, and still close
    kernels = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    assert all(leaf.dtype == jnp.float32 for leaf in kernels)


def test_group_norm_is_float32_and_exact_far_from_zero():
    norm = Net(lambda rngs: GroupNorm(8, groups=2))
    random = np.random.default_rng(0)
    x = (1000 + random.standard_normal((2, 5, 6, 8))).astype(np.float32)
    params = {"scale": np.arange(1.0, 9), "bias": np.arange(8.0)}
    got = norm(params, x)
    grouped = rearrange(x.astype(np.float64), "b h w (g c) -> b g (h w c)", g=2)
    normed = (grouped - grouped.mean(-1, keepdims=True)) / grouped.std(-1, keepdims=True)
    normed = rearrange(normed, "b g (h w c) -> b h w (g c)", h=5, w=6)
    np.testing.assert_allclose(got, normed * params["scale"] + params["bias"], atol=5e-3)
    assert norm(params, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(ValueError, match="10 channels cannot be split into 4 groups"):
        Net(lambda rngs: GroupNorm(10, groups=4))


def test_statistics_from_outside_replace_those_of_the_image():
    norm = Net(lambda rngs: GroupNorm(4, groups=2))
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    whole = images((6, 6))[..., :1].repeat(4, -1) * np.arange(1, 5, dtype=np.float32)
    part = whole[:, :3]
    given = local_statistics(whole, 2)
    got = norm(params, part, lambda x, groups: given)
    np.testing.assert_allclose(got, norm(params, whole)[:, :3], atol=1e-5)
    assert np.abs(got - norm(params, part)).max() > 0.05


def test_the_wavelet_of_a_constant_is_its_low_pass():
    x = np.ones((1, 12, 12, 2), np.float32) * np.array([1.0, -2.0], np.float32)
    y = np.asarray(wavelet(x))
    assert y.shape == (1, 6, 6, 8)
    inner = y[0, 2:-2, 2:-2]
    low, high = sum(LOW), sum(HIGH)  # the latter is 1e-4: the taps are rounded
    one = np.array([low * low, low * high, high * low, high * high])
    expected = np.concatenate([one, -2 * one])
    np.testing.assert_allclose(inner, np.broadcast_to(expected, inner.shape), atol=1e-5)


def test_the_wavelets_letters_are_width_then_height():
    """A vertical edge has high frequencies along the width: filter hl, not lh."""
    x = np.zeros((1, 12, 12, 1), np.float32)
    x[:, :, 7:] = 1
    energy = np.square(np.asarray(wavelet(x))[0, 2:-2]).sum((0, 1))
    assert energy[2] > 100 * energy[1]


@pytest.mark.skipif(not GOLDEN.exists(), reason="the original's numbers are not here")
def test_the_wavelet_is_the_originals():
    with np.load(GOLDEN) as file:
        x, expected = (rearrange(file[n], "b c h w -> b h w c") for n in ("in/a", "out/wavelet"))
    np.testing.assert_allclose(wavelet(x), expected, atol=1e-5 * np.abs(expected).max())


def test_shrink_is_the_mean_of_blocks():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(shrink(x, 2)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])
    with pytest.raises(ValueError, match="4x4 cannot be shrunk by 3"):
        shrink(x, 3)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("kl", {"model__kind": "vq"}, "flow, kl, aura, taesd"),
        ("kl", {"model__padding": "circular"}, "zeros, reflect"),
        ("kl", {"model__widths": ()}, "at least 1"),
        ("kl", {"model__norm_eps": 0.0}, "norm_eps=0.0 positive"),
        ("kl", {"group__representation": "3*trivial"}, "the latent has 4"),
        ("kl", {"latent__clamp": -1.0}, "config.latent.clamp=-1.0"),
        ("kl", {"group__name": "d4"}, "square"),
        ("aura", {"model__attention": True}, "16 channels cannot be split into heads of 64"),
        ("aura", {"model__widths": (8,), "model__wavelet": True}, "a wavelet at least two"),
        ("kl", {"model__decoder_widths": (8,)}, "at least as many levels"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, fields, message):
    with pytest.raises((UserError, ValueError), match=message) as error:
        build_autoencoder(small(kind, **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_model_is_read(kind):
    config = get_config(kind)
    seen = set()

    class Spy:
        def __init__(self, part, path):
            self.__dict__.update(_part=part, _path=path)

        def __getattr__(self, name):
            value = getattr(self._part, name)
            if hasattr(value, "to_json_best_effort"):
                return Spy(value, f"{self._path}{name}.")
            seen.add(f"{self._path}{name}")
            return value

    build_autoencoder(Spy(config, ""))
    of_the_record = {"model.source", "model.stored", "model.missing"}
    for part in ("model", "group", "latent"):
        assert {f"{part}.{name}" for name in config[part]} - seen - of_the_record == set()
