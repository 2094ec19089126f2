"""Moments of channels, their plots, and principal components as colours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from efae_jax.metrics.latent_moments import LatentMoments
from efae_jax.metrics.principal import principal_directions, to_rgb
from efae_jax.metrics.streaming import ChannelStatistics


def latents(seed=0, shape=(11, 3, 4, 5)):
    """Correlated channels of different means, sizes and tails."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_t(8, shape) @ rng.standard_normal((shape[-1], shape[-1]))
    return mixed * np.arange(1, shape[-1] + 1) + 20 * rng.standard_normal(shape[-1])


def moments(*parts, channels=5):
    made = LatentMoments(channels)
    for part in parts:
        made.add(part)
    return made


def test_moments_equal_numpy_and_scipy():
    z = latents()
    rows = z.reshape(-1, 5)
    got = moments(z)
    assert got.count == 132
    np.testing.assert_allclose(got.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(got.std, rows.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(got.excess_kurtosis, scipy.stats.kurtosis(rows), rtol=1e-10)
    assert np.ptp(got.excess_kurtosis) > 0.1
    np.testing.assert_allclose(got.covariance, np.cov(rows.T, bias=True), rtol=1e-10)
    correlation = np.corrcoef(rows.T)
    np.testing.assert_allclose(got.correlation, correlation, rtol=1e-10)
    pairs = np.abs(correlation[np.triu_indices(5, 1)])
    np.testing.assert_allclose(got.mean_abs_correlation, pairs.mean(), rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=4), st.integers(0, 3))
def test_moments_do_not_depend_on_how_images_are_cut(cuts, stored):
    z = latents(1)
    whole = moments(z)
    joined = LatentMoments(5)
    for i, part in enumerate(np.split(z, sorted(cuts))):
        if i == stored:  # goes on from what was stored, or takes in what another has seen
            joined = LatentMoments.from_arrays(joined.arrays())
            joined.merge(LatentMoments.from_arrays(moments(part).arrays()))
        else:
            joined.add(part)
    for name, value in whole.arrays().items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(joined.arrays()[name], value, atol=1e-11 * scale, rtol=0)
    np.testing.assert_allclose(joined.excess_kurtosis, whole.excess_kurtosis, rtol=1e-10)


def test_stored_moments_are_not_changed_by_what_comes_after():
    first = moments(latents())
    stored = first.arrays()
    kept = {name: value.copy() for name, value in stored.items()}
    second = LatentMoments.from_arrays(stored)
    first.add(latents(1))
    second.add(latents(2))
    for name, value in stored.items():
        np.testing.assert_array_equal(value, kept[name])


def test_vectors_are_one_position_each():
    z = latents(shape=(30, 1, 1, 5))
    np.testing.assert_array_equal(moments(z).covariance, moments(z[:, 0, 0]).covariance)


def test_a_constant_channel_gives_numbers():
    z = latents()
    z[..., 1] = 0.1  # whose mean is 0.1 but for rounding
    got = moments(*np.split(z, [2, 7]))
    assert got.std[1] == 0
    assert got.excess_kurtosis[1] == 0
    np.testing.assert_array_equal(got.correlation[1], [0, 1, 0, 0, 0])
    others = moments(*np.split(np.delete(z, 1, axis=-1), [2, 7]), channels=4)
    np.testing.assert_allclose(got.mean_abs_correlation, others.mean_abs_correlation, rtol=1e-12)
    assert others.mean_abs_correlation > 0.05
    assert moments(z[..., :2], channels=2).mean_abs_correlation == 0
    assert moments(z[..., :1], channels=1).mean_abs_correlation == 0


def test_a_channel_far_from_zero_is_not_constant():
    z = 1e4 + 1e-3 * latents(shape=(50, 2, 2, 1))
    expected = scipy.stats.kurtosis(z.reshape(-1))
    np.testing.assert_allclose(moments(z, channels=1).excess_kurtosis, expected, rtol=1e-5)


def test_figures_are_plain_numbers():
    figures = moments(latents()).figures()
    assert json.loads(json.dumps(figures)) == figures
    assert list(figures) == [
        "mean", "std", "excess_kurtosis", "correlation", "mean_abs_correlation"
    ]  # fmt: skip
    assert np.shape(figures["correlation"]) == (5, 5)


def test_moments_refuse_what_is_not_finite():
    z = latents()
    z[3, 0, 0, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        LatentMoments(5).add(z)


def statistics(*parts, channels):
    made = ChannelStatistics(channels)
    for part in parts:
        made.add(part)
    return made


def test_density_equals_a_histogram_of_the_numbers():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4000, 2)) * [1, 0.4] + [0, 1]
    edges, density = statistics(z, channels=2).density(bins=20)
    np.testing.assert_allclose((density * np.diff(edges)).sum(axis=1), 1, rtol=1e-12)
    low, high = np.quantile(z, [0.001, 0.999], axis=0)
    np.testing.assert_allclose(edges, np.linspace(low.min(), high.max(), 21), atol=0.02)
    for channel in range(2):
        expected, _ = np.histogram(np.clip(z[:, channel], edges[0], edges[-1]), edges, density=True)
        # A number within 0.25% of an edge may be counted beside it.
        np.testing.assert_allclose(density[channel], expected, atol=0.02)
        assert expected.max() > 0.35


def test_density_of_constant_channels():
    edges, density = statistics(np.full((9, 2), 5.0), channels=2).density(bins=4)
    np.testing.assert_allclose((density * np.diff(edges)).sum(axis=1), 1, rtol=1e-12)
    assert 4.9 < edges[0] < 5 < edges[-1] < 5.1
    # The end of the range is the lower end of the fine bin that holds the zeros.
    z = np.stack([-np.arange(1.0, 100), np.zeros(99)], axis=1)
    edges, density = statistics(z, channels=2).density(bins=4)
    assert edges[-1] == 0
    np.testing.assert_allclose(density[1] * np.diff(edges), [0, 0, 0, 1], atol=1e-12)


def rotation(seed, size):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_principal_directions_of_a_known_covariance():
    basis = rotation(0, 5)
    variances = np.array([4.0, 9, 1, 0.5, 16])
    vectors, std = principal_directions(basis * variances @ basis.T)
    np.testing.assert_allclose(std, [4, 3, 2], rtol=1e-12)
    expected = basis[:, [4, 1, 0]]
    expected = expected * np.sign(expected[np.abs(expected).argmax(axis=0), range(3)])
    np.testing.assert_allclose(vectors, expected, atol=1e-12)


def test_colours_are_components_in_their_own_deviations():
    basis, mean = rotation(1, 4), np.array([3.0, -1, 0, 2])
    covariance = basis * np.array([1, 25, 0.01, 4]) @ basis.T
    vectors, _ = principal_directions(covariance)
    # At the mean, one deviation along each component, and far along the second.
    components = np.array([[0, 0, 0], [5, 0, 0], [0, 2, 0], [0, 0, -1], [0, 100, 0]])
    z = mean + components @ vectors.T
    rgb = to_rgb(z.reshape(1, 5, 1, 4), mean, covariance)
    assert rgb.shape == (1, 5, 1, 3)
    half = 0.5
    expected = [
        [half] * 3, [0.7, half, half], [half, 0.7, half], [half, half, 0.3], [half, 1, half]
    ]  # fmt: skip
    np.testing.assert_allclose(rgb[0, :, 0], expected, atol=1e-12)


def test_colours_do_not_depend_on_the_sign_that_the_solver_chose(monkeypatch):
    z = latents()
    seen = moments(z)
    rgb = to_rgb(z, seen.mean, seen.covariance)
    assert rgb.std(axis=(0, 1, 2)).min() > 0.1
    solve = np.linalg.eigh
    monkeypatch.setattr(
        np.linalg, "eigh", lambda m: (solve(m)[0], -solve(m)[1] * [1, 1, -1, 1, -1])
    )
    np.testing.assert_allclose(to_rgb(z, seen.mean, seen.covariance), rgb, atol=1e-12)


def test_colours_of_fewer_than_three_channels():
    z = np.array([[-2.5], [0], [1.25], [9]])
    np.testing.assert_allclose(
        to_rgb(z, [0.0], [[1.0]]), np.repeat([[0], [0.5], [0.75], [1]], 3, 1)
    )
    z = np.array([[0.0, 2], [1, 0]])
    rgb = to_rgb(z, [0.0, 0], [[1.0, 0], [0, 4]])
    np.testing.assert_allclose(rgb, [[0.7, 0.5, 0.5], [0.5, 0.7, 0.5]], atol=1e-12)


def test_colours_of_components_that_do_not_vary():
    z = np.outer(np.linspace(-2, 2, 5), [3.0, 4, 0])
    seen = moments(z, channels=3)
    rgb = to_rgb(z, seen.mean, seen.covariance)
    np.testing.assert_array_equal(rgb[:, 1:], 0.5)
    assert rgb[0, 0] < 0.3 < 0.7 < rgb[-1, 0]
    np.testing.assert_array_equal(to_rgb(z, [0.0] * 3, np.zeros((3, 3))), 0.5)
