"""TAESD: sequences as they were published, sides, types, padding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_nets import operations

from efae_jax.convert import layout
from efae_jax.models.conv_blocks import local_statistics
from efae_jax.models.functional import Net
from efae_jax.models.taesd import VARIANTS, TAESDDecoder, TAESDEncoder

# Numbers of parameters of the published encoders and decoders.
SIZES = {
    "taesd": (1_222_532, 1_222_531),
    "taesdxl": (1_222_532, 1_222_531),
    "taesd3": (1_229_456, 1_229_443),
    "taef1": (1_229_456, 1_229_443),
}


@functools.cache
def net(side, variant, **settings):
    module = {"encoder": TAESDEncoder, "decoder": TAESDDecoder}[side]
    return Net(lambda rngs: module(variant, rngs=rngs, **settings))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.cache
def params(side, variant):
    """Unit gain, biases and scales that are not 0 and 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.2) * values

    return jax.tree_util.tree_map_with_path(draw, net(side, variant).abstract)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sides_and_channels(variant):
    v = VARIANTS[variant]
    encoder, decoder = net("encoder", variant), net("decoder", variant)
    x = jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
    z = jax.eval_shape(encoder.__call__, encoder.abstract, x)
    assert z.shape == (2, 64 // v.factor, 32 // v.factor, v.latent_channels)
    assert jax.eval_shape(decoder.__call__, decoder.abstract, z).shape == x.shape
    if variant in SIZES:
        assert (count(encoder.abstract), count(decoder.abstract)) == SIZES[variant]


def test_the_branch_stands_in_the_three_blocks_nearest_the_latent():
    def branches(side):
        names = layout.flatten(net(side, "taef2").abstract)
        return sorted({int(n.split("/")[1]) for n in names if "/branch/" in n})

    assert branches("encoder") == [11, 12, 13]
    assert branches("decoder") == [3, 4, 5]


def test_taesana_narrows_from_the_latent_outwards():
    shapes = {n: a.shape for n, a in layout.flatten(net("decoder", "taesana").abstract).items()}
    assert shapes["layers/1/kernel"] == (3, 3, 32, 256)
    assert shapes["layers/7/kernel"] == (3, 3, 256, 128)
    assert shapes["layers/12/kernel"] == (3, 3, 128, 64)
    assert shapes["layers/29/kernel"] == (3, 3, 64, 3)
    assert "layers/7/bias" not in shapes
    encoder = {n: a.shape for n, a in layout.flatten(net("encoder", "taesana").abstract).items()}
    assert encoder["layers/0/kernel"] == (3, 3, 3, 32)
    assert encoder["layers/2/bias"] == (64,)


@pytest.mark.parametrize(("variant", "factor"), [("taesd", 8), ("taesana", 32)])
def test_sides_that_the_factor_does_not_divide_are_named(variant, factor):
    encoder = net("encoder", variant)
    for height, width in ((factor + 1, factor), (factor, factor - 1)):
        x = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        with pytest.raises(ValueError, match=f"{height}x{width}.* multiples of {factor}"):
            jax.eval_shape(encoder.__call__, encoder.abstract, x)


def test_another_variant_is_refused_by_name():
    with pytest.raises(ValueError, match="no variant 'taesd2'; allowed: taesd, taesdxl"):
        net("encoder", "taesd2")


def test_the_decoder_bounds_latents_and_the_encoder_takes_pixels_around_zero():
    decoder, weights = net("decoder", "taesd"), params("decoder", "taesd")
    z = np.random.default_rng(1).standard_normal((1, 2, 2, 4)).astype(np.float32)
    decode = jax.jit(decoder.__call__)
    np.testing.assert_allclose(decode(weights, 1e4 * z), decode(weights, 1e5 * z), rtol=1e-5)
    # Black is -1 here and 0 there, so without biases it gives the latent 0.
    black = -np.ones((1, 8, 8, 3), np.float32)
    encode = jax.jit(net("encoder", "taesd").__call__)
    assert not np.any(encode(zero_biases(params("encoder", "taesd")), black))
    assert np.any(encode(zero_biases(params("encoder", "taesd")), 0 * black))


def zero_biases(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "bias" else leaf, tree
    )


def test_reflecting_pads_every_convolution():
    """With weights of sum 1 and no zeros around, a constant image stays constant."""
    encoder = net("encoder", "taesd", padding="reflect")
    x = np.full((1, 32, 32, 3), 0.5, np.float32)
    z = np.asarray(jax.jit(encoder.__call__)(params("encoder", "taesd"), x))
    np.testing.assert_allclose(z, np.broadcast_to(z[:, :1, :1], z.shape), rtol=1e-4)
    zeros = np.asarray(jax.jit(net("encoder", "taesd").__call__)(params("encoder", "taesd"), x))
    assert np.ptp(zeros[..., 0]) > 0.01


@pytest.mark.parametrize("remat", [False, True])
def test_every_block_is_rematerialised_by_itself(remat):
    decoder = net("decoder", "taesd", remat=remat)
    z = np.ones((1, 1, 1, 4), np.float32)
    loss = jax.grad(lambda w: jnp.mean(jnp.square(decoder(w, z))))
    program = jax.make_jaxpr(loss)(decoder.abstract).jaxpr
    recomputed = [e for e in operations(program) if e.primitive.name.startswith("remat")]
    assert len(recomputed) == (10 if remat else 0)


def test_bfloat16_computes_convolutions_in_it_and_the_branchs_norm_in_float32():
    encoder = net("encoder", "taef2", dtype=jnp.bfloat16)
    x = np.random.default_rng(3).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    types = {}
    for e in operations(jax.make_jaxpr(encoder.__call__)(encoder.abstract, x).jaxpr):
        types.setdefault(e.primitive.name, []).append({v.aval.dtype.name for v in e.invars})
    assert types["conv_general_dilated"] == 41 * [{"bfloat16"}]
    assert types["rsqrt"] == 3 * [{"float32"}]
    weights = params("encoder", "taef2")
    z = jax.jit(encoder.__call__)(weights, x)
    exact = jax.jit(net("encoder", "taef2").__call__)(weights, x)
    assert z.dtype == jnp.float32
    assert np.abs(z - exact).max() < 0.05 * np.abs(exact).max()


def test_statistics_of_the_norms_can_be_given():
    """As tiling does: every norm of the branch asks, and uses what it gets."""
    encoder, weights = net("encoder", "taef2"), params("encoder", "taef2")
    x = np.random.default_rng(4).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    asked = []

    def statistics(x_BHWC, groups):
        asked.append((x_BHWC.shape[-1], groups))
        mean, variance = local_statistics(x_BHWC, groups)
        return mean, 4 * variance

    z = encoder(weights, x, statistics)
    assert asked == 3 * [(256, 4)]
    assert not np.allclose(z, encoder(weights, x))
