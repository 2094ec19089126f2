"""Figures of merit against known values and against formulas written out anew."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.signal import convolve2d

from efae_jax.metrics.equivariance import equivariance_error
from efae_jax.metrics.images import psnr, ssim


def images(seed, shape=(2, 16, 20, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_psnr_of_constant_differences():
    black = np.full((3, 4, 6, 3), -0.5, np.float32)
    other = black + np.array([0.2, 0.02, 1.0], np.float32)[:, None, None, None]
    # 10 log10(4 / d^2)
    np.testing.assert_allclose(psnr(black, other), [20.0, 40.0, 6.0206], atol=1e-3)


def test_psnr_is_of_each_image_over_all_of_its_elements():
    a, b = images(0), images(1)
    by_hand = [10 * np.log10(4 / np.mean((p - q) ** 2)) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), by_hand, rtol=1e-5)


def test_psnr_of_equal_images_is_finite_and_values_are_clipped():
    a = images(0)
    np.testing.assert_allclose(psnr(a, a), [106.0206] * 2, atol=1e-3)
    white, beyond = np.ones((1, 4, 4, 1), np.float32), np.full((1, 4, 4, 1), 3.0, np.float32)
    np.testing.assert_allclose(psnr(beyond, white), [106.0206], atol=1e-3)
    np.testing.assert_allclose(psnr(-white, -beyond), [106.0206], atol=1e-3)


def wang_ssim(a, b, window):
    """Equation 13 of Wang et al. 2004 with the paper's Gaussian window, in float64.

    Images of 0..L with L = 2, at the positions where the window fits; mean over channels.
    """
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-np.add.outer(offsets**2, offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for channel in range(a.shape[-1]):
        x, y = (np.float64(image[..., channel]) + 1 for image in (a, b))
        mean = lambda image: convolve2d(image, weights, mode="valid")  # noqa: E731
        mu_x, mu_y = mean(x), mean(y)
        var_x, var_y = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2
        covariance = mean(x * y) - mu_x * mu_y
        values.append(
            ((2 * mu_x * mu_y + c1) * (2 * covariance + c2))
            / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
        )
    return np.mean(values)


@pytest.mark.parametrize(
    ("shape", "window"), [((3, 16, 20, 3), 11), ((2, 8, 13, 1), 8), ((2, 15, 7, 2), 7)]
)
def test_ssim_equals_the_paper_formula(shape, window):
    a = images(0, shape)
    # From nearly equal to unrelated: every factor of the formula matters.
    mix = np.linspace(0.05, 1, len(a), dtype=np.float32)[:, None, None, None]
    b = (1 - mix) * a + mix * images(1, shape) * 0.8 + 0.1
    got = jax.jit(ssim)(a, b)
    expected = [wang_ssim(p, q, window) for p, q in zip(a, np.clip(b, -1, 1), strict=True)]
    assert max(expected) - min(expected) > 0.3
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_ssim_of_known_images():
    random = images(0, (12, 12, 1))
    flat = np.full_like(random, -0.5)  # 0.5 of a range of 2
    a = np.stack([random, 3 * np.sign(random), flat])
    b = np.stack([random, np.sign(random), flat + 1])
    luminance = (2 * 0.5 * 1.5 + 4e-4) / (0.5**2 + 1.5**2 + 4e-4)
    # equal; equal once clipped; flat, where only the luminances differ
    np.testing.assert_allclose(jax.jit(ssim)(a, b), [1, 1, luminance], atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (4, 30)])
def test_equivariance_error(shape):
    z = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    factor = np.array([1, 0, -1, 3], np.float32).reshape(4, *[1] * (z.ndim - 1))
    # ||c z - z||^2 / ||z||^2 = (c - 1)^2, example by example
    np.testing.assert_allclose(equivariance_error(factor * z, z), [0, 1, 4, 4], rtol=1e-5)


def test_equivariance_error_is_relative_to_the_encoding_of_the_moved_image():
    acted, encoded = np.full((1, 6), 1.0, np.float32), np.full((1, 6), 2.0, np.float32)
    np.testing.assert_allclose(equivariance_error(acted, encoded), [1 / 4])


def test_equivariance_error_of_independent_latents_is_two_and_of_zeros_finite():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 20_000)).astype(np.float32)
    np.testing.assert_allclose(equivariance_error(a, b), [2, 2], rtol=0.05)
    zero = np.zeros((1, 4), np.float32)
    np.testing.assert_array_equal(equivariance_error(zero, zero), [0])
