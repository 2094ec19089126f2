"""Orthonormal bases: the laws of Q, the signs that keep a subspace, what a group mixes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import SHARED, needs

from efae_jax.groups import (
    block_leakage,
    change_basis,
    group,
    is_block_diagonal,
    orthogonality_error,
    qr_basis,
    representation,
)

laws = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)
C = 6
REP = representation(group("z2xz2"), "2*trivial + 2*sign_h + sign_v + sign_hv")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(seed, side=C):
    """A random orthogonal matrix, by other means than a QR decomposition."""
    u, _, v = np.linalg.svd(normal(seed, side, side))
    return u @ v


def degrees(A, B):
    """The largest principal angle between the spans of the orthonormal rows of A and of B."""
    sine = np.linalg.norm(B - B @ A.T @ A, 2)
    return np.degrees(np.arcsin(min(1.0, sine)))


def orthonormal_rows(W):
    return np.linalg.qr(W.T)[0].T


def block_diagonal(A, B):
    zero = np.zeros((len(A), len(B)))
    return np.block([[A, zero], [zero.T, B]])


@laws
@given(seed=seeds, side=sides)
def test_q_is_orthogonal_and_r_triangular_with_a_positive_diagonal(seed, side):
    W = normal(seed, side, side)
    for Q, tolerance in ((qr_basis(W), 1e-12), (qr_basis(jnp.asarray(W, jnp.float32)), 1e-4)):
        R = np.asarray(Q, np.float64).T @ W
        np.testing.assert_allclose(np.tril(R, -1), 0, atol=tolerance)
        assert (np.diagonal(R) > -tolerance).all()
        assert orthogonality_error(np.asarray(Q)) < min(tolerance, 1e-5)


@laws
@given(seed=seeds, side=sides)
def test_an_orthogonal_matrix_is_its_own_basis(seed, side):
    """A reflection, too; and turning W turns Q: neither holds with any sign left to chance."""
    P = rotation(seed, side)
    for W in (P, np.diag([-1] + [1] * (side - 1)) @ P):
        np.testing.assert_allclose(qr_basis(W), W, rtol=0, atol=1e-12)
    W = normal(seed + 1, side, side) + 3 * np.eye(side)
    np.testing.assert_allclose(qr_basis(P @ W), P @ qr_basis(W), rtol=0, atol=1e-9)


def test_a_column_of_zeros_has_no_sign_and_gives_an_orthogonal_matrix_all_the_same():
    Q = qr_basis(np.array([[0, 0], [0, 2]]))
    np.testing.assert_allclose(np.abs(Q), np.eye(2), atol=1e-12)


def test_numbers_on_the_host_are_computed_in_float64():
    W = normal(0, 30, 30).astype(np.float32)
    assert orthogonality_error(qr_basis(W)) < 1e-14
    error = np.abs(W.astype(np.float64).T @ W - np.eye(30)).max()
    assert orthogonality_error(W) == pytest.approx(error, rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 2, 5])
def test_the_first_rows_are_lost_without_the_signs(seed, k):
    """Of a W near to orthogonal: the raw routine moves the subspace by tens of degrees."""
    W = rotation(seed, 4) + 1e-3 * normal(seed + 9, 4, 4)
    raw, R = np.linalg.qr(W)
    assert len(set(np.sign(np.diagonal(R)))) == 2, "this W would show nothing"
    learnt = orthonormal_rows(W[:k])
    assert degrees(learnt, raw[:k]) > 20
    assert degrees(learnt, qr_basis(W)[:k]) < 1
    assert degrees(learnt, np.asarray(jax.jit(qr_basis)(jnp.asarray(W)))[:k]) < 1


@needs("fixtures/sketch.npz")
def test_the_published_basis_with_the_signs_fixed():
    golden = np.load(SHARED / "fixtures" / "sketch.npz")
    W, theirs = golden["sd/z_transform.weight"], golden["out/q_of_qr"]
    signs = np.sign(np.diagonal(theirs.T @ W))
    assert set(signs) == {-1, 1}
    np.testing.assert_allclose(qr_basis(W), theirs * signs, rtol=0, atol=1e-4)


@laws
@given(seed=seeds, scale=st.floats(0.1, 3))
def test_the_error_is_the_largest_of_the_gram_matrix(seed, scale):
    W = scale * rotation(seed)
    expected = abs(scale**2 - 1)
    assert orthogonality_error(W) == pytest.approx(expected, abs=1e-12)
    assert orthogonality_error(jnp.asarray(W)) == pytest.approx(expected, abs=1e-5)
    W = np.eye(3)
    W[0, 1] = -0.25  # off the diagonal, of either sign
    assert orthogonality_error(W) == pytest.approx(0.25)


@laws
@given(seed=seeds, angle=st.floats(-4, 4))
def test_leakage_of_a_turned_pair_of_channels(seed, angle):
    """diag(1, -1), turned by an angle, has -/+ sin(2 angle) off its diagonal."""
    rho = representation(group("z2_h"), "trivial + sign").matrices
    Q = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    found = block_leakage(rho, Q, 1)
    np.testing.assert_allclose(found, [0, abs(np.sin(2 * angle))], atol=1e-5)


@laws
@given(seed=seeds, k=st.integers(1, C - 1))
def test_leakage_depends_on_the_two_subspaces_alone(seed, k):
    Q = rotation(seed)
    found = np.asarray(block_leakage(REP.matrices, Q, k))
    M = np.asarray(change_basis(REP.matrices, Q))
    inside = (M[:, :k, :k] ** 2).sum((1, 2)) + (M[:, k:, k:] ** 2).sum((1, 2))
    np.testing.assert_allclose(found**2 + inside / C, 1, atol=1e-5)
    turned = block_diagonal(rotation(seed + 1, k), rotation(seed + 2, C - k)) @ Q
    np.testing.assert_allclose(block_leakage(REP.matrices, turned, k), found, atol=1e-5)
    exchanged = np.roll(Q, -k, axis=0)
    np.testing.assert_allclose(block_leakage(REP.matrices, exchanged, C - k), found, atol=1e-5)


@laws
@given(seed=seeds)
def test_a_basis_is_block_diagonal_where_it_keeps_the_summands_apart(seed):
    """The first two channels are trivial, the third and fourth sign_h: any bases of those."""
    Q = block_diagonal(rotation(seed, 2), np.eye(4))
    Q = block_diagonal(np.eye(4)[[2, 3, 0, 1]], np.eye(2)) @ Q
    assert is_block_diagonal(REP.matrices, Q, 2)
    assert is_block_diagonal(REP.matrices, Q.astype(np.float32), 4)
    turned = Q @ block_diagonal(rotation(seed, 4), np.eye(2))
    assert not is_block_diagonal(REP.matrices, turned, 2)
    assert is_block_diagonal(REP.matrices, turned, 2, tolerance=1)
    np.testing.assert_allclose(block_leakage(REP.matrices, turned, 2)[::2], 0, atol=1e-6)


def test_an_exchange_leaks_everything_and_one_element_is_enough():
    rho = representation(group("z2_v"), "regular").matrices
    np.testing.assert_allclose(block_leakage(rho, np.eye(2), 1), [0, 1])
    assert not is_block_diagonal(rho, np.eye(2), 1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"qr_basis: got shape \(2, 3\), need a square"):
        qr_basis(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"orthogonality_error: got shape \(3,\)"):
        orthogonality_error(np.zeros(3))
    for k in (0, C):
        with pytest.raises(ValueError, match=f"k={k}, allowed are 1 to 5"):
            block_leakage(REP.matrices, np.eye(C), k)
    with pytest.raises(ValueError, match=r"matrices \(4, 6, 6\) and a basis \(4, 4\)"):
        block_leakage(REP.matrices, np.eye(4), 2)
