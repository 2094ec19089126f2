"""Tile by tile equals whole: the networks, their group norms, the seams, the memory."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_nets import random_params
from weights import SHARED, needs

from configs.pretrained import get_config
from efae_jax.convert import read_model
from efae_jax.models import tiled
from efae_jax.models.build import build_autoencoder
from efae_jax.models.conv_blocks import local_statistics
from efae_jax.models.tiled import tiled_decode, tiled_encode, tiled_posterior

MANY = 100  # sweeps: more than any network here has norms


def build(kind="kl", **fields):
    config = get_config(kind)
    with config.unlocked():
        config.model.update(fields)
    model = build_autoencoder(config)
    nets = {"encoder": model.encoder, "decoder": model.decoder}
    return model, {name: random_params(net) for name, net in nets.items()}


@functools.cache
def small(attention=False):
    return build(widths=(4, 8), blocks=1, norm_groups=2, latent_channels=2, attention=attention)


@functools.cache
def golden(name):
    imported = read_model(SHARED / "fixtures" / f"{name}.npz")
    return build_autoencoder(imported.config), imported.params


def photograph(height, width, batch=1):
    """Smooth colours, edges and noise, different everywhere: statistics differ by tile."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    images = [
        np.stack([np.sin(5 * x + i), y * np.cos(9 * y), (x * 7 % 1 > 0.6) * y], -1)
        + 0.4 * x[..., None] ** 2 * rng.standard_normal((height, width, 3))
        for i in range(batch)
    ]
    return np.float32(images)


def whole(model, params, x):
    z = np.asarray(jax.jit(model.encode)(params, x))
    return z, np.asarray(jax.jit(model.decode)(params, z))


def error(ours, golden):
    """Largest difference, relative to the largest value: borders and all."""
    assert ours.shape == golden.shape
    return np.abs(ours - golden).max() / np.abs(golden).max()


def test_tiles_with_enough_sweeps_and_overlap_are_the_whole_image():
    model, params = small()
    x = photograph(200, 250, batch=2)  # no multiples of anything
    z, y = whole(model, params, x)
    options = {"tile": 192, "overlap": 96, "sweeps": MANY}
    found = tiled_encode(model, params, x, **options)
    assert isinstance(found, np.ndarray)
    assert error(found, z) < 1e-5
    assert error(tiled_decode(model, params, z[1:], **options), y[1:]) < 1e-5


def test_each_sweep_makes_one_more_norm_exact(monkeypatch):
    model, params = small()
    x = photograph(112, 250)
    exact, found, merge = [], [], tiled._merge
    monkeypatch.setattr(tiled, "_merge", lambda *args: found.append(merge(*args)) or found[-1])
    tiled_encode(model, params, x, tile=112, overlap=56, sweeps=MANY)

    def record(h, groups):
        exact.append(local_statistics(h, groups))
        return exact[-1]

    model.encoder(params["encoder"], x, record)
    assert len(exact) == len(found) == 9  # sweeps end when there is nothing left to find
    for sweep, norms in enumerate(found):
        for number in range(sweep + 1):
            for ours, golden in zip(norms[number], exact[number], strict=True):
                np.testing.assert_allclose(ours, golden, rtol=2e-4, atol=2e-4)
    off = [abs(norms[-1][1] / exact[-1][1] - 1).max() for norms in (found[0], found[-1])]
    assert off[0] > 100 * off[1]


def test_sweeps_reduce_the_error_and_none_leaves_seams():
    model, params = small()
    x = photograph(112, 250)
    z, y = whole(model, params, x)
    options = {"tile": 112, "overlap": 56}
    for function, argument, wanted in ((tiled_encode, x, z), (tiled_decode, z, y)):
        none, one, all_of_them = (
            error(function(model, params, argument, **options, sweeps=n), wanted)
            for n in (0, 1, MANY)
        )
        assert none > 1.5 * one > 100 * all_of_them


def test_attention_sees_its_tile_whatever_the_sweeps():
    model, params = small(attention=True)
    x = photograph(16, 160)
    z, _ = whole(model, params, x)
    found = tiled_encode(model, params, x, tile=112, overlap=56, sweeps=MANY)
    assert 1e-3 < error(found, z) < 0.5


def test_an_image_within_the_tile_is_done_whole():
    model, params = small()
    x = photograph(40, 72)
    z, y = whole(model, params, x)
    for sweeps in (0, 3):
        assert error(tiled_encode(model, params, x, tile=112, sweeps=sweeps), z) < 2e-6
        assert error(tiled_decode(model, params, z, tile=112, sweeps=sweeps), y) < 2e-6


def test_moments_clamp_and_bytes():
    model, params = small()
    x = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
    wanted = jax.jit(model.posterior)(params, x.astype(np.float32) / 127.5 - 1)
    found = tiled_posterior(model, params, x, tile=64)
    assert error(found.mean, wanted.mean) < 2e-6
    assert error(found.log_variance, wanted.log_variance) < 2e-6
    clamped = build_autoencoder(_clamped())
    z = tiled_encode(clamped, params, x, tile=64)
    np.testing.assert_array_equal(z, np.clip(found.mean, -0.1, 0.1))


def _clamped():
    config = get_config("kl")
    with config.unlocked():
        config.model.update(widths=(4, 8), blocks=1, norm_groups=2, latent_channels=2)
        config.model.attention, config.latent.clamp = False, 0.1
    return config


# ---- other networks


@pytest.mark.parametrize("variant", ["taesd", "taef2"])
def test_taesd_with_and_without_norms(variant):
    model, params = build("taesd", variant=variant)
    x = photograph(16, 768)
    z, y = whole(model, params, x)
    options = {"tile": 640, "overlap": 320, "sweeps": MANY if variant == "taef2" else 0}
    assert error(tiled_encode(model, params, x, **options), z) < 1e-4
    assert error(tiled_decode(model, params, z, **options), y) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("aura_vae_wavelet", marks=needs("fixtures/aura_vae_wavelet.npz")),
        pytest.param("aura_vae_hr_noattn", marks=needs("fixtures/aura_vae_hr_noattn.npz")),
    ],
)
def test_networks_with_golden_numbers(name):
    model, params = golden(name)
    x = photograph(16, 384)
    z, y = whole(model, params, x)
    options = {"tile": 256, "overlap": 128, "sweeps": MANY}
    assert error(tiled_encode(model, params, x, **options), z) < 1e-4
    assert error(tiled_decode(model, params, z, **options), y) < 1e-4


# ---- tiles


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.data(), st.sampled_from([1, 2, 8]))
def test_weights_sum_to_one_and_cores_share_out_the_positions(size, tile, data, cell):
    overlap = data.draw(st.integers(0, tile // 2))
    axis = tiled._Axis.spread(size, tile, overlap)
    weight, core = np.zeros(size * cell), np.zeros(size)
    for i, start in enumerate(axis.starts):
        assert 0 <= start <= size - axis.tile
        part = axis.weights(i, cell)
        assert part.min() >= 0
        weight[start * cell : (start + axis.tile) * cell] += part
        core[start : start + axis.tile] += axis.core(i)
        if i:
            assert axis.starts[i - 1] + axis.tile - start >= overlap
            # What is nearest the edge, where a convolution lacks its neighbours, is dropped.
            assert not part[: overlap // 2 * cell // 2].any()
            assert not axis.core(i)[: overlap // 2].any()
        if i < len(axis.starts) - 1:
            assert not part[len(part) - overlap // 2 * cell // 2 :].any()
    np.testing.assert_allclose(weight, 1, atol=1e-5)
    np.testing.assert_array_equal(core, 1)


# ---- memory


def test_one_program_serves_all_tiles_and_sweeps_and_holds_a_tile_only(monkeypatch):
    """However large the image: nothing but tiles reaches the device, and one program runs."""
    model, params = small()
    run, seen = tiled._run_tile, []

    def watched(net, params, tile, *args):
        seen.append((tile.shape, *(np.shape(a) for a in jax.tree.leaves(args))))
        live.append(sum(a.nbytes for a in jax.live_arrays()))
        return run(net, params, tile, *args)

    monkeypatch.setattr(tiled, "_run_tile", watched)
    peaks = []
    for side in (128, 384):
        live = []
        x = photograph(side, side)
        before = run._cache_size()
        z = tiled_encode(model, params, x, tile=64, overlap=16, sweeps=1)
        tiled_decode(model, params, z, tile=64, overlap=16, sweeps=1)
        assert run._cache_size() - before == (2 if side == 128 else 0)  # encoder, decoder
        peaks.append(max(live) - live[0])
    assert len({*seen}) == 2
    assert max(np.prod(shape) for shapes in seen for shape in shapes) == 64 * 64 * 3
    assert peaks[1] <= peaks[0] + 1024
    axes = [tiled._Axis.spread(32, 32, 0)] * 2
    net, mine = model.encoder, params["encoder"]
    norms, cores = tiled._no_norms(net, mine, axes, 2, 3), [axis.core(0) for axis in axes]
    program = run.lower(net, mine, x[:, :64, :64], *cores, norms, 0).compile()
    used = program.memory_analysis()
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 64 * 64 * 4 * 50


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 33}, "side 33 and overlap 8 must be multiples of the factor 2"),
        ({"tile": 0}, "side 0"),
        ({"tile": 32, "overlap": 18}, "at most half"),
        ({"tile": 32, "overlap": 7}, "multiples of the factor 2"),
        ({"tile": 32, "overlap": -2}, "overlap -2"),
        ({"tile": 32, "sweeps": -1}, "not negative"),
    ],
)
def test_tiles_that_cannot_be(options, message):
    model, params = small()
    with pytest.raises(ValueError, match=message) as caught:
        tiled_encode(model, params, np.zeros((1, 32, 32, 3), np.float32), **options)
    assert "\n" not in str(caught.value)


def test_images_that_cannot_be():
    model, params = small()
    with pytest.raises(ValueError, match="image 31x40, but the factor 2"):
        tiled_encode(model, params, np.zeros((1, 31, 40, 3), np.float32), tile=32)
    with pytest.raises(ValueError, match="latents must be a NumPy array"):
        tiled_decode(model, params, np.zeros((16, 16, 2), np.float32), tile=32)
    model.is_flow = True
    try:
        with pytest.raises(ValueError, match="only convolutional autoencoders"):
            tiled_encode(model, params, np.zeros((1, 32, 32, 3), np.float32), tile=32)
    finally:
        del model.is_flow
