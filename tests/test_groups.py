"""Laws of the groups and of their actions on images and latents."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efae_jax.groups import (
    GROUPS,
    act_image,
    act_latent,
    change_basis,
    group,
    orthogonal,
    representation,
)
from efae_jax.groups.elements import Group

BATCH, SIDE = 4, 3  # one shape each, so that every jitted action compiles once
laws = settings(max_examples=8, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
draws = st.lists(st.integers(0, 7), min_size=BATCH, max_size=BATCH)  # reduced modulo the order

# What every element does to one [H, W, C] image, in NumPy's words.
REFERENCE = {
    "e": lambda x: x,
    "h": np.fliplr,
    "v": np.flipud,
    "r90": lambda x: np.rot90(x, 1),
    "r180": lambda x: np.rot90(x, 2),
    "r270": lambda x: np.rot90(x, 3),
    "t": lambda x: x.transpose(1, 0, 2),
    "a": lambda x: np.rot90(x, 2).transpose(1, 0, 2),
}
IRREPS = {
    "trivial": ["trivial"],
    "z2_h": ["trivial", "sign"],
    "z2_v": ["trivial", "sign"],
    "z2xz2": ["trivial", "sign_h", "sign_v", "sign_hv"],
    "c4": ["freq0", "freq1", "freq2"],
    "d4": ["A1", "A2", "B1", "B2", "E"],
}
# (group, representation, how the basis is learned): every kind for every group that has it.
CASES = [(name, "2*" + " + ".join(irreps), None) for name, irreps in IRREPS.items()]
CASES += [(name, "trivial + regular", None) for name in IRREPS]
CASES += [("z2_h", "2*conjugate", None), ("z2_v", "conjugate + sign", None)]
CASES += [("z2xz2", "conjugate_h + conjugate_v", None), ("c4", "rope(0,1,-1,2) + trivial", None)]
CASES += [(name, " + ".join(irreps), "cayley") for name, irreps in IRREPS.items()][1:]
CASES += [(name, "regular", "expm") for name in IRREPS][1:]
on_every_group = pytest.mark.parametrize("G", GROUPS.values(), ids=GROUPS)
on_every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@functools.cache
def matrices_of(case: tuple[str, str, str | None]) -> np.ndarray | jax.Array:
    name, spec, basis = case
    matrices = representation(group(name), spec).matrices
    if basis is None:
        return matrices
    learn = jax.jit(lambda free: change_basis(matrices, orthogonal(free, basis)))
    return learn(normal(1, *matrices.shape[1:]))


@functools.cache
def jitted_image_action(G: Group):
    return jax.jit(functools.partial(act_image, G))


@functools.cache
def jitted_latent_action(case):
    matrices = matrices_of(case)
    return jax.jit(lambda g_B, z: act_latent(group(case[0]), matrices, g_B, z))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def indices(G: Group, draw: list[int]) -> np.ndarray:
    return np.array(draw) % G.order


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


# The groups themselves


@on_every_group
def test_table_is_that_of_the_named_image_transformations(G):
    x = np.arange(9).reshape(3, 3, 1)
    images = [REFERENCE[element](x).tobytes() for element in G.elements]
    assert len(set(images)) == G.order
    for a, name_a in enumerate(G.elements):
        for b, name_b in enumerate(G.elements):
            product = REFERENCE[name_a](REFERENCE[name_b](x)).tobytes()
            assert G.table[a, b] == images.index(product)
        assert G.table[a, G.inverse[a]] == 0


def test_groups_hold_the_elements_they_are_named_after():
    assert {name: G.elements for name, G in GROUPS.items()} == {
        "trivial": ("e",),
        "z2_h": ("e", "h"),
        "z2_v": ("e", "v"),
        "z2xz2": ("e", "h", "v", "r180"),
        "c4": ("e", "r90", "r180", "r270"),
        "d4": ("e", "r90", "r180", "r270", "h", "v", "t", "a"),
    }
    assert [name for name, G in GROUPS.items() if G.needs_square] == ["c4", "d4"]
    assert all(group(name) is G and G.name == name for name, G in GROUPS.items())


# Action on images


@on_every_group
@laws
@given(seed=seeds, draw=draws)
def test_a_batch_of_images_is_acted_on_element_by_element(G, seed, draw):
    x, g = normal(seed, BATCH, SIDE, SIDE, 2), indices(G, draw)
    expected = np.stack([REFERENCE[G.elements[i]](x_i) for i, x_i in zip(g, x, strict=True)])
    np.testing.assert_array_equal(jitted_image_action(G)(g, x), expected)


@on_every_group
@laws
@given(seed=seeds, draw_a=draws, draw_b=draws)
def test_image_action_composes_in_order_and_inverts(G, seed, draw_a, draw_b):
    act, x = jitted_image_action(G), normal(seed, BATCH, SIDE, SIDE, 2)
    a, b = indices(G, draw_a), indices(G, draw_b)
    np.testing.assert_array_equal(act(a, act(b, x)), act(G.table[a, b], x))
    np.testing.assert_array_equal(act(G.inverse[a], act(a, x)), x)
    np.testing.assert_array_equal(act(np.zeros(BATCH, int), x), x)


@on_every_group
def test_image_action_agrees_under_jit_vmap_and_grad(G):
    x, w = normal(0, BATCH, SIDE, SIDE, 2), normal(1, BATCH, SIDE, SIDE, 2)
    g = indices(G, [1, 6, 3, 2])
    expected = jitted_image_action(G)(g, x)
    np.testing.assert_array_equal(act_image(G, g, x), expected)
    one_by_one = jax.jit(jax.vmap(lambda i, x: act_image(G, i[None], x[None])[0]))
    np.testing.assert_array_equal(one_by_one(g, x), expected)
    # A permutation is orthogonal: the gradient of <w, g x> is g^-1 w.
    gradient = jax.jit(jax.grad(lambda x: jnp.vdot(w, act_image(G, g, x))))(x)
    np.testing.assert_array_equal(gradient, act_image(G, G.inverse[g], w))


@pytest.mark.parametrize("k", range(4))
def test_r90_is_rot90(k):
    x = normal(k, BATCH, SIDE, SIDE, 2)
    turned = act_image(group("c4"), np.full(BATCH, k), x)
    np.testing.assert_array_equal(turned, jnp.rot90(x, k=k, axes=(1, 2)))


def test_flips_act_on_images_that_are_not_square():
    x, G = normal(0, BATCH, 2, 5, 3), group("z2xz2")
    expected = np.stack([x[0], x[1][:, ::-1], x[2][::-1], x[3][::-1, ::-1]])
    np.testing.assert_array_equal(act_image(G, np.arange(4), x), expected)


@pytest.mark.parametrize(
    ("name", "transposes", "reversals"),
    [
        ("trivial", 0, 0),
        ("z2_h", 0, 1),
        ("z2_v", 0, 1),
        ("z2xz2", 0, 2),
        ("c4", 1, 2),
        ("d4", 1, 2),
    ],
)
def test_action_is_selects_without_branch(name, transposes, reversals):
    x, g = normal(0, BATCH, SIDE, SIDE, 1), np.zeros(BATCH, int)
    program = str(jax.make_jaxpr(functools.partial(act_image, group(name)))(g, x))
    assert program.count(" transpose[") == transposes
    assert program.count(" rev[") == reversals
    assert "cond[" not in program
    assert "while[" not in program


# Action on latents


@on_every_case
@laws
@given(seed=seeds, draw=draws)
def test_latent_action_permutes_positions_and_applies_rho(case, seed, draw):
    G, rho, act = group(case[0]), np.asarray(matrices_of(case)), jitted_latent_action(case)
    g, z = indices(G, draw), normal(seed, BATCH, SIDE, SIDE, rho.shape[-1])
    expected = np.stack([REFERENCE[G.elements[i]](z_i) for i, z_i in zip(g, z, strict=True)])
    expected = np.einsum("bij,bhwj->bhwi", rho[g], expected, dtype=np.float64)
    close(act(g, z), expected)
    # A vector is the case of one position.
    close(act(g, z[:, 0, 0]), np.einsum("bij,bj->bi", rho[g], z[:, 0, 0]))


@on_every_case
@laws
@given(seed=seeds, draw_a=draws, draw_b=draws)
def test_latent_action_composes_in_order_inverts_and_keeps_the_norm(case, seed, draw_a, draw_b):
    G, act, channels = group(case[0]), jitted_latent_action(case), matrices_of(case).shape[-1]
    a, b, z = indices(G, draw_a), indices(G, draw_b), normal(seed, BATCH, SIDE, SIDE, channels)
    for latents in (z, z[:, 0, 0]):
        # The product table of the images: latents compose in the same order.
        close(act(a, act(b, latents)), act(G.table[a, b], latents))
        close(act(G.inverse[a], act(a, latents)), latents)
        close(act(np.zeros(BATCH, int), latents), latents)
        before, after = (np.square(y, dtype=np.float64) for y in (latents, act(a, latents)))
        axes = tuple(range(1, latents.ndim))
        np.testing.assert_allclose(after.sum(axes), before.sum(axes), rtol=1e-5)


@on_every_case
def test_latent_action_agrees_under_jit_vmap_and_grad(case):
    G, rho, g = group(case[0]), matrices_of(case), indices(group(case[0]), [1, 6, 3, 2])
    z, w = normal(0, BATCH, SIDE, SIDE, rho.shape[-1]), normal(1, BATCH, SIDE, SIDE, rho.shape[-1])
    expected = jitted_latent_action(case)(g, z)
    close(act_latent(G, rho, g, z), expected)
    one_by_one = jax.jit(jax.vmap(lambda i, z: act_latent(G, rho, i[None], z[None])[0]))
    close(one_by_one(g, z), expected)
    # rho is orthogonal: the gradient of <w, g z> is g^-1 w.
    gradient = jax.jit(jax.grad(lambda z: jnp.vdot(w, act_latent(G, rho, g, z))))(z)
    close(gradient, jitted_latent_action(case)(G.inverse[g], w))


def test_signs_are_a_multiplication_and_matrices_are_not_rounded():
    g = np.zeros(BATCH, int)

    def program(name, spec):
        G, rep = group(name), representation(group(name), spec)
        assert rep.is_diagonal == (spec != "freq1")
        z = jnp.ones((BATCH, rep.channels), jnp.bfloat16)
        assert act_latent(G, rep.matrices, g, z).dtype == jnp.bfloat16
        return str(jax.make_jaxpr(lambda z: act_latent(G, rep.matrices, g, z))(z))

    assert "dot_general" not in program("z2xz2", "trivial + sign_h + conjugate_v")
    assert "HIGHEST" in program("c4", "freq1")


# Errors


X, G0 = np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, int)
C4, Z2 = group("c4"), group("z2_h")
RHO = representation(Z2, "2*trivial + sign").matrices


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group("d5"), "allowed are trivial, z2_h, z2_v, z2xz2, c4, d4"),
        (lambda: act_image(C4, G0, X[:, :3]), "needs square ones: got height 3, width 4"),
        (lambda: act_image(group("d4"), G0, X[:, :, :3]), "needs square ones"),
        (lambda: act_image(Z2, G0, X[0]), r"need \[batch, height, width, channels\]"),
        (lambda: act_image(Z2, np.zeros(3, int), X), "each of the 2 examples"),
        (lambda: act_image(Z2, np.zeros(2), X), "need one integer"),
        (lambda: act_latent(Z2, RHO, 0, X), "need one integer"),
        (lambda: act_latent(Z2, RHO, np.zeros(1, int), X[:, 0, 0]), "need one integer"),
        (lambda: act_latent(C4, RHO[[0, 0, 0, 0]], G0, X[:, :3]), "needs square ones"),
        (lambda: act_latent(Z2, RHO, G0, X[..., :2]), "latents have 2 channels"),
        (lambda: act_latent(C4, RHO, G0, X), r"matrices of group 'c4' are \(2, 3, 3\)"),
        (lambda: act_latent(Z2, RHO, G0, X[0]), r"\[batch, \(height, width,\) channels\]"),
        (lambda: orthogonal(np.zeros((2, 3))), "square matrix"),
        (lambda: orthogonal(np.zeros((2, 2)), "qr"), "allowed are cayley, expm"),
    ],
)
def test_mistakes_end_in_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
