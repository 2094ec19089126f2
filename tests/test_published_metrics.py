"""PSNR of 8-bit images and SSIM with a pair's own range, against NumPy and torchmetrics."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.signal import convolve2d

from efae_jax.metrics.images import psnr_uint8, ssim_torchmetrics, to_uint8_truncated

ssim_torchmetrics = jax.jit(ssim_torchmetrics)


def test_levels_of_eight_bits_come_back_and_others_are_cut_off():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = levels.astype(np.float32) / 127.5 - 1
    got = jax.jit(to_uint8_truncated)(pixels)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, levels)
    # 127.5 x + 128 is 0.5, 255.5, 128, 128.9, 127.9 and beyond both ends
    values = np.array([-1, 1, 0, 0.9 / 127.5, -0.1 / 127.5, -1.5, 1.5], np.float32)
    got = to_uint8_truncated(values.reshape(1, 1, 7, 1)).ravel()
    np.testing.assert_array_equal(got, [0, 255, 128, 128, 127, 0, 255])


def test_psnr_of_eight_bits():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    mse = np.square(a.astype(float) - b).mean(axis=(1, 2, 3))
    expected = 10 * np.log10(255**2 / mse)
    np.testing.assert_allclose(jax.jit(psnr_uint8)(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(psnr_uint8(b, a), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (2, 63, 65, 1)])
def test_psnr_is_of_eight_bits_in_one_program_too(shape):
    """Compiled together, floats must lose their fraction before they are compared."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1.1, 1.1, shape).astype(np.float32)
    b = (a + rng.normal(0, 0.05, shape)).astype(np.float32)

    @jax.jit
    def compared(a, b):
        return psnr_uint8(to_uint8_truncated(a), to_uint8_truncated(b))

    levels = [np.clip(np.float32(127.5) * x + np.float32(128), 0, 255) // 1 for x in (a, b)]
    mse = np.square(np.subtract(*levels, dtype=float)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(compared(a, b), 10 * np.log10(255**2 / mse), rtol=1e-6)


def test_psnr_of_equal_eight_bits_is_finite():
    a = np.full((1, 4, 4, 1), 7, np.uint8)
    np.testing.assert_allclose(psnr_uint8(a, a), [106.0206], atol=1e-3)
    np.testing.assert_allclose(psnr_uint8(a, a + np.uint8(1)), [20 * np.log10(255)], atol=1e-3)


def numpy_ssim(a, b):
    """Equation 13 of Wang et al. 2004 over images continued by reflection, in float64."""
    a, b = np.float64(a), np.float64(b)
    offsets = np.arange(-5, 6)
    weights = np.exp(-np.add.outer(offsets**2, offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    span = max(np.ptp(a), np.ptp(b))
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for channel in range(a.shape[-1]):
        x, y = (np.pad(image[..., channel], 5, mode="reflect") for image in (a, b))
        mean = lambda image: convolve2d(image, weights, mode="valid")  # noqa: E731
        mu_x, mu_y = mean(x), mean(y)
        var_x, var_y = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2
        covariance = mean(x * y) - mu_x * mu_y
        values.append(
            ((2 * mu_x * mu_y + c1) * (2 * covariance + c2))
            / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
        )
    return np.mean(values)


def pairs(shape):
    """From nearly equal to unrelated, beyond [-1, 1], and of low contrast far from 0."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, shape).astype(np.float32)
    mix = np.linspace(0.02, 1, len(a), dtype=np.float32)[:, None, None, None]
    b = (1 - mix) * a + mix * rng.uniform(-1.4, 1.3, shape).astype(np.float32)
    # Smooth over the left half, where every factor of the formula counts.
    a[:, :, : shape[2] // 2], b[:, :, : shape[2] // 2] = 0.3 + 0.01 * a[:, :, :1], 0.25
    return np.concatenate([a, 0.02 * a - 0.9]), np.concatenate([b, 0.02 * b - 0.9])


@pytest.mark.parametrize("shape", [(3, 16, 20, 3), (2, 7, 13, 1), (2, 3, 6, 2)])
def test_ssim_equals_the_paper_formula_in_float64(shape):
    a, b = pairs(shape)
    expected = [numpy_ssim(p, q) for p, q in zip(a, b, strict=True)]
    assert max(expected) - min(expected) > 0.3
    np.testing.assert_allclose(ssim_torchmetrics(a, b), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 20, 3), (2, 7, 13, 1)])
def test_ssim_equals_torchmetrics(shape):
    torch = pytest.importorskip("torch")
    torchmetrics = pytest.importorskip("torchmetrics", minversion="1.4.2")
    similarity = torchmetrics.functional.image.structural_similarity_index_measure
    a, b = pairs(shape)
    channels_first = [torch.tensor(x).double().permute(0, 3, 1, 2)[:, None] for x in (a, b)]
    expected = [float(similarity(q, p)) for p, q in zip(*channels_first, strict=True)]
    np.testing.assert_allclose(ssim_torchmetrics(a, b), expected, atol=1e-6)


def test_ssim_with_the_range_of_each_pair():
    """A pair's figure is its own in any batch, and does not change with the unit of the values."""
    a, b = pairs((3, 8, 9, 1))
    whole = ssim_torchmetrics(a, b)
    np.testing.assert_allclose(whole, ssim_torchmetrics(b, a), atol=1e-6)
    np.testing.assert_allclose(whole, ssim_torchmetrics(a / 4, b / 4), atol=1e-6)
    one_by_one = [ssim_torchmetrics(p[None], q[None])[0] for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(whole, one_by_one, atol=1e-6)


def test_ssim_of_flat_images_is_their_luminance():
    a, b = (np.zeros((4, 8, 9, 1), np.float32) + np.array(v, np.float32)[:, None, None, None]
            for v in ([0.3, 0.0, 0.3, 0.8], [0.3, 0.0, 0.1, -0.2]))  # fmt: skip
    expected = [1, 1, 2 * 0.03 / (0.09 + 0.01), -2 * 0.16 / (0.64 + 0.04)]
    np.testing.assert_allclose(ssim_torchmetrics(a, b), expected, atol=1e-5)
