"""Convolutions with their kernel's gradient by matrix products, beside XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efae_jax.models import convolution
from efae_jax.models.convolution import by_products, convolve

OPTIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SHAPES = [  # height, width, channels, kernel, strides, padding
    (6, 5, 3, (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1))),
    (6, 8, 4, (3, 3, 4, 4), (2, 2), ((0, 1), (0, 1))),
    (7, 6, 2, (4, 4, 2, 3), (2, 2), ((1, 1), (1, 1))),
    (5, 6, 2, (3, 3, 2, 2), (2, 2), "SAME"),
]


@pytest.fixture
def products(monkeypatch):
    """Images of any size take the products; counted."""
    monkeypatch.setattr(convolution, "LEAST_POSITIONS", 1)
    calls, original = [], convolution._products
    monkeypatch.setattr(
        convolution, "_products", lambda *a: calls.append(a[1].shape) or original(*a)
    )
    return calls


def both(shape):
    height, width, channels, kernel, strides, padding = shape
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, height, width, channels))
    k = jax.random.normal(keys[1], kernel)
    ours = lambda x, k: convolve(x, k, strides, padding, **OPTIONS)  # noqa: E731
    xla = lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, **OPTIONS)  # noqa: E731
    return x, k, ours, xla


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_xlas(products, shape):
    x, k, ours, xla = both(shape)
    weights = jax.random.normal(jax.random.key(3), xla(x, k).shape)

    def everything(f):
        loss = lambda x, k: jnp.sum(weights * f(x, k) ** 2)  # noqa: E731
        _, slope = jax.jvp(f, (x, k), (x[::-1], k[::-1]))
        _, pull = jax.linearize(jax.grad(loss, 1), x, k)
        remat = jax.grad(jax.checkpoint(loss), (0, 1))(x, k)
        each = jax.vmap(lambda k: jax.grad(loss, 1)(x, k))(jnp.stack([k, 2 * k]))
        return f(x, k), slope, pull(x[::-1], k[::-1]), remat, each

    found, expected = (jax.jit(everything, static_argnums=0)(f) for f in (ours, xla))
    assert products
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_frozen_kernel_costs_no_products(products):
    x, k, ours, _ = both(SHAPES[0])
    jax.grad(lambda x: ours(x, k).sum())(x)
    assert not products
    jax.grad(lambda k: ours(x, k).sum())(k)
    assert products == [k.shape]


def test_where_it_applies():
    large, small = (1, 256, 256, 8), (8, 64, 64, 512)
    assert by_products("cpu", large, jnp.float32)
    assert not by_products("cpu", small, jnp.float32)
    assert not by_products("gpu", large, jnp.float32)
    assert not by_products("tpu", large, jnp.float32)
    assert not by_products("cpu", large, jnp.bfloat16)
    assert not by_products("cpu", large, jnp.float32, {"feature_group_count": 2})
    assert not by_products("cpu", large, jnp.float32, {"rhs_dilation": (2, 2)})


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), "REFLECT"])
def test_in_a_layer(products, padding):
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 3))
    layers = [
        nnx.Conv(3, 4, (3, 3), padding=padding, rngs=nnx.Rngs(0), **options)
        for options in ({"conv_general_dilated": convolve}, {})
    ]
    grads = [nnx.grad(lambda m: jnp.sum(m(x) ** 2))(layer) for layer in layers]
    assert products
    np.testing.assert_allclose(grads[0].kernel[...], grads[1].kernel[...], rtol=1e-4, atol=1e-4)
