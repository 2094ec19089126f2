"""Symmetrised encoders, decoders and velocity fields are equivariant, whatever they are made of."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efae_jax.groups import (
    act_image,
    act_latent,
    change_basis,
    group,
    orthogonal,
    representation,
    symmetrize_decoder,
    symmetrize_encoder,
    symmetrize_velocity,
)

BATCH, SIDE, COLOURS = 2, 4, 2
laws = settings(max_examples=5, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
draws = st.lists(st.integers(0, 7), min_size=BATCH, max_size=BATCH)
# (group, representation, is its basis learned, has the latent positions)
CASES = [
    ("trivial", "3*trivial", False, True),
    ("z2_h", "conjugate + trivial", False, False),
    ("z2_v", "trivial + 2*sign", True, True),
    ("z2xz2", "trivial + sign_h + sign_v + sign_hv", False, True),
    ("c4", "rope(1,2) + trivial", False, False),
    ("d4", "A2 + B1 + E", False, True),
    ("d4", "regular", True, False),
]
on_every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Toy:
    """Random dense functions without any symmetry, and their symmetrised forms, jitted."""

    def __init__(self, case):
        name, spec, learned, positions = case
        self.group = group(name)
        self.rho = representation(self.group, spec).matrices
        channels = self.rho.shape[-1]
        if learned:
            free = jax.random.normal(jax.random.key(0), (channels, channels))
            self.rho = change_basis(self.rho, orthogonal(free))
        self.z_shape = (BATCH, 2, 2, channels) if positions else (BATCH, channels)
        pixels, numbers = SIDE * SIDE * COLOURS, int(np.prod(self.z_shape[1:]))
        self.a, self.b, self.c = (
            normal(1, pixels, numbers),
            normal(2, numbers, pixels),
            normal(3, pixels, pixels),
        )
        wrap = lambda symmetrize, f: jax.jit(symmetrize(self.group, self.rho, f))  # noqa: E731
        self.encode_g = wrap(symmetrize_encoder, self.encode)
        self.decode_g = wrap(symmetrize_decoder, self.decode)
        self.velocity_g = wrap(symmetrize_velocity, self.velocity)
        self.act_image = jax.jit(functools.partial(act_image, self.group))
        self.act_latent = jax.jit(lambda g, z: act_latent(self.group, self.rho, g, z))

    @functools.partial(jax.jit, static_argnums=0)
    def encode(self, x):
        return jnp.tanh(x.reshape(BATCH, -1) @ self.a / 3 + 0.3).reshape(self.z_shape)

    @functools.partial(jax.jit, static_argnums=0)
    def decode(self, z, noise=None):
        noise = 0.0 if noise is None else noise.reshape(BATCH, -1) @ self.c
        out = jnp.tanh((z.reshape(BATCH, -1) @ self.b + noise) / 3 + 0.3)
        return out.reshape(BATCH, SIDE, SIDE, COLOURS)

    @functools.partial(jax.jit, static_argnums=0)
    def velocity(self, x, t, z):
        return self.decode(z, x) * jnp.cos(t)

    def draw(self, seed, draw):
        x, noise = normal(seed, 2, BATCH, SIDE, SIDE, COLOURS)
        g = np.array(draw) % self.group.order
        return x, noise, normal(seed + 1, *self.z_shape), g


toy_of = functools.cache(Toy)


def euler(velocity, x, z, steps=4):
    """From noise x at t = 1 down to t = 0."""
    for t in np.arange(steps, 0, -1) / steps:
        x = x - velocity(x, t, z) / steps
    return x


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@on_every_case
@laws
@given(seed=seeds, draw=draws)
def test_symmetrised_functions_and_samples_are_equivariant(case, seed, draw):
    toy = toy_of(case)
    x, noise, z, g = toy.draw(seed, draw)
    gx, gn, gz = toy.act_image(g, x), toy.act_image(g, noise), toy.act_latent(g, z)
    close(toy.encode_g(gx), toy.act_latent(g, toy.encode_g(x)))
    close(toy.decode_g(gz), toy.act_image(g, toy.decode_g(z)))
    close(toy.decode_g(gz, gn), toy.act_image(g, toy.decode_g(z, noise)))
    close(toy.velocity_g(gx, 0.3, gz), toy.act_image(g, toy.velocity_g(x, 0.3, z)))
    close(euler(toy.velocity_g, gn, gz), toy.act_image(g, euler(toy.velocity_g, noise, z)))


@on_every_case
def test_symmetrised_functions_are_the_averages(case):
    toy = toy_of(case)
    x, noise, z, _ = toy.draw(0, [0] * BATCH)
    elements = [np.full(BATCH, i) for i in range(toy.group.order)]
    inverse = [np.full(BATCH, i) for i in toy.group.inverse]
    encoded = [
        toy.act_latent(j, toy.encode(toy.act_image(i, x)))
        for i, j in zip(elements, inverse, strict=True)
    ]
    close(toy.encode_g(x), np.mean(encoded, 0))
    t = np.array([0.2, 0.9], np.float32).reshape(BATCH, 1, 1, 1)  # a time for each example
    moved = [
        (j, toy.act_image(i, noise), toy.act_latent(i, z))
        for i, j in zip(elements, inverse, strict=True)
    ]
    close(toy.decode_g(z), np.mean([toy.act_image(j, toy.decode(gz)) for j, _, gz in moved], 0))
    velocities = [toy.act_image(j, toy.velocity(gn, t, gz)) for j, gn, gz in moved]
    close(toy.velocity_g(noise, t, z), np.mean(velocities, 0))
    # The toys break every symmetry, and an equivariant function is its own average.
    if toy.group.order > 1:
        assert np.abs(toy.encode_g(x) - toy.encode(x)).max() > 0.05
        assert np.abs(toy.decode_g(z) - toy.decode(z)).max() > 0.05
    again = jax.jit(symmetrize_encoder(toy.group, toy.rho, toy.encode_g))
    close(again(x), toy.encode_g(x))


@pytest.mark.parametrize("subset", [1, 2, 4])
def test_random_subset_averages_different_elements_for_every_example(subset):
    toy = toy_of(CASES[4])
    x, noise, z, _ = toy.draw(0, [0] * BATCH)

    def terms(symmetrize, f, *args):
        """Every average over `subset` different elements, [choices, B, ...]."""
        order, single = toy.group.order, []
        for i in range(order):
            g, back = np.full(BATCH, i), np.full(BATCH, toy.group.inverse[i])
            if symmetrize is symmetrize_encoder:
                single.append(toy.act_latent(back, f(toy.act_image(g, args[0]))))
            elif symmetrize is symmetrize_decoder:
                single.append(toy.act_image(back, f(toy.act_latent(g, args[0]))))
            else:
                gx, t, gz = toy.act_image(g, args[0]), args[1], toy.act_latent(g, args[2])
                single.append(toy.act_image(back, f(gx, t, gz)))
        chosen = itertools.combinations(range(order), subset)
        return np.stack([np.mean([single[i] for i in choice], 0) for choice in chosen])

    for symmetrize, f, args in (
        (symmetrize_encoder, toy.encode, (x,)),
        (symmetrize_decoder, toy.decode, (z,)),
        (symmetrize_velocity, toy.velocity, (noise, 0.3, z)),
    ):
        cheap = jax.jit(
            lambda key, *args, s=symmetrize, f=f: s(toy.group, toy.rho, f, key, subset)(*args)
        )
        expected, picked = terms(symmetrize, f, *args), []
        for seed in range(16):
            out = np.asarray(cheap(jax.random.key(seed), *args))
            error = np.abs(expected - out).reshape(len(expected), BATCH, -1).max(-1)
            assert error.min(0).max() < 1e-5  # each example's value is one of the averages
            picked.append(tuple(error.argmin(0)))
        for example in range(BATCH):  # and with the key every one of them comes up
            assert {choice[example] for choice in picked} == set(range(len(expected)))
        assert any(a != b for a, b in picked) == (len(expected) > 1)


def test_gradient_reaches_a_learned_basis_through_the_average():
    toy, x = toy_of(CASES[5]), normal(0, BATCH, SIDE, SIDE, COLOURS)
    rep = representation(toy.group, "A2 + B1 + E").matrices
    free, step = normal(1, 4, 4), normal(2, 4, 4)

    @jax.jit
    def loss(free):
        rho = change_basis(rep, orthogonal(free))
        return jnp.square(symmetrize_encoder(toy.group, rho, toy.encode)(x)).sum()

    measured = (loss(free + 1e-2 * step) - loss(free - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(free), step), measured, rtol=5e-2)
    assert abs(measured) > 1e-2


@pytest.mark.parametrize(
    "symmetrize", [symmetrize_encoder, symmetrize_decoder, symmetrize_velocity]
)
@pytest.mark.parametrize(
    ("key", "subset", "message"),
    [(0, None, "both"), (None, 2, "both"), (0, 0, "allowed 1..4"), (0, 5, "allowed 1..4")],
)
def test_impossible_subsets_are_refused(symmetrize, key, subset, message):
    G = group("c4")
    rho = representation(G, "regular").matrices
    key = None if key is None else jax.random.key(key)
    with pytest.raises(ValueError, match=message):
        symmetrize(G, rho, lambda x: x, key, subset)
