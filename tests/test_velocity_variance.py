"""Velocity irreducible variance against the full covariance and the integral over time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from efae_jax.metrics.latent_moments import LatentMoments
from efae_jax.metrics.velocity_variance import ClassLatents, irreducible_variance


def factors(seed, positions, channels):
    """Matrices A, B of the separable Gaussian A noise B^T."""
    rng = np.random.default_rng(seed)
    return (
        np.eye(positions) + 0.3 * rng.standard_normal((positions, positions)),
        np.diag(np.arange(1.0, channels + 1)) + 0.5 * rng.standard_normal((channels, channels)),
    )


def exact_sample(seed, positions, channels):
    """Latents whose sample covariance is a Kronecker product: +- the columns of its root."""
    a, b = factors(seed, positions, channels)
    d = positions * channels
    unit = np.eye(d).reshape(d, positions, channels)
    x = a @ unit @ b.T
    return 7 + np.concatenate([x, -x])


def test_the_tiniest_case_by_hand():
    # Variance (5 - 1)^2 / 2 of one number.
    z = np.array([1.0, 5]).reshape(2, 1, 1)
    np.testing.assert_allclose(irreducible_variance(z), np.pi / 2 * np.sqrt(8), rtol=1e-12)


@pytest.mark.parametrize(("positions", "channels"), [(4, 3), (2, 5), (1, 4), (6, 1)])
def test_equals_the_full_covariance_where_it_is_a_product(positions, channels):
    z = exact_sample(0, positions, channels)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.reshape(len(z), -1).T))
    expected = np.pi / 2 * np.sqrt(eigenvalues).sum()
    np.testing.assert_allclose(irreducible_variance(z), expected, rtol=1e-10)


def test_is_the_integral_of_what_the_velocity_keeps_back():
    """E |v - E[v | x_t]|^2, v = z - noise, x_t = (1 - t) noise + t z, by conditioning Gaussians."""
    z = exact_sample(1, 3, 2)
    covariance = np.cov(z.reshape(len(z), -1).T)
    unit = np.eye(len(covariance))

    def unknown(t):
        seen = (1 - t) ** 2 * unit + t**2 * covariance
        cross = t * covariance - (1 - t) * unit
        return np.trace(covariance + unit - cross @ np.linalg.solve(seen, cross))

    np.testing.assert_allclose(irreducible_variance(z), quad(unknown, 0, 1)[0], rtol=1e-6)


def test_many_samples_of_a_separable_gaussian():
    a, b = factors(2, 9, 3)
    noise = np.random.default_rng(0).standard_normal((3000, 9, 3))
    singular = (np.linalg.svd(m, compute_uv=False).sum() for m in (a, b))
    expected = np.pi / 2 * np.prod(list(singular))
    np.testing.assert_allclose(irreducible_variance(a @ noise @ b.T), expected, rtol=0.01)


def likelihood(z, covariance):
    x = (z - z.mean(axis=0)).reshape(len(z), -1)
    _, log_determinant = np.linalg.slogdet(covariance)
    return -np.trace(np.linalg.solve(covariance, x.T @ x / len(x))) - log_determinant


def product(z, rounds):
    """The equations of the likeliest product, solved in turn with plain (pseudo-)inverses."""
    x = z - z.mean(axis=0)
    positions = np.eye(z.shape[1])
    for _ in range(rounds):
        inverse = np.linalg.pinv(positions, rcond=1e-10)
        channels = np.einsum("nsc,st,ntd->cd", x, inverse, x) / x[:, :, 0].size
        inverse = np.linalg.pinv(channels, rcond=1e-10)
        positions = np.einsum("nsc,cd,ntd->st", x, inverse, x) / x[:, 0, :].size
    return positions, channels


def of_product(z, positions, channels):
    covariance = np.kron(positions, channels)
    scaled = covariance * np.trace(np.cov(z.reshape(len(z), -1).T)) / np.trace(covariance)
    return np.pi / 2 * np.sqrt(np.maximum(np.linalg.eigvalsh(scaled), 0)).sum()


def no_product(n, positions, channels):
    z = np.random.default_rng(3).standard_normal((n, positions, channels))
    z = z @ factors(3, positions, channels)[1].T
    z[:, 0, 0] *= 5
    return z


def test_the_estimate_is_the_likeliest_product():
    z = no_product(40, 3, 2)
    best = product(z, 200)
    rng = np.random.default_rng(0)
    for _ in range(5):
        turns = [np.eye(len(m)) + 1e-2 * rng.standard_normal(m.shape) for m in best]
        other = [turn @ m @ turn.T for turn, m in zip(turns, best, strict=True)]
        assert likelihood(z, np.kron(*other)) < likelihood(z, np.kron(*best))
    np.testing.assert_allclose(irreducible_variance(z), of_product(z, *best), rtol=1e-3)
    np.testing.assert_allclose(irreducible_variance(z), of_product(z, *product(z, 5)), rtol=1e-9)


@pytest.mark.parametrize("shape", [(5, 12, 2), (4, 2, 12), (6, 9, 2)])
def test_more_dimensions_than_a_class_can_show(shape):
    """(n - 1) C < h w or (n - 1) h w < C: the inverses leave the rest out."""
    z = no_product(*shape)
    np.testing.assert_allclose(irreducible_variance(z), of_product(z, *product(z, 5)), rtol=1e-5)


def test_no_variance_is_zero_and_one_latent_is_refused():
    assert irreducible_variance(np.full((3, 2, 2), 0.5)) == 0
    with pytest.raises(ValueError, match="two latents or more; there are 1"):
        irreducible_variance(np.zeros((1, 2, 2)))


def test_channels_and_positions_without_variance_count_for_nothing():
    z = exact_sample(4, 3, 2)
    padded = np.pad(z, ((0, 0), (0, 2), (0, 1)), constant_values=0.1)
    np.testing.assert_allclose(irreducible_variance(padded), irreducible_variance(z), rtol=1e-10)


def two_classes():
    first = exact_sample(5, 4, 3).astype(np.float32).reshape(-1, 2, 2, 3)
    second = 2 * exact_sample(6, 4, 3).astype(np.float32).reshape(-1, 2, 2, 3)
    z = np.concatenate([first, second, first[:1]])
    labels = np.repeat([4, 9, 2], [24, 24, 1])
    order = np.random.default_rng(0).permutation(len(z))
    return z[order], labels[order], first, second


def kept(z, labels, cuts=(), **limits):
    made = ClassLatents(**limits)
    for part, part_labels in zip(np.split(z, cuts), np.split(labels, cuts), strict=True):
        made.add(part, part_labels)
        made = ClassLatents.from_arrays(made.arrays())
    return made


def test_mean_over_classes_in_the_units_of_the_scale():
    z, labels, first, second = two_classes()
    std = np.array([2.0, 0.5, 3])
    flat = [x.reshape(24, 4, 3) / std for x in (first, second)]
    got = kept(z, labels).velocity_irreducible_variance(std)
    # The class of one image is left out.
    assert (got.classes, got.images, got.determined) == (2, 48, True)
    expected = np.mean([irreducible_variance(x) for x in flat])
    np.testing.assert_allclose(got.value, expected, rtol=1e-10)
    np.testing.assert_allclose(got.per_dimension, expected / 12, rtol=1e-10)
    own = kept(z, labels).velocity_irreducible_variance(np.ones(3)).value
    assert abs(own / got.value - 1) > 0.1
    np.testing.assert_allclose(
        kept(10 * z, labels).velocity_irreducible_variance([10 * s for s in std]).value, got.value
    )


def test_standardised_white_noise_is_pi_over_two_per_dimension():
    z = np.random.default_rng(0).standard_normal((2000, 2, 2, 3)).astype(np.float32) * [1, 5, 0.1]
    moments = LatentMoments(3)
    moments.add(z)
    got = kept(z, np.arange(2000) % 2).velocity_irreducible_variance(moments.std)
    np.testing.assert_allclose(got.per_dimension, np.pi / 2, rtol=0.01)


def test_a_channel_of_no_deviation_is_left_as_it_is():
    z, labels, *_ = two_classes()
    z[..., 1] = 0.3
    got = kept(z, labels).velocity_irreducible_variance([2.0, 0, 3])
    without = kept(np.delete(z, 1, axis=-1), labels).velocity_irreducible_variance([2.0, 3])
    np.testing.assert_allclose(got.value, without.value, rtol=1e-6)


def test_does_not_depend_on_how_images_are_cut():
    z, labels, *_ = two_classes()
    for limits in ({}, {"classes": 1}, {"memory": 30 * 48}):
        whole = kept(z, labels, **limits)
        expected = whole.velocity_irreducible_variance(np.ones(3))
        for cuts in ([1, 1, 20], [7], [30, 48]):
            got = kept(z, labels, cuts, **limits)
            assert got.velocity_irreducible_variance(np.ones(3)) == expected
            for name, value in whole.arrays().items():
                np.testing.assert_array_equal(got.arrays()[name], value)
        merged = kept(z[:20], labels[:20], **limits)
        merged.merge(kept(z[20:], labels[20:], **limits))
        if limits.get("classes") is None:
            assert merged.velocity_irreducible_variance(np.ones(3)) == expected


def test_the_first_classes_and_images_are_kept():
    z, labels, *_ = two_classes()
    one = kept(z, labels, classes=1).arrays()
    np.testing.assert_array_equal(one["latents"], z[labels == labels[0]])
    few = kept(z, labels, memory=30 * 48 + 47).arrays()  # 12 floats of 4 bytes each
    np.testing.assert_array_equal(few["latents"], z[:30])
    np.testing.assert_array_equal(few["labels"], labels[:30])


def test_the_latents_kept_are_copies():
    z, labels, *_ = two_classes()
    latents, expected = ClassLatents(), z.copy()
    latents.add(z, labels)
    z[:] = 0
    np.testing.assert_array_equal(latents.arrays()["latents"], expected)


def test_vectors_have_one_position():
    z = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    got = kept(z, np.zeros(30, int)).velocity_irreducible_variance(np.ones(4))
    eigenvalues = np.linalg.eigvalsh(np.cov(z.astype(float).T))
    np.testing.assert_allclose(got.value, np.pi / 2 * np.sqrt(eigenvalues).sum(), rtol=1e-10)
    assert got.determined
    few = kept(z[:4], np.zeros(4, int)).velocity_irreducible_variance(np.ones(4))
    assert not few.determined


def test_too_few_images_for_the_positions_is_said():
    z = np.random.default_rng(0).standard_normal((8, 2, 2, 1)).astype(np.float32)
    for n, determined in ((5, False), (6, True)):
        got = kept(z[:n], np.zeros(n, int)).velocity_irreducible_variance([1.0])
        assert got.determined is determined


def test_no_class_of_two_is_refused():
    z = np.zeros((2, 1, 1, 3), np.float32)
    with pytest.raises(ValueError, match="no class has two images"):
        kept(z, np.array([0, 1])).velocity_irreducible_variance(np.ones(3))
    with pytest.raises(ValueError, match="no class has two images"):
        ClassLatents().velocity_irreducible_variance(np.ones(3))
