"""Files of feature statistics: this package's, pytorch-fid's, and those that are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from weights import error_of

from efae_jax.convert.feature_statistics import read_statistics, save_statistics
from efae_jax.metrics.frechet import FeatureStatistics, frechet_distance

ABOUT = {"path": "Bilder/große", "keys": "0f3a", "size": [256, 256]}


def statistics(size=5, count=12, seed=0):
    made = FeatureStatistics(size)
    made.add(np.random.default_rng(seed).standard_normal((count, size)))
    return made


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "deep" / "reference.npz"
    save_statistics(path, statistics(), "vgg16", ABOUT)
    return path


def test_what_is_saved_is_read(saved):
    read, own = read_statistics(saved, "vgg16", 5), statistics()
    np.testing.assert_array_equal(read.mean, own.mean)
    np.testing.assert_array_equal(read.covariance, own.covariance)
    assert (read.count, read.about) == (12, ABOUT)
    other = statistics(seed=1)
    assert frechet_distance(read, other) == frechet_distance(own, other) > 0.1
    assert [path.name for path in saved.parent.iterdir()] == ["reference.npz"]


def test_pytorch_fid_reads_it(saved):
    with np.load(saved) as file:
        mu, sigma = file["mu"][:], file["sigma"][:]
    np.testing.assert_array_equal(mu, statistics().mean)
    np.testing.assert_array_equal(sigma, statistics().covariance)


def test_files_of_pytorch_fid_are_read_and_serve_no_other_protocol(tmp_path):
    own, path = statistics(), tmp_path / "theirs.npz"
    np.savez_compressed(path, mu=own.mean, sigma=own.covariance.astype(np.float32))
    read = read_statistics(path, "pytorch-fid", 5)
    np.testing.assert_array_equal(read.mean, own.mean)
    np.testing.assert_allclose(read.covariance, own.covariance, rtol=1e-6)
    assert read.covariance.dtype == np.float64
    assert (read.count, read.about) == (None, {})
    message = error_of(read_statistics, path, "torch-fidelity", 5)
    assert "pytorch-fid's features, which do not compare with torch-fidelity's" in message


def test_other_features_are_refused(saved):
    assert "vgg16's features" in error_of(read_statistics, saved, "pytorch-fid", 5)
    message = error_of(read_statistics, saved, "vgg16", 512)
    assert "holds mu (5,) and sigma (5, 5); vgg16 has 512 features" in message


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"mu": np.zeros(5)}, "for want of sigma"),
        ({"sigma": np.eye(5)}, "for want of mu"),
        ({"weight": np.zeros(5)}, "for want of mu and sigma"),
        ({"mu": np.zeros(5), "sigma": np.zeros(5)}, "mu (5,) and sigma (5,)"),
        ({"mu": np.zeros((5, 5)), "sigma": np.eye(5)}, "mu (5, 5) and sigma (5, 5)"),
        ({"mu": np.full(5, np.nan), "sigma": np.eye(5)}, "mu must be finite numbers"),
        ({"mu": np.zeros(5), "sigma": np.full((5, 5), np.inf)}, "sigma must be finite numbers"),
        ({"mu": np.zeros(5), "sigma": np.eye(5, dtype=int)}, "sigma must be finite numbers"),
        ({"mu": np.zeros(5), "sigma": np.eye(5), "count": np.ones(2)}, "count must be a number"),
        ({"mu": np.zeros(5), "sigma": np.eye(5), "about": "{"}, "about a JSON object"),
        ({"mu": np.zeros(5), "sigma": np.eye(5), "about": "3"}, "about a JSON object"),
    ],
)
def test_what_holds_no_statistics_is_named(tmp_path, arrays, expected):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    message = error_of(read_statistics, path, "pytorch-fid", 5)
    assert expected in message
    assert str(path) in message


def test_nothing_is_replaced_and_too_few_images_are_not_saved(saved):
    before = saved.read_bytes()
    message = error_of(save_statistics, saved, statistics(seed=1), "vgg16", {})
    assert "is there already" in message
    assert saved.read_bytes() == before
    other = saved.with_name("one.npz")
    message = error_of(save_statistics, other, statistics(count=1), "vgg16", {})
    assert "1 images have no statistics; at least 2" in message
    assert not other.exists()
    message = error_of(save_statistics, saved / "below.npz", statistics(), "vgg16", {})
    assert f"cannot write {saved / 'below.npz'}" in message


def test_a_file_that_is_not_there_or_damaged(tmp_path, saved):
    assert "cannot read" in error_of(read_statistics, tmp_path / "none.npz", "vgg16", 5)
    saved.write_bytes(saved.read_bytes()[:300])
    assert "truncated or damaged" in error_of(read_statistics, saved, "vgg16", 5)


def test_the_description_is_readable_without_this_package(saved):
    with np.load(saved) as file:
        assert json.loads(str(file["about"])) == ABOUT
        assert str(file["protocol"]) == "vgg16"
        assert file["count"] == 12
