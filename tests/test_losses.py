"""Losses: golden numbers, closed forms, laws, and the normalised gradients on many devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efae_jax import losses
from efae_jax.sharding import batch_sharding, make_mesh, replicated

GOLDEN = ROOT.parent / "shared" / "fixtures" / "aura_losses.npz"
KINDS = ["elementwise", "global"]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nhwc(x):
    return np.transpose(x, (0, 2, 3, 1))


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers here")
def test_golden_numbers_of_the_published_program():
    with np.load(GOLDEN) as file:
        golden = {name: file[name] for name in file.files if not name.startswith("sd/")}
    a, b, z = (nhwc(golden[f"in/{name}"]) for name in "abz")
    logits = golden["in/real_logits"], golden["in/fake_logits"]
    ours = {
        "d_bce": losses.discriminator_loss(*logits, "bce", halved=True).mean(),
        "d_hinge": losses.discriminator_loss(*logits, "hinge", halved=True).mean(),
        "recon_pooled": losses.pooled_l1(a, b).mean(),
        "recon_heatmap": losses.heatmap_l1(a, b).mean(),
        "z_penalty": losses.latent_penalty(z).mean(),
        "blurriness_heatmap": losses.blurriness_heatmap(a).transpose(0, 3, 1, 2),
    }
    for name, value in ours.items():
        np.testing.assert_allclose(value, golden[f"out/{name}"], rtol=1e-5, err_msg=name)


# Gradients.


def pull(kind, x, cotangent, weight=1.0):
    """The gradient that comes back to x when `cotangent` arrives."""
    forward, back = jax.vjp(lambda x: losses.normalise_gradient(x, kind, weight), x)
    np.testing.assert_array_equal(forward, x)
    return back(jnp.asarray(cotangent))[0]


# Norms from far above the epsilon, as those of losses are.
gradients = hnp.arrays(
    np.float32,
    st.sampled_from([(1, 3), (4, 2, 3)]),
    elements=st.floats(-(2.0**20), 2.0**20, width=32).filter(lambda g: g == 0 or abs(g) > 1e-2),
)


@settings(deadline=None, max_examples=60)
@given(gradients, st.sampled_from([0.25, 1.0, 3.0]))
def test_elementwise_gradient_has_the_weight_as_norm_over_the_batch_at_every_element(g, weight):
    pulled = pull("elementwise", np.zeros_like(g), g, weight)
    norms = np.linalg.norm(pulled, axis=0)
    np.testing.assert_allclose(norms, weight * g.any(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(pulled), np.sign(g))


@settings(deadline=None, max_examples=60)
@given(gradients, st.sampled_from([0.25, 1.0, 3.0]))
def test_global_gradient_keeps_its_direction_and_has_the_weight_as_norm(g, weight):
    pulled = pull("global", np.zeros_like(g), g, weight)
    norm = np.linalg.norm(g.astype(np.float64)) or 1.0
    np.testing.assert_allclose(pulled, weight * g / norm, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(pulled), weight * g.any(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_gradient_is_that_of_finite_differences_divided_by_its_norm(kind):
    x, weight = normal(0, 4, 3, 2), 0.7

    def loss(x):
        return jnp.sum(jnp.sin(2 * x) * jnp.arange(1.0, 5.0)[:, None, None]) / 50

    step, rows = 1e-2, np.eye(x.size, dtype=np.float32).reshape(x.size, *x.shape)
    up, down = (jax.vmap(loss)(x + sign * step * rows) for sign in (1, -1))
    g = np.reshape((up - down) / (2 * step), x.shape)
    norm = np.sqrt(np.square(g).sum(axis=0 if kind == "elementwise" else None, keepdims=True))
    ours = jax.grad(lambda x: loss(losses.normalise_gradient(x, kind, weight)))(x)
    np.testing.assert_allclose(ours, weight * g / norm, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_two_losses_pulls_with_its_own_weight(kind):
    x, g1, g2 = normal(0, 3, 5), 1e-3 * normal(1, 3, 5), 1e3 * normal(2, 3, 5)

    def both(x, weight):
        first = losses.normalise_gradient(x, kind)
        second = losses.normalise_gradient(x, kind, weight)
        return jnp.sum(g1 * first) + jnp.sum(g2 * second)

    gradient, of_weight = jax.jit(jax.grad(both, argnums=(0, 1)))(x, 0.2)
    expected = pull(kind, x, g1) + 0.2 * pull(kind, x, g2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert of_weight == 0


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_stay_zero_and_those_near_the_epsilon_are_damped(kind):
    np.testing.assert_array_equal(pull(kind, normal(0, 3, 2), np.zeros((3, 2), np.float32)), 0)
    tiny = np.full((1, 1), 1e-8, np.float32)
    np.testing.assert_allclose(pull(kind, tiny, tiny), [[0.5]], rtol=1e-5)
    np.testing.assert_allclose(pull(kind, tiny, 1e-4 * tiny), [[1e-4]], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_16_bits_are_normalised_in_float32(kind, dtype):
    # In float16 the squares would be zero.
    g = jnp.full((4096, 1), 2.0**-13, dtype)
    pulled = pull(kind, jnp.ones_like(g), g)
    assert pulled.dtype == dtype
    np.testing.assert_allclose(pulled.astype(jnp.float32), 1 / 64, rtol=4e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_batch_split_over_eight_devices_is_that_of_one_device(kind):
    # Devices see gradients of very different sizes.
    x, scale = normal(0, 16, 6), np.repeat(10.0 ** np.arange(8), 2).astype(np.float32)[:, None]

    def loss(x, scale):
        return jnp.sum(scale * jnp.sin(losses.normalise_gradient(x, kind, 0.3)))

    one = jax.jit(jax.grad(loss))(x, scale)
    mesh = make_mesh(data=4, fsdp=2)
    split = batch_sharding(mesh)
    step = jax.jit(jax.grad(loss), in_shardings=(split, split), out_shardings=split)
    eight = step(*jax.device_put((x, scale), split))
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-8)
    whole = np.linalg.norm(eight, axis=0 if kind == "elementwise" else None)
    np.testing.assert_allclose(whole, 0.3, rtol=1e-5)


def test_gradient_of_shared_parameters_is_the_root_of_the_processes_times_the_originals():
    # Eight processes, each of two examples whose images depend on one shared vector.
    g = normal(0, 8, 2, 1000)
    ours = pull("global", np.zeros((16, 1000), np.float32), g.reshape(16, 1000)).sum(axis=0)
    local = np.stack([pull("global", np.zeros_like(one), one).sum(axis=0) for one in g])
    original = local.mean(axis=0)
    np.testing.assert_allclose(ours, np.sqrt(8) * original, rtol=0.1, atol=0.002)


def test_weight_may_change_from_step_to_step_without_compiling_anew():
    step = jax.jit(
        lambda x, w: jax.grad(lambda x: losses.normalise_gradient(x, "global", w).sum())(x)
    )
    x = normal(0, 4)
    for weight in (0.0, 1.0):
        np.testing.assert_allclose(step(x, weight), np.full(4, weight / 2), rtol=1e-6)
    assert step._cache_size() == 1


# Reconstruction.


def test_pooled_l1_sees_block_means_only():
    target, x = normal(0, 2, 32, 48, 3), normal(1, 2, 32, 48, 3)
    means = (target - x).reshape(2, 2, 16, 3, 16, 3).mean(axis=(2, 4), dtype=np.float64)
    expected = np.abs(means).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses.pooled_l1(target, x), expected, rtol=1e-5)
    flipped = x.reshape(2, 2, 16, 48, 3)[:, :, ::-1].reshape(x.shape)
    np.testing.assert_allclose(losses.pooled_l1(target, flipped), expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 24, 32, 3), (1, 32, 24, 3)])
def test_pooled_l1_names_the_sides_allowed(shape):
    with pytest.raises(ValueError, match="multiple of 16"):
        losses.pooled_l1(np.zeros(shape), np.zeros(shape))


def heatmap_by_scipy(x_BHWC):
    kernel = np.array(
        [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, -20, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]
    )
    maps = []
    for grey in x_BHWC.astype(np.float64).mean(axis=-1):
        edges = np.abs(scipy.ndimage.correlate(grey, kernel, mode="constant"))
        # truncate 3 makes 13 taps of sigma 2.
        maps.append(scipy.ndimage.gaussian_filter(edges, 2, mode="mirror", truncate=3))
    maps = np.stack(maps)[..., None]
    heat = 1 - (maps - maps.min()) / (maps.max() - maps.min())
    return np.where(heat < 0.8, 0, heat)


def test_heatmap_equals_scipy_filters():
    # Smooth in the first, rough in the second image: the scale is that of the batch.
    smooth = scipy.ndimage.gaussian_filter(normal(0, 1, 20, 28, 3), (0, 3, 3, 0))
    x = np.concatenate([smooth, normal(1, 1, 20, 28, 3) * np.linspace(0, 1, 28)[:, None] ** 3])
    x = x.astype(np.float32)
    expected = heatmap_by_scipy(x)
    assert 0.2 < (expected == 0).mean() < 0.8
    heat = jax.jit(losses.blurriness_heatmap)(x)
    assert heat.shape == (2, 20, 28, 1)
    # Where a value falls on the threshold rounding decides.
    near = np.isclose(np.where(expected == 0, heat, expected), 0.8, atol=1e-4)
    np.testing.assert_allclose(np.where(near, 0, heat), np.where(near, 0, expected), atol=1e-5)

    other = x + normal(2, *x.shape)
    weighted = losses.heatmap_l1(x, other)
    by_hand = (expected * np.abs(x - other)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(weighted, by_hand, rtol=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1e3]))
def test_heatmap_is_zero_or_from_four_fifths_to_one_and_does_not_see_contrast(seed, scale):
    x = normal(seed, 2, 9, 8, 1)
    x[:, :, :5] *= 0.01
    heat = np.asarray(losses.blurriness_heatmap(scale * x))
    assert heat.max() == 1
    assert np.all((heat == 0) | ((heat >= 0.8) & (heat <= 1)))
    np.testing.assert_allclose(
        losses.blurriness_heatmap(scale * x[:, ::-1])[:, ::-1], heat, atol=1e-5
    )


def test_heatmap_of_black_images_is_one_and_small_images_are_refused():
    np.testing.assert_array_equal(losses.blurriness_heatmap(np.zeros((2, 7, 9, 3))), 1)
    with pytest.raises(ValueError, match="6x9 .* at least 7"):
        losses.blurriness_heatmap(np.zeros((1, 6, 9, 3)))


def test_heatmap_gives_no_gradient_to_the_target():
    target, x = normal(0, 1, 8, 8, 1), normal(1, 1, 8, 8, 1)
    gradient = jax.grad(lambda t: losses.heatmap_l1(t, x).sum())(target)
    heat = losses.blurriness_heatmap(target)
    np.testing.assert_allclose(gradient, heat * np.sign(target - x) / target.size, rtol=1e-5)


def test_heatmap_of_a_batch_split_over_eight_devices_is_scaled_by_the_whole_batch():
    x = normal(0, 8, 8, 8, 3) * np.linspace(0.1, 1, 8, dtype=np.float32)[:, None, None, None]
    split = batch_sharding(make_mesh())
    sharded = jax.jit(losses.blurriness_heatmap)(jax.device_put(x, split))
    np.testing.assert_allclose(sharded, losses.blurriness_heatmap(x), atol=1e-6)


# Adversarial losses.

REAL = np.array([[2.0, -1.0], [0.5, 0.0]], np.float32)
FAKE = np.array([[-3.0, 1.0], [0.25, 2.0]], np.float32)


def test_discriminator_losses_of_known_logits():
    softplus = lambda x: np.log1p(np.exp(np.float64(x)))  # noqa: E731
    bce = (softplus(-REAL) + softplus(FAKE)).mean(axis=1)
    np.testing.assert_allclose(
        losses.discriminator_loss(REAL, FAKE, "bce", halved=False), bce, rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.discriminator_loss(REAL, FAKE, "bce", halved=True), bce / 2, rtol=1e-6
    )
    # max(0, 1-D(x)): 0 2, .5 1;  max(0, 1+D(x')): 0 2, 1.25 3
    hinge = losses.discriminator_loss(REAL, FAKE, "hinge", halved=False)
    np.testing.assert_allclose(hinge, [1 + 1, 0.75 + 2.125])
    maps = REAL.reshape(2, 2, 1), FAKE.reshape(2, 1, 2)
    np.testing.assert_allclose(losses.discriminator_loss(*maps, "hinge", halved=False), hinge)


def test_generator_losses_of_known_logits():
    # D(x) - D(x') - 0.1: 4.9 -2.1, 0.15 -2.1
    thresholded = losses.generator_loss(FAKE, "thresholded", REAL)
    np.testing.assert_allclose(thresholded, [4.9 / 2, 0.15 / 2], rtol=1e-6)
    np.testing.assert_allclose(losses.generator_loss(FAKE, "hinge"), [1, -1.125])
    bce = np.log1p(np.exp(-FAKE.astype(np.float64))).mean(axis=1)
    np.testing.assert_allclose(losses.generator_loss(FAKE, "bce"), bce, rtol=1e-6)


def test_thresholded_loss_has_no_gradient_for_the_logits_of_images():
    loss = lambda real, fake: losses.generator_loss(fake, "thresholded", real).sum()  # noqa: E731
    real, fake = jax.grad(loss, argnums=(0, 1))(REAL, FAKE)
    np.testing.assert_array_equal(real, 0)
    np.testing.assert_array_equal(fake, [[-0.5, 0], [-0.5, 0]])


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_bce_of_large_logits_is_finite(logit):
    x = np.full((1, 1), logit, np.float32)
    value = losses.discriminator_loss(x, x, "bce", halved=False)
    np.testing.assert_allclose(value, [200.0])
    assert np.isfinite(jax.grad(lambda x: losses.generator_loss(x, "bce").sum())(x)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.discriminator_loss(REAL, FAKE, "wgan", halved=False),
        lambda: losses.generator_loss(FAKE, "wgan"),
        lambda: losses.generator_loss(FAKE, "thresholded"),
        lambda: losses.normalise_gradient(REAL, "local"),
    ],
)
def test_mistakes_are_one_line(call):
    with pytest.raises(
        ValueError, match=r"does not exist; allowed: |needs the logits of the images"
    ):
        call()


def test_accuracy_counts_logits_on_their_side():
    np.testing.assert_allclose(losses.discriminator_accuracy(REAL, FAKE), [0.5, 0.25])


def test_lecam_measures_from_the_other_sides_anchor():
    anchors = {"real": jnp.float32(1.0), "fake": jnp.float32(-2.0)}
    # (D(x) + 2)^2: 16 1, 6.25 4;  (D(x') - 1)^2: 16 0, .5625 1
    np.testing.assert_allclose(
        losses.lecam(REAL, FAKE, anchors), [8.5 + 8, 5.125 + 0.78125], rtol=1e-6
    )


def test_anchors_are_moving_averages_of_the_mean_logits_without_gradient():
    anchors = {"real": jnp.float32(1.0), "fake": jnp.float32(-2.0)}
    moved = losses.update_anchors(anchors, REAL, FAKE)
    np.testing.assert_allclose(moved["real"], 0.9 * 1 + 0.1 * 0.375, rtol=1e-6)
    np.testing.assert_allclose(moved["fake"], 0.9 * -2 + 0.1 * 0.0625, rtol=1e-6)
    gradient = jax.grad(lambda real: losses.update_anchors(anchors, real, FAKE)["real"])(REAL)
    np.testing.assert_array_equal(gradient, 0)


# Latents.


def test_latent_penalty_is_per_example():
    z = np.stack([np.full((2, 3, 1), 2.0), np.full((2, 3, 1), -3.0)]).astype(np.float32)
    np.testing.assert_allclose(losses.latent_penalty(z), [4, 9])
    half = losses.latent_penalty(jnp.full((1, 300), 256.0, jnp.float16))
    np.testing.assert_allclose(half, [65536])  # beyond float16


def test_latent_statistics_equal_scipy():
    z = np.exp(normal(0, 3, 4, 5, 2)) + 7
    ours = jax.jit(losses.latent_statistics)(z)
    assert sorted(ours) == sorted(
        [f"quantile_{q}" for q in ("0", "0.01", "0.25", "0.5", "0.75", "0.99", "1")]
        + ["mean_abs", "skewness", "kurtosis"]
    )
    for name, value in ours.items():
        if name.startswith("quantile"):
            expected = np.quantile(z, float(name.removeprefix("quantile_")))
            np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)
    flat = z.reshape(-1).astype(np.float64)
    np.testing.assert_allclose(ours["skewness"], scipy.stats.skew(flat), rtol=1e-4)
    np.testing.assert_allclose(
        ours["kurtosis"], scipy.stats.kurtosis(flat, fisher=False), rtol=1e-4
    )
    np.testing.assert_allclose(losses.latent_statistics(-z)["mean_abs"], flat.mean(), rtol=1e-5)


def test_latent_statistics_of_a_normal_a_constant_and_a_split_batch():
    z = normal(0, 8, 4000)
    ours = losses.latent_statistics(z)
    np.testing.assert_allclose(ours["kurtosis"], 3, atol=0.15)
    constant = losses.latent_statistics(np.full((2, 5), 3.0, np.float32))
    assert constant["kurtosis"] == constant["skewness"] == 0
    mesh = make_mesh()
    split = jax.jit(losses.latent_statistics, out_shardings=replicated(mesh))(
        jax.device_put(z, batch_sharding(mesh))
    )
    for name, value in ours.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
