"""Representations: laws, irreducibility, what each name means, and learned bases."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efae_jax.groups import (
    GROUPS,
    act_latent,
    change_basis,
    group,
    orthogonal,
    representation,
)

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
BATCH, SIDE = 4, 3
laws = settings(max_examples=8, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
IRREPS = {
    "trivial": ["trivial"],
    "z2_h": ["trivial", "sign"],
    "z2_v": ["trivial", "sign"],
    "z2xz2": ["trivial", "sign_h", "sign_v", "sign_hv"],
    "c4": ["freq0", "freq1", "freq2"],
    "d4": ["A1", "A2", "B1", "B2", "E"],
}
NAMES = {
    name: [
        *irreps,
        "trivial",
        "regular",
        *{"c4": ["sign", "rope(1)", "rope(0,3,-2)"]}.get(name, []),
    ]
    for name, irreps in IRREPS.items()
}
NAMES["z2_h"] += ["conjugate"]
NAMES["z2_v"] += ["conjugate"]
NAMES["z2xz2"] += ["conjugate_h", "conjugate_v"]
on_every_group = pytest.mark.parametrize("G", GROUPS.values(), ids=GROUPS)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


# What the names mean


@pytest.mark.parametrize(("name", "spec"), [(G, spec) for G in NAMES for spec in NAMES[G]])
def test_named_representations_are_orthogonal_homomorphisms(name, spec):
    G, rep = group(name), representation(group(name), spec)
    products = np.einsum("aij,bjk->abik", rep.matrices, rep.matrices)
    np.testing.assert_array_equal(products, rep.matrices[G.table])
    one = np.broadcast_to(np.eye(rep.channels), rep.matrices.shape)
    np.testing.assert_array_equal(rep.matrices[0], one[0])
    np.testing.assert_array_equal(rep.matrices @ rep.matrices.swapaxes(1, 2), one)
    assert rep.matrices.dtype == np.float32


@on_every_group
def test_irreducible_representations_are_irreducible_inequivalent_and_all(G):
    chi = np.array(
        [np.trace(representation(G, s).matrices, axis1=1, axis2=2) for s in IRREPS[G.name]]
    )
    inner = chi @ chi.T / G.order
    # Over the reals <chi, chi> is 1, or 2 where the representation is a complex pair, which the
    # Frobenius-Schur indicator tells (0 instead of 1); C4's rotation is the only one here.
    norms = np.array([2.0 if (G.name, s) == ("c4", "freq1") else 1.0 for s in IRREPS[G.name]])
    np.testing.assert_allclose(inner, np.diag(norms), atol=1e-6)
    squares = G.table[np.arange(G.order), np.arange(G.order)]
    np.testing.assert_allclose(chi[:, squares].mean(1), 2 - norms, atol=1e-6)
    dimensions = chi[:, 0]
    assert (dimensions**2 / norms).sum() == G.order
    # regular holds every irreducible representation as often as its dimension (over the complex).
    regular = np.trace(representation(G, "regular").matrices, axis1=1, axis2=2)
    np.testing.assert_allclose(chi @ regular / G.order, dimensions, atol=1e-6)


def test_characters_are_those_of_their_names():
    def rows(name, *specs):
        rho = [representation(group(name), spec).matrices for spec in specs]
        return [np.trace(m, axis1=1, axis2=2).astype(int).tolist() for m in rho]

    assert rows("z2_h", "trivial", "sign") == rows("z2_v", "trivial", "sign") == [[1, 1], [1, -1]]
    flips = rows("z2xz2", "trivial", "sign_h", "sign_v", "sign_hv")
    assert flips == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    turns = rows("c4", "trivial", "freq0", "freq1", "freq2", "sign", "rope(0,1,2,3)")
    ones, signs = [1, 1, 1, 1], [1, -1, 1, -1]
    assert turns == [ones, ones, [2, 0, -2, 0], signs, signs, [8, 0, 0, 0]]
    square = rows("d4", "A1", "trivial", "A2", "B1", "B2", "E")
    assert square[:3] == [[1] * 8, [1] * 8, [1, 1, 1, 1, -1, -1, -1, -1]]
    assert square[3:5] == [[1, -1, 1, -1, 1, 1, -1, -1], [1, -1, 1, -1, -1, -1, 1, 1]]
    assert square[5] == [2, 0, -2, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("name", "spec"), [("c4", "freq1"), ("c4", "rope(1)"), ("d4", "E")])
def test_two_channels_that_turn_are_a_vector_in_the_plane(name, spec):
    # The field p -> (row, column) of p is fixed: rho(g) undoes what g does to positions.
    G, rho = group(name), representation(group(name), spec).matrices
    row, column = np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], indexing="ij")
    field = np.broadcast_to(np.stack([row, column], -1), (G.order, 3, 3, 2))
    np.testing.assert_array_equal(act_latent(G, rho, np.arange(G.order), field), field)


@on_every_group
def test_regular_takes_the_channel_of_b_to_that_of_gb(G):
    rho, one = representation(G, "regular").matrices, np.eye(G.order)
    for g in range(G.order):
        for b in range(G.order):
            np.testing.assert_array_equal(rho[g] @ one[b], one[G.table[g, b]])


@laws
@given(seed=seeds)
def test_flip_conjugates_complex_channels(seed):
    z = normal(seed, 2, SIDE, SIDE, 4)
    as_complex = lambda z: np.asarray(z)[..., ::2] + 1j * np.asarray(z)[..., 1::2]  # noqa: E731
    for name, flip in (("z2_h", np.s_[:, :, ::-1]), ("z2_v", np.s_[:, ::-1])):
        G, rho = group(name), representation(group(name), "2*conjugate").matrices
        flipped = act_latent(G, rho, np.array([1, 1]), z)
        np.testing.assert_array_equal(as_complex(flipped), as_complex(z[flip]).conj())
        np.testing.assert_array_equal(act_latent(G, rho, np.array([1, 1]), flipped), z)
    both = representation(group("z2xz2"), "conjugate_h + conjugate_v").matrices
    pairs = as_complex(z[:, 0, 0])
    for g, conjugated in ((1, [0]), (2, [1]), (3, [0, 1])):
        expected = pairs.copy()
        expected[:, conjugated] = expected[:, conjugated].conj()
        moved = act_latent(group("z2xz2"), both, np.array([g, g]), z[:, 0, 0])
        np.testing.assert_array_equal(as_complex(moved), expected)


@laws
@given(seed=seeds, frequencies=st.lists(st.integers(-5, 5), min_size=1, max_size=5))
def test_rope_turns_each_pair_at_its_frequency(seed, frequencies):
    z = normal(seed, 2 * len(frequencies))
    spec = f"rope({','.join(map(str, frequencies))})"
    rep = representation(group("c4"), spec)
    assert [block.name for block in rep.blocks] == [f"rope({k})" for k in frequencies]
    for turns in range(4):
        moved = rep.matrices[turns] @ z
        expected = (z[::2] + 1j * z[1::2]) * np.exp(0.5j * np.pi * turns * np.array(frequencies))
        close(moved[::2] + 1j * moved[1::2], expected)


@on_every_group
@laws
@given(data=st.data())
def test_sums_are_block_diagonal_in_the_order_of_the_text(G, data):
    copies_and_name = st.tuples(st.integers(0, 3), st.sampled_from(IRREPS[G.name]))
    terms = [(1, "regular"), *data.draw(st.lists(copies_and_name, max_size=4))]
    rep = representation(G, "+".join(f" {copies} *{name} " for copies, name in terms))
    names = [name for copies, name in terms for _ in range(copies)]
    assert [block.name for block in rep.blocks] == names
    rest, start = rep.matrices.copy(), 0
    for name, first, stop in rep.blocks:
        assert first == start
        alone = representation(G, name).matrices
        np.testing.assert_array_equal(rest[:, first:stop, first:stop], alone)
        rest[:, first:stop, first:stop] = 0
        start = stop
    assert start == rep.channels
    assert not rest.any()


# Learned representations


@pytest.mark.parametrize("kind", ["cayley", "expm"])
@pytest.mark.parametrize("size", [0.0, 0.1, 3.0, 1000.0])
def test_learned_basis_is_orthogonal_at_any_size_of_the_parameters(kind, size):
    free = size * normal(0, 6, 6)
    Q = np.asarray(orthogonal(free, kind), float)
    np.testing.assert_allclose(Q.T @ Q, np.eye(6), atol=1e-6)
    assert np.linalg.det(Q) > 0
    assert (np.abs(Q - np.eye(6)).max() > 0.05) == (size > 0)


def test_learned_basis_in_closed_form():
    # The skew part of [[0, -a], [a, 0]] turns by a (expm); by -2 arctan(a) (Cayley).
    a = 0.7
    free = np.array([[0, -2 * a], [0, 0]], np.float32)  # its skew part is half of it and of -^T
    turn = lambda angle: [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]  # noqa: E731
    close(orthogonal(free, "expm"), turn(a))
    close(orthogonal(free, "cayley"), turn(-2 * np.arctan(a)))


@pytest.mark.parametrize("kind", ["cayley", "expm"])
def test_gradient_moves_the_basis_along_the_orthogonal_matrices(kind):
    free, step = 0.5 * normal(0, 5, 5), normal(1, 5, 5)
    make = jax.jit(functools.partial(orthogonal, kind=kind))
    Q, dQ = jax.jvp(make, (free,), (step,))
    close(Q.T @ dQ + dQ.T @ Q, np.zeros((5, 5)))
    difference = (make(free + 1e-2 * step) - make(free - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(dQ, difference, atol=2e-3)
    # The matrices of a learned representation have a gradient through the action as well.
    G, rep = group("d4"), representation(group("d4"), "E + A2 + B1 + B2")
    z, w = normal(2, BATCH, 5), normal(3, BATCH, 5)

    @jax.jit
    def loss(free):
        rho = change_basis(rep.matrices, orthogonal(free, kind))
        return jnp.vdot(w, act_latent(G, rho, np.array([1, 4, 6, 3]), z))

    slope = jnp.vdot(jax.grad(loss)(free), step)
    measured = (loss(free + 1e-2 * step) - loss(free - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(slope, measured, rtol=2e-2)
    assert abs(measured) > 0.1


def test_change_of_basis_is_q_rho_q_transposed():
    rho = representation(group("c4"), "freq1 + trivial").matrices
    Q = np.linalg.qr(normal(0, 3, 3))[0]
    close(change_basis(rho, Q), np.stack([Q @ m @ Q.T for m in rho]))


@pytest.mark.parametrize("kind", ["cayley", "expm"])
def test_no_product_of_matrices_is_left_to_an_accelerators_rounding(kind):
    rho = representation(group("c4"), "freq1").matrices
    program = str(jax.make_jaxpr(lambda free: change_basis(rho, orthogonal(free, kind)))(rho[0]))
    products = program.split(" dot_general[")[1:]
    assert len(products) >= 4  # two of Q rho Q^T, two that refine Q
    assert all("HIGHEST" in product.split("] ")[0].upper() for product in products)


# The representations that known autoencoders use


def test_efae_flips_the_sign_of_the_last_four_of_256_numbers():
    G, rep = group("z2_h"), representation(group("z2_h"), "252*trivial + 4*sign")
    z = normal(0, 2, 256)
    np.testing.assert_array_equal(act_latent(G, rep.matrices, np.array([0, 1]), z)[0], z[0])
    flipped = np.concatenate([z[:, :-4], -z[:, -4:]], 1)
    np.testing.assert_array_equal(act_latent(G, rep.matrices, np.array([1, 1]), z), flipped)


def test_rotation_turns_z2_and_leaves_z1():
    G, rep = group("c4"), representation(group("c4"), "6*trivial + 2*freq1")
    z = normal(0, 4, 10)
    turned = np.asarray(act_latent(G, rep.matrices, np.full(4, 1), z))
    np.testing.assert_array_equal(turned[:, :6], z[:, :6])
    np.testing.assert_array_equal(turned[:, 6::2], -z[:, 7::2])
    np.testing.assert_array_equal(turned[:, 7::2], z[:, 6::2])


def test_auras_card_in_numpy():
    G = group("z2xz2")
    rep = representation(G, "12*trivial + 2*sign_h + 2*sign_v")
    z = normal(0, 1, 4, 6, 16)
    h, v = z[:, :, ::-1].copy(), z[:, ::-1].copy()
    h[..., -4:-2] *= -1
    v[..., -2:] *= -1
    np.testing.assert_array_equal(act_latent(G, rep.matrices, np.array([1]), z), h)
    np.testing.assert_array_equal(act_latent(G, rep.matrices, np.array([2]), z), v)


def test_eq_vae_rotates_positions_only():
    rep = representation(group("c4"), "4*trivial")
    z = normal(0, 1, 4, 4, 4)
    turned = act_latent(group("c4"), rep.matrices, np.array([3]), z)
    np.testing.assert_array_equal(turned, np.rot90(z, 3, axes=(1, 2)))


@pytest.mark.skipif(not FIXTURES.exists(), reason="golden numbers of the originals are not here")
def test_latent_actions_of_the_original_programs():
    z2, aura = group("z2_h"), group("z2xz2")
    golden = np.load(FIXTURES / "efae_mnist.npz")
    rho = representation(z2, "252*trivial + 4*sign").matrices
    flipped = act_latent(z2, rho, np.array([1, 1]), golden["out/latent"])
    np.testing.assert_array_equal(flipped, golden["out/latent_flip_h"])
    golden = np.load(FIXTURES / "aura_vae.npz")
    rho = representation(aura, "12*trivial + 2*sign_h + 2*sign_v").matrices
    z = golden["out/z"].clip(-8, 8).transpose(0, 2, 3, 1)
    for g, name in ((1, "out/z_flip_h"), (2, "out/z_flip_v")):
        moved = act_latent(aura, rho, np.array([g, g]), z)
        np.testing.assert_array_equal(moved.transpose(0, 3, 1, 2), golden[name])


# Errors


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("d4", "A1 + F", r"'F' is not one of trivial, A1, A2, B1, B2, E, regular"),
        ("z2_h", "conjugate_h", "not one of trivial, sign, conjugate, regular"),
        ("c4", "conjugate", r"freq0, freq1, freq2, sign, regular, rope\(k,...\)"),
        ("d4", "rope(1)", "not one of"),
        ("c4", "rope(1,,2)", "whole numbers"),
        ("c4", "rope", "not one of"),
        ("c4", "freq1(2)", "not one of"),
        ("c4", "2*", "not one of"),
        ("c4", "-1*sign", "not one of"),
        ("c4", "", "not one of"),
        ("z2_h", "0*trivial", "no channels"),
    ],
)
def test_unknown_representation_says_what_is_allowed(name, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        representation(group(name), spec)
    assert "\n" not in str(error.value)
