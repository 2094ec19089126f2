"""The Frechet distance and the statistics that it is computed from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from efae_jax.metrics.frechet import FeatureStatistics, frechet_distance


def features(seed, count, size=7):
    """Correlated, with a mean far from zero, in float32."""
    r = np.random.default_rng(seed)
    mixed = r.standard_normal((count, size)) @ r.standard_normal((size, size))
    return (mixed + 30 * r.standard_normal(size)).astype(np.float32)


def statistics(x, *cuts):
    made = FeatureStatistics(x.shape[1])
    for part in np.split(x, cuts):
        made.add(part)
    return made


def gaussian(mean, covariance):
    return SimpleNamespace(mean=np.asarray(mean, float), covariance=np.asarray(covariance, float))


def random_covariance(seed, size, rank=None):
    factor = np.random.default_rng(seed).standard_normal((size, rank or 2 * size))
    return factor @ factor.T / size


def assert_same_statistics(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    scale = np.abs(b.scatter).max()
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=0, atol=1e-12 * scale)


@given(st.lists(st.integers(0, 50), max_size=6))
@settings(max_examples=30, deadline=None)
def test_statistics_are_numpys_however_features_are_cut_into_batches(cuts):
    x = features(0, 50)
    found = statistics(x, *sorted(cuts))
    exact = x.astype(np.float64)
    assert found.count == 50
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    covariance = np.cov(exact, rowvar=False)
    scale = np.abs(covariance).max()
    np.testing.assert_allclose(found.covariance, covariance, rtol=0, atol=1e-12 * scale)


def test_a_large_mean_costs_no_digits():
    x = features(0, 50).astype(np.float64)
    moved = statistics(x + 1e6, 7, 30).covariance
    np.testing.assert_allclose(moved, statistics(x).covariance, rtol=1e-7)


@pytest.mark.parametrize("first", [0, 1, 20, 50])
def test_merging_is_seeing_all(first):
    x = features(1, 50)
    a, b = statistics(x[:first], 5), statistics(x[first:], 9)
    before = b.arrays()
    a.merge(b)
    assert_same_statistics(a, statistics(x))
    for name, array in b.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_nothing_joins_nothing():
    a, b = FeatureStatistics(3), FeatureStatistics(3)
    a.merge(b)
    a.add(np.zeros((0, 3)))
    assert a.count == 0
    assert not a.scatter.any()


def test_stored_statistics_go_on_where_they_were():
    x = features(2, 30)
    stopped = statistics(x[:11])
    arrays = stopped.arrays()
    restored = FeatureStatistics.from_arrays(arrays)
    for each in (stopped, restored):
        each.add(x[11:])
    assert_same_statistics(restored, statistics(x))
    np.testing.assert_array_equal(restored.scatter, stopped.scatter)
    # What was stored is not what goes on.
    assert arrays["count"] == 11
    np.testing.assert_array_equal(arrays["scatter"], statistics(x[:11]).scatter)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_no_covariance(count):
    made = statistics(features(0, count))
    with pytest.raises(ValueError, match=f"{count} images have no covariance: at least 2"):
        _ = made.covariance


def test_what_cannot_be_features_is_named_and_not_taken_in():
    made = FeatureStatistics(3)
    for wrong, message in (
        (np.zeros((2, 4)), r"features of shape \(2, 4\), not \[images, 3\]"),
        (np.zeros(3), r"features of shape \(3,\)"),
        (np.array([[0, np.nan, 0]]), "not finite"),
        (np.array([[0, np.inf, 0]]), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            made.add(wrong)
    with pytest.raises(ValueError, match="4 features do not join 3"):
        made.merge(FeatureStatistics(4))
    assert made.count == 0
    with pytest.raises(ValueError, match="of 2 features and 3"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))


def published(a, b):
    """pytorch-fid's formula."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)
    return np.sum((a.mean - b.mean) ** 2) + trace


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("size", [1, 5, 40])
def test_equals_the_published_formula(size, scale):
    for seed in range(3):
        a, b = (statistics(scale * features(2 * seed + i, 3 * size + 2, size)) for i in range(2))
        # Without the means, whose distance would hide the rest.
        for mean in (a.mean, b.mean):
            moved = gaussian(mean, a.covariance)
            np.testing.assert_allclose(frechet_distance(moved, b), published(moved, b), rtol=1e-5)


def test_is_symmetric_and_zero_for_itself():
    for rank in (5, 12, 30):
        a, b = (gaussian(np.full(12, i), random_covariance(i, 12, rank)) for i in range(2))
        np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-6)
        assert 0 <= frechet_distance(a, a) < 1e-6 * np.trace(a.covariance)


def test_of_equal_covariances_is_the_square_of_the_means_distance():
    covariance = random_covariance(0, 6)
    a, b = gaussian(np.zeros(6), covariance), gaussian([3, 0, 0, 0, -4, 0], covariance)
    np.testing.assert_allclose(frechet_distance(a, b), 25, rtol=1e-9)


def test_of_diagonal_covariances_is_that_of_the_standard_deviations():
    p, q = np.random.default_rng(0).uniform(0, 3, (2, 9))
    p[0] = q[1] = p[2] = q[2] = 0
    a, b = gaussian(np.ones(9), np.diag(p**2)), gaussian(np.ones(9), np.diag(q**2))
    np.testing.assert_allclose(frechet_distance(a, b), np.sum((p - q) ** 2), rtol=1e-6)


def test_of_fewer_images_than_features():
    """The same distribution within a subspace has the same distance."""
    few, many, rank = 6, 64, 4
    a, b = (gaussian(np.arange(few) * i, random_covariance(i, few, rank)) for i in range(2))
    basis, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((many, few)))
    wide = [gaussian(basis @ g.mean, basis @ g.covariance @ basis.T) for g in (a, b)]
    np.testing.assert_allclose(frechet_distance(*wide), frechet_distance(a, b), rtol=1e-6)
    # In subspaces that share no direction nothing is shared.
    half = many // 2
    upper, lower = np.zeros((2, many, many))
    upper[:half, :half], lower[half:, half:] = (random_covariance(i, half) for i in range(2))
    apart = frechet_distance(gaussian(np.zeros(many), upper), gaussian(np.zeros(many), lower))
    np.testing.assert_allclose(apart, np.trace(upper) + np.trace(lower), rtol=1e-6)
    # As measured from images: one covariance has no variance where the other has.
    x, y = features(0, 30, many), features(1, 9, many)
    for p, q in ((x, y), (y, x), (x, features(2, 30, many))):
        found = frechet_distance(statistics(p), statistics(q))
        np.testing.assert_allclose(found, by_singular_values(p, q), rtol=1e-6)


def by_singular_values(x, y):
    """The last trace as the sum of singular values of the two sets' deviations."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    p, q = (z - z.mean(axis=0) for z in (x, y))
    shared = np.linalg.norm(p @ q.T, "nuc") / np.sqrt((len(p) - 1) * (len(q) - 1))
    own = np.sum(p**2) / (len(p) - 1) + np.sum(q**2) / (len(q) - 1)
    return np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + own - 2 * shared


def test_does_not_change_what_it_compares():
    a, b = statistics(features(0, 9)), statistics(features(1, 9))
    before = [s.arrays() for s in (a, b)]
    frechet_distance(a, b)
    for arrays, s in zip(before, (a, b), strict=True):
        for name, array in s.arrays().items():
            np.testing.assert_array_equal(array, arrays[name])
