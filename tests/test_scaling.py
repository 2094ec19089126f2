"""Resampling of images and latents: golden numbers, PyTorch's functions, laws."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import SHARED, assert_close, needs, nhwc

from efae_jax import groups

CLOCKWISE = "r270"  # torch.rot90(x, 1, (-1, -2))


def turned(x, g):
    d4 = groups.group("d4")
    return groups.act_image(d4, np.full(len(x), d4.elements.index(g)), x)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@needs("fixtures/ldm_autoencoder_kl.npz")
def test_golden_numbers():
    with np.load(SHARED / "fixtures" / "ldm_autoencoder_kl.npz") as file:
        numbers = {k: nhwc(v) for k, v in file.items() if k[:3] != "sd/" and v.ndim == 4}
    x, z = numbers["in/x"], numbers["out/mode"]
    halved = groups.scale(z, (4, 4))
    assert_close(turned(halved, CLOCKWISE), numbers["out/z_scale05_rot90k1"], 1e-6)
    assert_close(groups.scale(z, (6, 6)), numbers["out/z_scale075"], 1e-6)
    assert_close(groups.scale(x, (48, 48)), numbers["out/x_scale075"], 1e-6)
    assert_close(turned(x, CLOCKWISE), numbers["out/x_rot90k1"], 1e-6)


@pytest.mark.parametrize(
    ("kind", "mode", "antialias"),
    [
        ("bilinear", "bilinear", False),
        ("bilinear_antialiased", "bilinear", True),
        ("bicubic", "bicubic", True),
    ],
)
@pytest.mark.parametrize("sides", [(8, 8), (3, 5), (15, 31), (16, 32)])
def test_equals_pytorch(kind, mode, antialias, sides):
    torch = pytest.importorskip("torch")
    x = noise(2, 16, 32, 3)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), sides, mode=mode, antialias=antialias
    )
    assert_close(groups.scale(x, sides, kind), theirs.permute(0, 2, 3, 1).numpy(), 1e-5)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(groups.RESAMPLINGS), st.sampled_from(["h", "v", "r90", "r180", "t", "a"]))
def test_scaling_then_acting_is_acting_then_scaling(kind, g):
    """To sides that turn along."""
    x, (a, b) = noise(1, 8, 8, 2), (5, 7)
    if groups.group("d4").bits[groups.group("d4").elements.index(g), 0]:  # it transposes
        a_then, b_then = 7, 5
    else:
        a_then, b_then = 5, 7
    scaled = groups.scale(x, (a, b), kind)
    first = np.asarray(scaled)
    moved = {"h": first[:, :, ::-1], "v": first[:, ::-1], "r180": first[:, ::-1, ::-1]}
    moved |= {"t": first.swapaxes(1, 2), "r90": np.rot90(first, axes=(1, 2))}
    moved["a"] = moved["t"][:, ::-1, ::-1]
    second = groups.scale(turned(x, g), (a_then, b_then), kind)
    np.testing.assert_allclose(moved[g], second, atol=1e-5)


def test_constants_stay_and_the_same_sides_change_nothing():
    for kind in groups.RESAMPLINGS:
        ones = groups.scale(jnp.ones((1, 8, 8, 1)), (3, 5), kind)
        np.testing.assert_allclose(ones, 1, atol=1e-6)
        x = noise(1, 4, 6, 2)
        assert groups.scale(x, (4, 6), kind) is x


def test_only_the_antialiased_kinds_see_every_pixel():
    x = np.zeros((1, 16, 16, 1), np.float32)
    x[0, 0, 0] = 1  # between the four pixels that make the first of 4 x 4
    seen = {
        kind: float(jnp.abs(groups.scale(x, (4, 4), kind)).sum()) for kind in groups.RESAMPLINGS
    }
    assert seen["bilinear"] == 0
    assert seen["bilinear_antialiased"] > 0.001
    assert seen["bicubic"] > 0.001
    assert seen["bicubic"] != seen["bilinear_antialiased"]


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="bilinear, bilinear_antialiased, bicubic"):
        groups.scale(noise(1, 4, 4, 1), (2, 2), "nearest")
