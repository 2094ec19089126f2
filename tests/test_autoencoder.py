"""The encoder, the autoencoder with its group, and models built from configs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny
from tiny_nets import (
    LATENT,
    assert_bfloat16_computes,
    assert_remat_changes_nothing,
    dit,
    encoder,
    fresh,
    inputs,
    quick_jit,
    random_params,
)

from efae_jax import groups
from efae_jax.errors import UserError
from efae_jax.models.build import build_flow_autoencoder, compute_dtype
from efae_jax.models.encoder import ResidualBlock, encoder_factor
from efae_jax.models.flow_autoencoder import FlowAutoencoder
from efae_jax.models.functional import Net

# ---- encoder


@pytest.mark.parametrize(
    ("stem", "widths", "factor"), [(4, (8,), 4), (2, (8, 8, 8), 8), (4, (8, 8, 16), 16)]
)
def test_encoder_gives_a_latent_image_or_their_mean_as_vector(stem, widths, factor):
    assert encoder_factor(stem, widths) == factor
    x = np.random.default_rng(0).standard_normal((2, 32, 48, 3)).astype(np.float32)
    spatial = encoder(stem=stem, widths=widths)
    params = random_params(spatial)
    z = quick_jit(spatial.__call__)(params, x)
    assert z.shape == (2, 32 // factor, 48 // factor, LATENT)
    assert np.std(z, axis=(1, 2)).min() > 0.01
    vector = quick_jit(encoder(stem=stem, widths=widths, vector=True).__call__)(params, x)
    np.testing.assert_allclose(vector, np.mean(z, axis=(1, 2)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("vector", [False, True])
def test_encoder_sees_the_mean_colour_of_each_image_alone(vector):
    net = encoder(vector=vector)
    run, params, (x, _, _) = jax.jit(net.__call__), random_params(net), inputs()
    other = x.copy()
    other[0] += 0.5
    before, after = run(params, x), run(params, other)
    assert np.std(after[0] - before[0]) > 0.05 * np.std(before[0])
    np.testing.assert_array_equal(after[1], before[1])


def test_encoder_names_the_sides_that_fit():
    net = encoder()
    with pytest.raises(ValueError, match="encoder: image 16x20, .* factor 8 .* multiples of 8"):
        jax.eval_shape(net, net.abstract, jnp.zeros((1, 16, 20, 3)))


def test_new_residual_blocks_are_the_identity():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
    block = Net(lambda rngs: ResidualBlock(8, dtype=jnp.float32, rngs=rngs))
    np.testing.assert_array_equal(fresh(block, x), x)


def test_encoder_rematerialises_and_computes_in_bfloat16():
    x, _, _ = inputs()
    assert_remat_changes_nothing(encoder, x, blocks=2)
    assert_bfloat16_computes(encoder, x)


# ---- autoencoder

D4 = groups.group("d4")


def autoencoder(spec="A1 + B1 + E", group=D4, **options):
    return FlowAutoencoder(encoder(), dit(), groups.representation(group, spec), **options)


def draw(model, seed=0):
    params = {
        "encoder": random_params(model.encoder, seed),
        "velocity": random_params(model.velocity_net, seed),
    }
    if model.learned:
        basis = np.random.default_rng(seed).standard_normal((LATENT, LATENT))
        params["basis"] = basis.astype(np.float32)
    return params


def test_clamp_limits_the_latent():
    free, clamped = autoencoder(), autoencoder(clamp=0.3)
    params, (x, _, _) = draw(free), inputs()
    z = jax.jit(free.encode)(params, x)
    assert np.abs(z).max() > 0.6
    np.testing.assert_array_equal(jax.jit(clamped.encode)(params, x), np.clip(z, -0.3, 0.3))


def test_the_group_acts_on_images_and_latents():
    model = autoencoder("3*trivial + sign_h", groups.group("z2xz2"))
    x, _, z = inputs()
    g_B = jnp.array([1, 2])  # h, v
    moved = model.act_image(g_B, x)
    np.testing.assert_array_equal(moved, np.stack([x[0, :, ::-1], x[1, ::-1]]))
    acted = model.act({}, g_B, z)
    signs = np.float32([1, 1, 1, -1])
    np.testing.assert_array_equal(acted, np.stack([z[0, :, ::-1] * signs, z[1, ::-1]]))


def test_decode_is_guided_euler_down_from_the_noise():
    model = autoencoder()
    params, (noise, _, z) = draw(model), inputs()
    decode = jax.jit(model.decode, static_argnames=("steps", "guidance", "trajectory"))
    image, states = decode(params, z, noise, steps=2, guidance=1.5, trajectory=True)

    velocity, x = jax.jit(model.velocity), noise
    by_hand = [x]
    for t in (1.0, 0.5):
        t_B = np.full(2, t, np.float32)
        null, conditional = velocity(params, x, t_B, 0 * z), velocity(params, x, t_B, z)
        x = x - 0.5 * (null + 1.5 * (conditional - null))
        by_hand.append(x)
    np.testing.assert_allclose(states, by_hand, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(image, states[-1])
    assert np.abs(by_hand[2] - by_hand[1]).max() > 0.1


@pytest.mark.parametrize("learned", ["cayley", "expm"])
def test_a_learned_representation_stays_one_through_gradient_steps(learned):
    model = autoencoder(learned=learned)
    params = draw(model)
    z = np.random.default_rng(3).standard_normal((8, 2, 2, LATENT)).astype(np.float32)
    wanted = np.random.default_rng(4).standard_normal(z.shape).astype(np.float32)

    @quick_jit
    def step(params):
        def loss(params):
            return jnp.mean((model.act(params, jnp.arange(8), z) - wanted) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        moved = params["basis"] - 0.5 * gradient["basis"]
        return value, {**params, "basis": moved}, model.matrices({**params, "basis": moved})

    losses, matrices = [], [model.matrices(params)]
    for _ in range(4):
        value, params, rho = step(params)
        losses.append(float(value))
        matrices.append(np.asarray(rho))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    assert np.abs(matrices[-1] - matrices[0]).max() > 0.01
    rho = matrices[-1]
    assert np.abs(rho - model.representation.matrices).max() > 0.1  # in a basis of its own
    for a in range(8):
        np.testing.assert_allclose(rho[a] @ rho[a].T, np.eye(LATENT), atol=1e-5)
        for b in range(8):
            np.testing.assert_allclose(rho[a] @ rho[b], rho[D4.table[a, b]], atol=1e-5)


def test_parameters_of_a_new_model_are_two_nets_and_a_basis_if_learned():
    key = jax.random.key(0)
    assert set(jax.eval_shape(autoencoder().init, key)) == {"encoder", "velocity"}
    shapes = jax.eval_shape(autoencoder(learned="cayley").init, key)
    assert shapes["basis"].shape == (LATENT, LATENT)


# ---- from configs


@pytest.mark.parametrize(
    ("overrides", "latent"),
    [
        ({}, (2, 2, 8)),
        ({"model__velocity__kind": "unet", "model__velocity__widths": (8, 16)}, (2, 2, 8)),
        ({"model__encoder__widths": (8, 8), "data__size": (16, 24)}, (2, 3, 8)),
        ({"model__encoder__vector": True}, (8,)),
        ({"model__encoder__vector": True, "model__velocity__kind": "unet"}, (8,)),
        ({"model__encoder__vector": True, "model__velocity__kind": "original",
          "model__velocity__width": 64}, (8,)),
        ({"model__encoder__kind": "original", "model__encoder__latent_channels": 256,
          "group__representation": "256*trivial", "data__size": (16, 16)}, (256,)),
    ],
)  # fmt: skip
def test_models_from_configs(overrides, latent):
    config = tiny(**overrides)
    model = build_flow_autoencoder(config)
    x = jnp.zeros((3, *config.data.size, 3))
    params = {"encoder": model.encoder.abstract, "velocity": model.velocity_net.abstract}
    z = jax.eval_shape(model.encode, params, x)
    assert z.shape == (3, *latent)
    assert jax.eval_shape(model.velocity, params, x, jnp.zeros(3), z).shape == x.shape


def test_options_from_configs():
    model = build_flow_autoencoder(tiny())
    assert (model.group.name, model.learned, model.clamp) == ("z2xz2", None, None)
    model = build_flow_autoencoder(tiny(group__learned="expm", latent__clamp=8.0))
    assert (model.learned, model.clamp) == ("expm", 8.0)
    assert compute_dtype("auto") == compute_dtype("float32") == jnp.float32  # on CPUs
    assert compute_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__encoder__kind": "vit"}, "kind='vit' is not one of conv, original"),
        ({"model__velocity__kind": "mlp"}, "kind='mlp' is not one of dit, unet, original"),
        ({"dtype": "float16"}, "config.dtype='float16' is not one of auto, float32, bfloat16"),
        ({"group__name": "so2"}, "'so2': allowed are trivial, z2_h"),
        ({"group__name": "c4", "group__representation": "8*trivial", "data__size": (8, 16)},
         "needs square images, but config.data.size is 8x16"),
        ({"group__representation": "4*trivial"}, "has 4 channels, but .* has 8; .* must be equal"),
        ({"model__encoder__kind": "original"}, "256 numbers, but latent_channels is 8"),
        ({"model__velocity__kind": "original"}, "takes a vector latent; set"),
        ({"model__velocity__patch": 3}, "patch .or stem. 3 and the latent's factor 4: one must"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(overrides, message):
    with pytest.raises((UserError, ValueError), match=message) as error:
        build_flow_autoencoder(tiny(**overrides))
    assert "\n" not in str(error.value)
