"""Features for Frechet distances: how images reach the networks, protocols, mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_nets import quick_jit, random_params

from efae_jax.models.frechet_features import (
    PROTOCOLS,
    FrechetFeatures,
    pytorch_fid_input,
    torch_fidelity_input,
)
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS
from efae_jax.models.vgg import VGG16, scale_input

INPUTS = {"torch-fidelity": torch_fidelity_input, "pytorch-fid": pytorch_fid_input}
SIZES = [(40, 56), (299, 320), (350, 23), (1, 2)]


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def positions(name, side):
    """Where on the source's pixels the 299 are read."""
    i = np.arange(299)
    at = i * (side / 299) if name == "torch-fidelity" else (i + 0.5) * (side / 299) - 0.5
    return np.clip(at, 0, side - 1)


def interpolated(name, x_BHWC):
    """One matrix of linear weights for each axis, float64."""

    def weights(side):
        # The hat function around every pixel.
        return np.maximum(0, 1 - np.abs(positions(name, side)[:, None] - np.arange(side)))

    _, height, width, _ = x_BHWC.shape
    rows, columns = weights(height), weights(width)
    return np.einsum("ih,jw,bhwc->bijc", rows, columns, x_BHWC, optimize=True)


def expected(name, x_BHWC):
    resized = interpolated(name, x_BHWC.astype(np.float64))
    return (resized - 128) / 128 if name == "torch-fidelity" else 2 * resized / 255 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", INPUTS)
def test_resizing_is_linear_interpolation_at_the_stated_places(name, size):
    x = pixels(2, *size, 3)
    prepared = INPUTS[name](x)
    assert prepared.dtype == jnp.float32
    np.testing.assert_allclose(prepared, expected(name, x), atol=2e-6)


@pytest.mark.parametrize("size", SIZES[:3])
def test_resizing_equals_pytorch(size):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x = pixels(2, *size, 3)
    # In float32 PyTorch rounds the places, too.
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float64))
    centres = F.interpolate(nchw / 255, size=(299, 299), mode="bilinear", align_corners=False)
    ours = pytorch_fid_input(x).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, 2 * centres - 1, atol=2e-6)
    # grid_sample reads the first pixel's centre at -1, and the last one's at 1.
    i = torch.arange(299, dtype=torch.float64)
    rows, columns = (i * (2 * side / 299 / (side - 1)) - 1 for side in size)
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    corners = F.grid_sample(
        nchw, places.expand(2, -1, -1, -1), padding_mode="border", align_corners=True
    )
    ours = torch_fidelity_input(x).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, (corners - 128) / 128, atol=2e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_images_of_the_networks_side_are_only_scaled(name):
    x = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(19, 0).repeat(19, 1)[:299, :299]
    x = x[None, :, :, None]
    scaled = (x - 128.0) / 128 if name == "torch-fidelity" else 2 * (x / 255) - 1
    np.testing.assert_allclose(INPUTS[name](x), np.repeat(scaled, 3, axis=-1), atol=1e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_uint8_and_whole_floats_grey_and_three_equal_colours_are_the_same(name):
    x = pixels(1, 6, 7, 1)
    as_bytes = INPUTS[name](x)
    np.testing.assert_array_equal(as_bytes, INPUTS[name](x.astype(np.float32)))
    np.testing.assert_array_equal(as_bytes, INPUTS[name](x.repeat(3, axis=-1)))


@pytest.mark.parametrize("name", INPUTS)
def test_inception_sees_the_protocols_own_input(name):
    features = FrechetFeatures(name)
    x = pixels(2, 6, 7, 3)
    features.net = lambda params, prepared: (params, prepared)
    params, prepared = features("parameters", x)
    assert params == "parameters"
    np.testing.assert_array_equal(prepared, INPUTS[name](x))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_says_how_many_features_and_how_small_images_may_be(name):
    features = FrechetFeatures(name)
    assert features.name == name
    assert features.described
    side = features.smallest_side
    for channels in (1, 3):
        x = jax.ShapeDtypeStruct((2, side, side + 1, channels), jnp.uint8)
        found = jax.eval_shape(features.__call__, features.net.abstract, x)
        assert (found.shape, found.dtype) == ((2, features.size), jnp.float32)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg16", (1, 40, 15, 3), "40x15 .* at least 16"),
        ("vgg16", (1, 32, 32, 4), "4 channels"),
        ("torch-fidelity", (1, 32, 32, 2), r"2 channels .* 1 \(grey\) or 3"),
        ("pytorch-fid", (1, 32, 32, 4), r"4 channels .* 1 \(grey\) or 3"),
    ],
)
def test_images_without_features_are_named(name, shape, message):
    features = FrechetFeatures(name)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            features.__call__, features.net.abstract, jax.ShapeDtypeStruct(shape, jnp.uint8)
        )


def test_unknown_protocol():
    with pytest.raises(ValueError, match="'fid' .* allowed: torch-fidelity, pytorch-fid, vgg16"):
        FrechetFeatures("fid")


def test_vgg16_is_the_mean_of_relu5_3_and_lpips_gives_it_along_with_its_own():
    lpips, trunk = Net(lambda rngs: LPIPS("vgg", rngs=rngs)), Net(lambda rngs: VGG16(rngs=rngs))
    params, features = random_params(lpips), FrechetFeatures("vgg16")

    @quick_jit
    def all_of_them(params, pixels):
        x = pixels.astype(jnp.float32) / 127.5 - 1
        return {
            "relu5_3": trunk(params["trunk"], scale_input(x))[-1],
            "features": features(params["trunk"], pixels),
            "of floats": features(params["trunk"], pixels.astype(jnp.float32)),
            "along": lpips(params, x, method="features_and_pooled")[1],
        }

    found = all_of_them(params, pixels(2, 32, 36, 3))
    expected = np.mean(found.pop("relu5_3"), axis=(1, 2))
    assert expected.shape == (2, 512)
    assert not np.allclose(*expected, rtol=1e-3)
    for name, pooled in found.items():
        np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6, err_msg=name)
