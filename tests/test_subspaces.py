"""Angles between subspaces against planted ones and SciPy's; R^2 and retrieval by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from efae_jax.metrics.subspaces import principal_angles, r_squared, recall, retrieval_ranks


def rotation(channels, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((channels, channels)))[0]


def at_angles(degrees, channels, seed):
    """Orthonormal rows of two subspaces at those angles, each in a basis of its own."""
    count = len(degrees)
    Q, (A, B) = rotation(channels, seed), (rotation(count, seed + i) for i in (1, 2))
    turn = np.radians(degrees)[:, None]
    first, second = Q[:count], Q[count : 2 * count]
    return A @ first, B @ (np.cos(turn) * first + np.sin(turn) * second)


# ---- angles


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 90), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 1000)
)  # fmt: skip
def test_planted_angles_are_found_largest_first(degrees, more, seed):
    a, b = at_angles(degrees, 2 * len(degrees) + more, seed)
    wanted = np.sort(degrees)[::-1]
    np.testing.assert_allclose(principal_angles(a, b), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(principal_angles(b, a), wanted, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.data())
def test_angles_of_any_two_subspaces_are_scipys(channels, data):
    count, seed = data.draw(st.integers(1, channels)), data.draw(st.integers(0, 1000))
    a, b = rotation(channels, seed)[:count], rotation(channels, seed + 1)[:count]
    wanted = np.degrees(subspace_angles(a.T, b.T))
    # SciPy takes some small angles from cosines, which leaves sqrt(2^-52) radians.
    np.testing.assert_allclose(principal_angles(a, b), wanted, rtol=0, atol=1e-5)
    # In more than half of the channels two subspaces share some directions.
    shared = max(2 * count - channels, 0)
    np.testing.assert_allclose(principal_angles(a, b)[count - shared :], 0, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-10, 1e-6, 1e-3, 44.0, 45.0, 46.0, 89.999999, 90 - 1e-10])
def test_tiny_angles_and_their_complements_keep_their_digits(angle):
    a, b = at_angles([angle, angle / 2], 6, 3)
    rounding = 1e-12
    np.testing.assert_allclose(
        principal_angles(a, b), [angle, angle / 2], rtol=1e-12, atol=rounding
    )


def test_equal_and_orthogonal_subspaces():
    Q = rotation(5, 0)
    np.testing.assert_allclose(principal_angles(Q[:2], rotation(2, 1) @ Q[:2]), 0, atol=1e-12)
    np.testing.assert_allclose(principal_angles(Q[:2], Q[2:4]), 90, rtol=1e-12)
    np.testing.assert_allclose(principal_angles(Q, Q[::-1]), 0, atol=1e-12)  # the whole space
    single = Q[:2].astype(np.float32)  # as a basis comes
    assert principal_angles(single, -single[::-1]).max() < 1e-5


def test_what_spans_no_subspace_is_refused():
    Q = rotation(4, 0)
    for other in (Q[:3], Q[:2, :3], Q[0]):
        with pytest.raises(ValueError, match="need two"):
            principal_angles(Q[:2], other)
    with pytest.raises(ValueError, match="need two"):
        principal_angles(Q[0], Q[0])
    for bad in (1.01 * Q[:2], Q[[0, 0]], np.full((2, 4), np.nan)):
        for pair in ((bad, Q[:2]), (Q[:2], bad)):
            with pytest.raises(ValueError, match="not orthonormal"):
                principal_angles(*pair)


# ---- R^2


def test_r_squared_in_closed_form():
    rng = np.random.default_rng(0)
    target = rng.standard_normal((50, 3)).astype(np.float32)
    mean = target.mean(axis=0)
    spread = np.square(target.astype(np.float64) - mean).sum()
    assert r_squared(target, target, mean) == 1
    assert r_squared(np.tile(mean, (50, 1)), target, mean) == pytest.approx(0, abs=1e-6)
    # A predictor that errs by the same everywhere; by half of the distance from the mean.
    shifted = 1 - 50 * 3 * 0.5**2 / spread
    assert r_squared(target + np.float32(0.5), target, mean) == pytest.approx(shifted, abs=1e-6)
    halfway = (target + mean) / 2
    left = np.square(halfway.astype(np.float64) - target).sum()  # in float32: 1e-8 away
    assert r_squared(halfway, target, mean) == pytest.approx(1 - left / spread, abs=1e-12)
    assert r_squared(halfway, target, mean) == pytest.approx(0.75, abs=1e-6)
    assert r_squared(-target + 2 * mean, target, mean) == pytest.approx(-3, abs=1e-5)
    # A mean that lies elsewhere (of other examples) leaves more to be told.
    elsewhere = mean + 2
    assert r_squared(halfway, target, elsewhere) == pytest.approx(
        1 - spread / 4 / (spread + 50 * 3 * 4), abs=1e-6
    )


def test_r_squared_sums_over_dimensions_and_in_float64():
    """Not the mean of each dimension's; and a large common part costs no digits."""
    target = np.array([[0, 10.0], [1, -10]])
    found = np.array([[0.5, 10.0], [0.5, -10]])
    mean = target.mean(axis=0)
    assert r_squared(found, target, mean) == pytest.approx(1 - 0.5 / 200.5, abs=1e-12)
    n = 200_000
    far = np.full((n, 1), 1e4, np.float32)
    far[::2] += 1
    assert r_squared(far, far, np.float32([1e4])) == 1
    assert r_squared(far, far - 0.25, np.float32([1e4 - 0.25])) == pytest.approx(
        1 - n / 16 / (n / 2), abs=1e-6
    )


# ---- retrieval


def brute_force(found, candidates, own):
    ranks = []
    for e, mine in zip(found, own, strict=True):
        distances = [np.square(e.astype(np.float64) - c).sum() for c in candidates]
        nearest = min((distances[i] for i in mine), default=np.inf)
        ranks.append(sum(d <= nearest for i, d in enumerate(distances) if i not in mine))
    return ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.integers(0, 999), st.booleans())
def test_ranks_are_those_of_brute_force(count, others, block, seed, lattice):
    rng = np.random.default_rng(seed)
    found, candidates = rng.standard_normal((count, 2)), rng.standard_normal((others, 2))
    if lattice:  # ties without end
        found, candidates = found.round(), candidates.round()
    own = [
        set(rng.choice(others, rng.integers(0, others + 1), replace=False).tolist())
        for _ in range(count)
    ]
    wanted = brute_force(found, candidates, own)
    numbers = np.full((count, others + 1), -1)
    for row, mine in zip(numbers, own, strict=True):
        row[rng.choice(others + 1, len(mine), replace=False)] = list(mine)
    assert retrieval_ranks(found, candidates, numbers, block).tolist() == wanted
    which = np.array([[i in mine for i in range(others)] for mine in own])
    assert retrieval_ranks(found, candidates, which, block).tolist() == wanted


def test_ranks_by_hand():
    candidates = np.array([[0.0], [1], [2], [3]])
    found = np.array([[0.1], [0.1], [0.1], [1.5], [1.5]])
    own = np.array([[0, -1], [3, 1], [3, -1], [1, -1], [1, 2]])
    # A tie with its own counts against it; two of its own do not count against each other.
    assert retrieval_ranks(found, candidates, own).tolist() == [0, 1, 3, 1, 0]
    assert retrieval_ranks(found[:1], candidates, np.array([[-1]])).tolist() == [4]


def test_what_tells_no_candidates_apart_finds_nothing():
    ranks = retrieval_ranks(np.zeros((6, 3)), np.eye(3), np.arange(6)[:, None] % 3)
    assert ranks.tolist() == [2] * 6
    assert recall(ranks, 1) == 0


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_finds_nothing(value):
    found = np.array([[value, 0], [0, 1.0]])
    ranks = retrieval_ranks(found, np.eye(2), np.array([[0], [1]]))
    assert ranks.tolist() == [1, 0]


def test_neighbours_are_told_apart_far_from_the_origin():
    rng = np.random.default_rng(1)
    candidates = 1e3 + 1e-3 * rng.integers(-500, 500, (40, 8))
    found = candidates[:, :] + 1e-4
    assert not retrieval_ranks(found, candidates, np.arange(40)[:, None]).any()


def test_recall_is_the_share_below_k():
    ranks = np.array([0, 0, 1, 4, 5, 40])
    assert [recall(ranks, k) for k in (1, 2, 5, 6, 100)] == [2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]
