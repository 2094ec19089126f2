"""Spatial frequencies of latents and images."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from scipy.fft import dctn

from efae_jax.metrics.spectrum import Spectrum, dct_energies, dct_matrix, spectrum_figures

dct_energies = jax.jit(dct_energies)


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spectrum(*parts, size=(6, 9)):
    made = Spectrum(*size)
    for part in parts:
        made.add(part)
    return made


def cosines(size, waves):
    """The image whose only DCT coefficients are these: {(u, v): value}."""
    rows, columns = dct_matrix(size[0]), dct_matrix(size[1])
    image = sum(value * np.outer(rows[u], columns[v]) for (u, v), value in waves.items())
    return np.float32(image)[None, :, :, None]


@pytest.mark.parametrize("shape", [(2, 6, 9, 3), (1, 1, 5, 1)])
def test_energies_equal_scipy_and_sum_to_the_squares(shape):
    x = noise(shape) + 3
    expected = np.square(dctn(x.astype(float), type=2, norm="ortho", axes=(1, 2))).sum(axis=-1)
    got = dct_energies(x)
    assert got.shape == shape[:3]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.max())
    np.testing.assert_allclose(
        np.sum(got, axis=(1, 2)), np.square(x).sum(axis=(1, 2, 3)), rtol=1e-5
    )


def test_dct_matrix_is_orthonormal():
    matrix = dct_matrix(7)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(7), atol=1e-14)


def test_share_of_high_frequencies():
    # Of a grid of 6 x 9, u >= 3 and v >= 5 are high; the constant counts for nothing.
    waves = {(0, 0): 50, (2, 4): 1, (3, 0): 2, (0, 5): 3, (5, 8): 4}
    got = spectrum(dct_energies(cosines((6, 9), waves)))
    np.testing.assert_allclose(got.high_frequency, (4 + 9 + 16) / 30, rtol=1e-5)


def test_the_share_is_of_all_images_energy_together():
    loud = dct_energies(cosines((6, 9), {(1, 1): 3}))
    quiet = dct_energies(cosines((6, 9), {(5, 1): 1}))
    np.testing.assert_allclose(spectrum(loud, quiet).high_frequency, 1 / 10, rtol=1e-5)


def test_the_curve_is_the_mean_over_rings():
    size = (6, 9)
    energy = np.random.default_rng(0).uniform(0.5, 2, (1, *size))
    frequency, level = spectrum(energy, size=size).curve()
    np.testing.assert_allclose(frequency, np.arange(1, 9) / 9)
    mean = (energy.sum() - energy[0, 0, 0]) / 53
    for k, got in zip(range(1, 9), level, strict=True):
        ring = [
            energy[0, u, v]
            for u in range(6)
            for v in range(9)
            # 9 r in [k - 1/2, k + 1/2), r^2 = (u / 6)^2 + (v / 9)^2, in integers
            if (2 * k - 1) ** 2 <= 9 * u * u + 4 * v * v < (2 * k + 1) ** 2
        ]
        np.testing.assert_allclose(got, np.mean(ring) / mean, rtol=1e-12)


def test_white_noise_is_flat_in_any_unit_and_size():
    for size, scale in (((8, 8), 1), ((12, 16), 20)):
        got = spectrum(dct_energies(scale * noise((400, *size, 2))), size=size)
        _, level = got.curve()
        np.testing.assert_allclose(level, 1, atol=0.1)
        expected = 0.75 * size[0] * size[1] / (size[0] * size[1] - 1)
        np.testing.assert_allclose(got.high_frequency, expected, rtol=0.01)


def test_smooth_images_fall_off_and_keep_little_at_high_frequencies():
    x = np.cumsum(np.cumsum(noise((50, 12, 12, 1)), axis=1), axis=2)
    got = spectrum(dct_energies(x), size=(12, 12))
    _, level = got.curve()
    assert level[0] > 10 * level[5] > 10 * level[-1]
    assert got.high_frequency < 0.1


def test_the_spectrum_does_not_depend_on_how_images_are_cut():
    energies = np.asarray(dct_energies(noise((7, 6, 9, 2))))
    whole = spectrum(energies)
    joined = Spectrum.from_arrays(spectrum(energies[:3], energies[3:3]).arrays())
    stored = joined.arrays()
    joined.merge(spectrum(energies[3:4], energies[4:]))
    assert whole.count == joined.count == 7
    assert stored["count"] == 3
    np.testing.assert_allclose(stored["energy"], energies[:3].sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(joined.energy, whole.energy, rtol=1e-12)
    np.testing.assert_allclose(joined.high_frequency, whole.high_frequency, rtol=1e-12)
    np.testing.assert_allclose(joined.curve()[1], whole.curve()[1], rtol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (4, 4)])
def test_flat_images_give_zero(size):
    got = spectrum(dct_energies(np.zeros((2, *size, 3), np.float32)), size=size)
    frequency, level = got.curve()
    assert got.high_frequency == 0
    np.testing.assert_array_equal(level, np.zeros(len(frequency)))


def test_figures_are_plain_numbers():
    latent = spectrum(dct_energies(noise((3, 4, 4, 2))), size=(4, 4))
    image = spectrum(dct_energies(cosines((6, 9), {(1, 1): 3, (3, 1): 1})))
    figures = spectrum_figures(latent, image)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["high_frequency"] == latent.high_frequency
    np.testing.assert_allclose(figures["high_frequency_image"], 0.1, rtol=1e-5)
    assert figures["spectrum"]["frequency"] == [0.25, 0.5, 0.75]
    assert figures["spectrum"]["latent"] == latent.curve()[1].tolist()
    assert len(figures["spectrum"]["image_frequency"]) == len(figures["spectrum"]["image"]) == 8
    assert figures["spectrum"]["image"] == image.curve()[1].tolist()


def test_other_grids_and_infinite_energies_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 9, 6\) are not \[N, 6, 9\]"):
        spectrum(np.zeros((2, 9, 6)))
    with pytest.raises(ValueError, match="not finite"):
        spectrum(np.full((1, 6, 9), np.inf))
