"""TwoNN on data of known dimension."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from efae_jax.metrics.intrinsic_dimension import FirstPoints, two_nn


def embedded(points, size=50, seed=1):
    """Turned and moved into a space of more dimensions."""
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return points @ turn[: points.shape[1]] + 3


def cube(dimension, n=2000, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, dimension))


def sphere(dimension, n=2000, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, dimension + 1))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("points", "dimension"),
    [
        (embedded(cube(2)), 2),
        (embedded(cube(5)), 5),
        (embedded(sphere(2)), 2),
        (embedded(sphere(5)), 5),
        (embedded(np.random.default_rng(0).standard_normal((2000, 5))), 5),
    ],
    ids=["square", "cube5", "sphere2", "sphere5", "gaussian5"],
)
def test_data_of_known_dimension(points, dimension):
    got = two_nn(points)
    assert (got.points, got.duplicates) == (2000, 0)
    np.testing.assert_allclose(got.dimension, dimension, rtol=0.1)


def by_definition(x):
    """All distances, the two smallest of each point, and a least-squares line through 0."""
    distances = np.sort(cdist(x, x), axis=1)
    mu = np.sort(distances[:, 2] / distances[:, 1])
    n = len(mu)
    kept = int(np.floor(0.9 * n))
    empirical = np.arange(1, kept + 1) / n
    slope, *_ = np.linalg.lstsq(np.log(mu[:kept, None]), -np.log(1 - empirical), rcond=None)
    return slope[0]


@pytest.mark.parametrize("n", [3, 37, 200])
def test_equals_the_definition_in_blocks_of_any_size(n):
    x = np.random.default_rng(n).standard_normal((n, 6))
    for block in (1, 7, n, 1000):
        np.testing.assert_allclose(two_nn(x, block).dimension, by_definition(x), rtol=1e-10)


def test_close_neighbours_far_from_zero():
    """Differences keep their distances, |x|^2 + |y|^2 - 2 xy does not."""
    x = cube(2, 300)
    np.testing.assert_allclose(two_nn(1e-5 * x + 1e3).dimension, two_nn(x).dimension, rtol=1e-5)
    apart = np.concatenate([2e-3 * x[:150] - 1e3, 2e-3 * x[150:] + 1e3])
    np.testing.assert_allclose(two_nn(apart).dimension, by_definition(apart), rtol=1e-8)


def test_duplicates_are_dropped_and_counted():
    x = cube(3, 100)
    x[0, 0] = 0
    twice = np.concatenate([x, x[:7], x[:1], x[:1]])
    twice[-1, 0] = -0.0
    got = two_nn(twice)
    assert (got.points, got.duplicates) == (100, 9)
    np.testing.assert_allclose(got.dimension, two_nn(x).dimension, rtol=1e-12)


def test_the_unit_and_the_order_do_not_matter():
    x = cube(4, 200)
    expected = two_nn(x).dimension
    np.testing.assert_allclose(two_nn(-1e4 * x[::-1]).dimension, expected, rtol=1e-9)


def test_what_has_no_answer_is_refused():
    with pytest.raises(ValueError, match="three different points or more; there are 2"):
        two_nn(np.array([[0.0, 1], [0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="equally far"):
        two_nn(np.eye(12))
    with pytest.raises(ValueError, match="not finite"):
        two_nn(np.array([[0.0], [1], [np.nan], [3]]))


def test_the_first_points_do_not_depend_on_how_images_are_cut():
    z = np.random.default_rng(0).standard_normal((9, 2, 3, 4)).astype(np.float32)
    for cuts in ([], [1, 1, 5], [2, 8], [7]):
        kept = FirstPoints(limit=7)
        for part in np.split(z, cuts):
            kept.add(part)
            kept = FirstPoints.from_arrays(kept.arrays())
        np.testing.assert_array_equal(kept.points, z[:7].reshape(7, 24))
    first, second = FirstPoints(7), FirstPoints(7)
    first.add(z[:3])
    second.add(z[3:])
    first.merge(second)
    np.testing.assert_array_equal(first.points, z[:7].reshape(7, 24))
    assert first.count == 7


def test_the_first_points_are_copies():
    z = np.zeros((2, 3), np.float32)
    kept = FirstPoints()
    kept.add(z)
    z[:] = 1
    np.testing.assert_array_equal(kept.points, np.zeros((2, 3)))
    assert FirstPoints().points.shape == (0, 0)
