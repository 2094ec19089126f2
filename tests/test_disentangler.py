"""The disentangler's modules and losses: golden numbers, parts, parametrisations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import SHARED, assert_close, needs, nhwc

from efae_jax import groups
from efae_jax.convert import sketch
from efae_jax.methods import disentangle
from efae_jax.models.disentangler import Disentangler, change_channels


@functools.cache
def golden():
    path = SHARED / "fixtures" / "sketch.npz"
    return sketch.read(path), dict(np.load(path))


@needs("fixtures/sketch.npz")
def test_channels_and_embeddings_of_the_original():
    params, numbers = golden()
    W = params["transform"]["matrix"]
    u = change_channels(W, nhwc(numbers["in/z"]))
    assert_close(u, nhwc(numbers["out/channels"]))
    assert_close(change_channels(W.T, u), nhwc(numbers["out/decoded"]))
    model = Disentangler(4, 2, 512, 512)
    semantic, style = jax.jit(model.embed)(params, u)
    assert_close(semantic, numbers["out/sem_embedding"], 1e-5)
    assert_close(style, numbers["out/style_embedding"], 1e-5)
    assert_close(model.matrix(params), W)


@needs("fixtures/sketch.npz")
@pytest.mark.parametrize(("form", "name"), [("mse", "mse"), ("l1", "l1")])
def test_losses_of_the_original(form, name):
    _, numbers = golden()
    text, image = numbers["in/clip_txt"], numbers["in/clip_img"]
    joint = {"matrix": jnp.eye(512), "offset": jnp.zeros(512)}
    style = disentangle.style_target(joint, text, image)
    for part, target in (("sem", text), ("style", style)):
        found = disentangle.distance(form, numbers[f"out/{part}_embedding"], target)
        assert_close(found.mean(), numbers[f"out/{part}_{name}"])


@needs("fixtures/sketch.npz")
def test_orthogonality_of_the_original():
    params, numbers = golden()
    W = params["transform"]["matrix"]
    assert_close(disentangle.orthogonality_loss("l1", W), numbers["out/ortho_sum"])
    mean = disentangle.orthogonality_loss("mse", W)
    assert_close(mean, numbers["out/ortho_sum"] / 16)


def test_the_distance_is_that_of_vectors():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 7)).astype(np.float32)
    np.testing.assert_allclose(
        disentangle.distance("distance", a, b), np.linalg.norm(a - b, axis=1) ** 2, rtol=1e-5
    )


@pytest.fixture(scope="module")
def models():
    make = functools.partial(Disentangler, 4, 1, 5, 6, width=4, blocks=1)
    return {
        "soft": make(orthogonality="soft"),
        "cayley": make(orthogonality="cayley", scaled=True),
        "expm": make(orthogonality="expm"),
    }


def drawn(model, seed=0):
    """Parameters with a matrix that is not the identity."""
    params = jax.jit(model.init)(jax.random.key(seed))
    (name, start), *_ = params["transform"].items()
    noise = 0.1 * jax.random.normal(jax.random.key(seed + 1), start.shape)
    return {**params, "transform": {name: start + noise}}


@pytest.mark.parametrize("kind", ["soft", "cayley", "expm"])
def test_the_basis_is_orthogonal_and_starts_as_the_raw_channels(models, kind):
    model = models[kind]
    start = jax.jit(model.init)(jax.random.key(0))
    np.testing.assert_allclose(model.basis(start), np.eye(4), atol=1e-6)
    params = drawn(model)
    Q, W = model.basis(params), model.matrix(params)
    assert groups.orthogonality_error(Q) < 1e-6
    assert np.abs(Q - np.eye(4)).max() > 0.05
    if kind == "soft":
        assert groups.orthogonality_error(W) > 0.05
        np.testing.assert_array_equal(Q, groups.qr_basis(W))
    else:
        np.testing.assert_array_equal(Q, W)


def test_each_embedder_sees_its_channels_alone(models):
    model = models["soft"]
    params = drawn(model)
    u = jax.random.normal(jax.random.key(3), (2, 4, 4, 4))
    semantic, style = model.embed(params, u)
    assert semantic.shape == (2, 5)
    assert style.shape == (2, 6)
    for channel in range(4):
        other = model.embed(params, u.at[..., channel].add(jax.random.normal(jax.random.key(4))))
        changed = [bool(np.any(a != b)) for a, b in zip(other, (semantic, style), strict=True)]
        assert changed == [channel == 0, channel > 0]


def test_latents_without_positions_are_one_position(models):
    model = models["soft"]
    params, u = drawn(model), jax.random.normal(jax.random.key(3), (3, 4))
    for a, b in zip(model.embed(params, u), model.embed(params, u[:, None, None]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_finished_parameters_are_those_of_the_published_program(models):
    """Q for the matrix, no scale: the same embeddings by a plain model."""
    model = models["cayley"]
    params, plain = drawn(model), Disentangler(4, 1, 5, 6, width=4, blocks=1)
    finished = model.finished(params)
    np.testing.assert_array_equal(finished["transform"]["matrix"], model.basis(params))
    u = jax.random.normal(jax.random.key(3), (2, 4, 4, 4))
    for a, b in zip(model.embed(params, u), plain.embed(finished, u), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(a).max() > 1e-3


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="4 semantic of 4 channels; allowed are 1 to 3"):
        Disentangler(4, 4, 5, 6)
    with pytest.raises(ValueError, match="'hard' is not one of soft, cayley, expm"):
        Disentangler(4, 2, 5, 6, orthogonality="hard")
