"""The original's networks: golden numbers, gradients, initial values, types, errors."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from original_model import ARCHITECTURE, random_inputs, random_params
from tiny_nets import operations

from efae_jax import flow, groups, sampling
from efae_jax.convert import efae, sources
from efae_jax.models.functional import Net
from efae_jax.models.original import OriginalDiT, OriginalEncoder, rotary, time_features

GOLDEN = Path(__file__).parents[2] / "shared" / "fixtures" / "efae_mnist.npz"
ONE_BLOCK = ARCHITECTURE | {"depth": 1}
SIZES = {key: ONE_BLOCK[key] for key in efae.NETWORK_KEYS}


def dit(**changes):
    return Net(lambda rngs: OriginalDiT(**(SIZES | changes), rngs=rngs))


def nhwc(x):
    return np.transpose(x, (0, 2, 3, 1))


def assert_close(ours, golden):
    assert ours.shape == golden.shape
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-4 * np.abs(golden).max())


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers here")
def test_golden_numbers_of_the_published_program():
    architecture, params = efae.from_source(sources.read_source(GOLDEN), 4)
    nets = efae.nets(architecture)
    with np.load(GOLDEN) as file:
        golden = {k: v for k, v in file.items() if not k.startswith("sd/")}
    x, noise = nhwc(golden["in/x"]), nhwc(golden["in/noise"])

    z = jax.jit(nets["encoder"])(params["encoder"], x)
    assert_close(z, golden["out/latent"])

    group = groups.group(architecture["group"])
    rho = groups.representation(group, architecture["representation"])
    flipped = groups.act_latent(group, rho.matrices, jnp.array([1, 1]), z)
    assert_close(flipped, golden["out/latent_flip_h"])

    velocity = jax.jit(nets["velocity"].__call__)
    v = velocity(params["velocity"], x, golden["in/t"], z)
    assert_close(v, nhwc(golden["out/velocity"]))

    field = flow.guided(lambda *xtz: velocity(params["velocity"], *xtz), z, 2.0)
    assert_close(sampling.sample(field, noise, 4), nhwc(golden["out/sample_steps4_cfg2"]))


def test_new_transformer_predicts_zero_because_modulations_and_head_start_at_zero():
    net = dit()
    params = jax.jit(net.init)(jax.random.key(0))
    x, t, _ = random_inputs()
    v = jax.jit(net.__call__)(params, x, t, np.ones((2, 256), np.float32))
    assert v.shape == x.shape
    assert not np.any(v)
    for zero in (params["head"]["linear"], params["head"]["modulation"]):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))
    for block in params["blocks"].values():
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(block["modulation"]))
        assert np.any(block["attention"]["query"]["kernel"])


def mean_square(net):
    """A loss of the parameters, at fixed inputs."""
    x, t, _ = random_inputs()
    z = np.random.default_rng(2).standard_normal((2, 256)).astype(np.float32)
    return lambda params: jnp.mean(jnp.square(net(params, x, t, z)))


def test_rematerialisation_changes_no_gradient_and_every_parameter_has_one():
    params = random_params(ONE_BLOCK)["velocity"]
    plain = jax.jit(jax.grad(mean_square(dit())))(params)
    again = jax.jit(jax.grad(mean_square(dit(remat=True))))(params)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(again), strict=True
    ):
        assert np.all(np.isfinite(a)), path
        assert np.any(a), path
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("remat", [False, True])
def test_every_block_is_rematerialised_by_itself(remat):
    net = dit(depth=2, remat=remat)
    program = jax.make_jaxpr(jax.grad(mean_square(net)))(net.abstract).jaxpr
    recomputed = [e for e in operations(program) if e.primitive.name.startswith("remat")]
    assert len(recomputed) == (2 if remat else 0)


def test_bfloat16_computes_products_in_it_and_norms_and_softmax_in_float32():
    params = random_params(ONE_BLOCK)
    x, t, _ = random_inputs()
    encoder = Net(lambda rngs: OriginalEncoder(3, rngs=rngs, dtype=jnp.bfloat16))
    velocity = dit(dtype=jnp.bfloat16)

    def forward(params):
        z = encoder(params["encoder"], x)
        return z, velocity(params["velocity"], x, t, z)

    types = {}
    for equation in operations(jax.make_jaxpr(forward)(params).jaxpr):
        types.setdefault(equation.primitive.name, []).append(
            [v.aval.dtype.name for v in equation.invars]
        )
    assert all(kind == "bfloat16" for kinds in types["conv_general_dilated"] for kind in kinds)
    linear = [kinds for kinds in types["dot_general"] if kinds == ["bfloat16", "bfloat16"]]
    # 4 in front, 10 a block (with the two products of attention), 2 at the end; softmax weights
    # times values included.
    assert len(linear) == len(types["dot_general"]) == 4 + 10 * SIZES["depth"] + 2
    # exp: softmax; rsqrt: every normalisation.
    for name in ("exp", "rsqrt"):
        assert all(kind == "float32" for kinds in types[name] for kind in kinds), name
    assert len(types["rsqrt"]) == 2 + 4 * SIZES["depth"] + 1

    z, v = jax.jit(forward)(params)
    assert z.dtype == v.dtype == jnp.float32
    exact = efae.nets(ONE_BLOCK)
    z32 = jax.jit(exact["encoder"].__call__)(params["encoder"], x)
    v32 = jax.jit(exact["velocity"].__call__)(params["velocity"], x, t, z32)
    assert np.abs(z - z32).max() < 0.03 * np.abs(z32).max()
    assert np.abs(v - v32).max() < 0.05 * np.abs(v32).max()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(velocity.abstract)} == {"float32"}


def test_rotary_embedding_depends_on_the_distance_of_tokens_and_pairs_neighbouring_channels():
    q, k = np.random.default_rng(0).standard_normal((2, 8))
    many = np.broadcast_to(np.stack([q, k])[:, None, None], (2, 6, 1, 8)).astype(np.float32)
    turned_q, turned_k = rotary(jnp.asarray(many))[:, :, 0]
    scores = np.einsum("mc,nc->mn", turned_q, turned_k)
    for offset in range(-4, 5):
        diagonal = np.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.round(scores[0], 3))) == 6

    unit = jnp.zeros((1, 3, 1, 4)).at[..., 0].set(1.0).at[..., 2].set(1.0)
    expected = [[np.cos(n), np.sin(n), np.cos(n / 100), np.sin(n / 100)] for n in range(3)]
    np.testing.assert_allclose(rotary(unit)[0, :, 0], expected, atol=1e-6)


def test_time_features_are_cosines_then_sines_of_unscaled_time():
    features = time_features(jnp.array([0.0, 0.5]))
    assert features.shape == (2, 256)
    np.testing.assert_allclose(features[0], [1.0] * 128 + [0.0] * 128)
    angle = 0.5 * 10000 ** (-32 / 128)
    np.testing.assert_allclose(features[1, [0, 32]], [np.cos(0.5), np.cos(angle)], rtol=1e-6)
    np.testing.assert_allclose(features[1, [128, 160]], [np.sin(0.5), np.sin(angle)], rtol=1e-6)


def test_wide_models_keep_1024_numbers_of_condition_and_round_the_feed_forward_up():
    wide = dit(width=1088).abstract
    assert wide["time_in"]["kernel"].shape == (256, 1024)
    assert wide["latent_embed"]["kernel"].shape == (256, 1024)
    assert wide["blocks"]["0"]["modulation"]["kernel"].shape == (1024, 6 * 1088)
    # floor(4 * 1088 * 2/3) = 2901, up to the next multiple of 256.
    assert wide["blocks"]["0"]["feed_forward"]["up"]["kernel"].shape == (1088, 3072)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 96}, "width 96 .* multiple of 64"),
        ({"heads": 3}, "3 heads do not divide width 64 .* allowed: 1, 2, 4, 8, 16, 32\\b"),
        ({"heads": 64}, "64 heads do not divide"),
        ({"heads": 0}, "0 heads do not divide"),
    ],
)
def test_sizes_that_no_original_has_are_named_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        dit(**changes)


def call(net, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(net.__call__, net.abstract, *arguments)


@pytest.mark.parametrize("side", [16, 17, 28, 32])
def test_encoder_takes_any_side_from_16(side):
    encoder = efae.nets(ARCHITECTURE)["encoder"]
    assert call(encoder, (1, side, 33, 3)).shape == (1, 256)


def test_encoder_names_the_smallest_side():
    encoder = efae.nets(ARCHITECTURE)["encoder"]
    with pytest.raises(ValueError, match=r"15x40 .* at least 16"):
        call(encoder, (1, 15, 40, 3))


def test_transformer_takes_any_side_that_the_patch_divides_and_names_them_otherwise():
    net = dit()
    assert call(net, (2, 4, 20, 3), (2,), (2, 256)).shape == (2, 4, 20, 3)
    for shape in ((2, 18, 16, 3), (2, 16, 18, 3)):
        with pytest.raises(ValueError, match=r"patch 4: each must be a multiple of 4.* 16x16\b"):
            call(net, shape, (2,), (2, 256))
    for shape in ((2, 128), (1, 256), (2, 1, 1, 256)):
        with pytest.raises(ValueError, match=r"takes \[batch, 256\], here \(2, 256\)"):
            call(net, (2, 16, 16, 3), (2,), shape)
