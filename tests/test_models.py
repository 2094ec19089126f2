"""Velocity fields: preconditioning, conditioning, initial values, rotary embedding, sizes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_nets import (
    FIELDS,
    IMAGE,
    assert_bfloat16_computes,
    assert_remat_changes_nothing,
    compiled,
    dit,
    fresh,
    inputs,
    random_params,
    unet,
)

from efae_jax.models.dit import Block, rotary_angles, rotate, turns
from efae_jax.models.functional import Net
from efae_jax.models.layers import LatentGrid, group_norm, precondition, sinusoids
from efae_jax.models.unet import ConditionedBlock

F32 = {"dtype": jnp.float32}

# ---- preconditioning


@pytest.mark.parametrize("std", [0.5, 1.3])
@pytest.mark.parametrize("t", [0.05, 0.4, 0.95])
def test_preconditioning_is_the_least_squares_optimum(std, t):
    """Of pixels of any density with that standard deviation; here +-s with equal odds."""
    rng = np.random.default_rng(0)
    x, noise = std * rng.choice([-1, 1], 400_000), rng.standard_normal(400_000)
    x_t, target = (1 - t) * x + t * noise, noise - x
    slope = (x_t @ target) / (x_t @ x_t)
    residual = np.std(target - slope * x_t)

    one, t_B = np.ones((1, 1, 1, 1), np.float32), np.full(1, t, np.float32)
    a = precondition(0 * one, one, t_B, std).item()
    b = precondition(one, 0 * one, t_B, std).item()
    assert a == pytest.approx(slope, abs=0.02)
    assert b == pytest.approx(residual, rel=0.01)


@pytest.mark.parametrize(("kind", "blocks"), [("dit", {}), ("unet", {"blocks": 0})])
def test_new_fields_predict_the_linear_part_alone(kind, blocks):
    x, t, z = inputs()
    v = fresh(FIELDS[kind](data_std=0.8, **blocks), x, t, z)
    np.testing.assert_allclose(v, precondition(0 * x, x, t, 0.8), rtol=1e-6, atol=1e-6)


def network_part(kind, factor, x, t, z):
    """F of v = a(t) x_t + b(t) F: what the network says beyond its preconditioning."""
    linear, scale = precondition(0 * x, x, t, 0.5), precondition(0 * x + 1, 0 * x, t, 0.5)
    net = FIELDS[kind](factor)
    return np.asarray((compiled(net)(random_params(net), x, t, z) - linear) / scale)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("factor", [8, None])
@pytest.mark.parametrize("changed", ["image", "time", "latent"])
def test_image_time_and_latent_enter_each_for_its_own_example(kind, factor, changed):
    x, t, z = inputs(factor)
    before = network_part(kind, factor, x, t, z)
    other = dict(zip(["image", "time", "latent"], inputs(factor, seed=2), strict=True))[changed]
    other = 1 - t if changed == "time" else other
    new = {"image": x.copy(), "time": t.copy(), "latent": z.copy()}
    new[changed][0] = other[0]
    after = network_part(kind, factor, *new.values())
    assert np.std(after[0] - before[0]) > 0.05 * np.std(before[0])
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)


# ---- the latent, position by position


def cells(position, factor, cell, shape):
    """Which cells of a grid share pixels with one position of a latent."""
    pixels = np.zeros(shape, bool)
    row, column = position
    pixels[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor] = True
    return pixels.reshape(shape[0] // cell, cell, shape[1] // cell, cell).any(axis=(1, 3))


@pytest.mark.parametrize(("factor", "cell"), [(8, 2), (4, 4), (2, 8)])
def test_a_latent_position_conditions_its_own_cells_only(factor, cell):
    net = Net(lambda rngs: LatentGrid(3, 5, factor, cell, rngs=rngs, **F32))
    params = random_params(net)
    z = np.random.default_rng(0).standard_normal((1, 16 // factor, 24 // factor, 3))
    z = z.astype(np.float32)
    other = z.copy()
    other[0, 1, 2] += 1
    lay = jax.jit(net.__call__, static_argnums=(2, 3))
    grid, changed = lay(params, z, 16, 24), lay(params, other, 16, 24)
    assert grid.shape == (1, 16 // cell, 24 // cell, 5)
    difference = np.abs(grid - changed)[0].max(axis=-1) > 0
    np.testing.assert_array_equal(difference, cells((1, 2), factor, cell, (16, 24)))
    if factor > cell:  # the cells of one position have values of their own
        inside = np.asarray(grid)[0][cells((1, 2), factor, cell, (16, 24))]
        assert np.abs(inside[1:] - inside[0]).min(axis=0).max() > 1e-3
    if cell > factor:  # and a cell tells the positions in it apart
        np.testing.assert_raises(
            AssertionError,
            np.testing.assert_allclose,
            lay(params, z[:, ::-1], 16, 24)[:, ::-1],
            grid,
            atol=1e-3,
        )


def test_a_transformer_without_blocks_is_local_in_image_and_latent():
    """Patches and latents are cut, and put back, at the same places."""
    net = dit(depth=0)
    call, params = jax.jit(net.__call__), random_params(net)
    x, t, z = inputs()
    v = call(params, x, t, z)
    for changed, factor in (("z", 8), ("x", 4)):
        new = {"x": x.copy(), "z": z.copy()}
        step = (slice(None), 1, 2) if changed == "z" else (slice(None), 6, 9)  # in patch (1, 2)
        new[changed][step] += 1
        moved = np.abs(call(params, new["x"], t, new["z"]) - v).max(axis=(0, 3)) > 0
        np.testing.assert_array_equal(moved, cells((1, 2), factor, 1, IMAGE[1:3]))


def test_unet_lays_the_latent_over_every_level():
    net = unet()
    latents = jax.jit(lambda p, z: net(p, z, 16, 24, method="_latents"))
    params, (_, _, z) = random_params(net), inputs()
    before = latents(params, z)
    assert {rows: level.shape for rows, level in before.items()} == {
        8: (2, 8, 12, 8),
        4: (2, 4, 6, 8),
    }
    other = z.copy()
    other[:, 1, 2] += 1
    after = latents(params, other)
    for rows, level in before.items():
        moved = np.abs(after[rows] - level).max(axis=(0, 3)) > 0
        np.testing.assert_array_equal(moved, cells((1, 2), 8, 16 // rows, (16, 24)))


def test_unet_puts_its_levels_back_in_their_places():
    """What changes in a corner is heard there; afar, only through the norms' statistics."""
    net = unet(blocks=0)
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((1, n, n, c)).astype(np.float32) for n, c in ((64, 3), (8, 4)))
    other = x.copy()
    other[:, 4:8, 4:8] += 1
    t, params = np.full(1, 0.5, np.float32), random_params(net)
    change = np.abs(compiled(net)(params, other, t, z) - compiled(net)(params, x, t, z))[0]
    near, far = change[:24, :24].max(), max(change[24:].max(), change[:, 24:].max())
    assert far < 0.01 * near


# ---- transformer


def test_rotary_attention_sees_differences_of_rows_and_of_columns():
    rows, columns, width = 3, 4, 8
    q, k = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    angles = rotary_angles(rows, columns, width)
    assert angles.shape == (rows * columns, width // 2)
    everywhere = lambda x: jnp.broadcast_to(x, (1, rows * columns, 1, width))  # noqa: E731
    turned_q, turned_k = (rotate(everywhere(a), turns(angles)) for a in (q, k))
    logits = np.asarray(turned_q)[0, :, 0] @ np.asarray(turned_k)[0, :, 0].T

    found = {}
    for i in range(rows * columns):
        for j in range(rows * columns):
            (r1, c1), (r2, c2) = divmod(i, columns), divmod(j, columns)
            found.setdefault((r2 - r1, c2 - c1), []).append(logits[i, j])
    assert all(np.ptp(values) < 1e-4 for values in found.values())
    assert found[0, 0][0] == pytest.approx(q @ k, abs=1e-4)
    means = sorted(np.mean(values) for values in found.values())
    assert len(means) == (2 * rows - 1) * (2 * columns - 1)
    assert np.diff(means).min() > 1e-4  # every displacement is told from every other


def test_rotary_frequencies_fall_from_one_by_the_hundredth():
    angles = rotary_angles(2, 2, 16)  # tokens (0,0), (0,1), (1,0), (1,1)
    frequencies = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(angles[1], [0, 0, 0, 0, *frequencies], rtol=1e-5)
    np.testing.assert_allclose(angles[2], [*frequencies, 0, 0, 0, 0], rtol=1e-5)


def test_new_blocks_are_the_identity():
    """Zero-initialised gates; with a condition, in any of its values."""
    x_BLD, c_BD = (np.random.default_rng(0).standard_normal(s) for s in ((2, 6, 16), (2, 16)))
    x_BLD, c_BD = x_BLD.astype(np.float32), c_BD.astype(np.float32)
    block = Net(lambda rngs: Block(16, 2, rngs=rngs, **F32))
    still = turns(rotary_angles(2, 3, 8))
    np.testing.assert_array_equal(fresh(block, x_BLD, c_BD, still), x_BLD)

    conditioned = Net(lambda rngs: ConditionedBlock(16, 16, 3, 16, rngs=rngs, **F32))
    x = x_BLD.reshape(2, 2, 3, 16)
    np.testing.assert_array_equal(fresh(conditioned, x, x[..., :3], c_BD), x)


def test_time_features_are_cosines_then_sines_of_a_thousand_t():
    t = np.array([0.0, 0.25, 1.0], np.float32)
    frequencies = 10_000.0 ** (-np.arange(3) / 3)
    angles = 1000 * np.float64(t)[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(sinusoids(t, 6), expected, atol=1e-3)


# ---- precision, memory, sizes


@pytest.mark.parametrize(("kind", "blocks"), [("dit", 1), ("unet", 7)])
def test_rematerialisation_changes_no_gradient_and_every_parameter_has_one(kind, blocks):
    assert_remat_changes_nothing(FIELDS[kind], *inputs(), blocks=blocks)


@pytest.mark.parametrize("kind", FIELDS)
def test_bfloat16_fields(kind):
    assert_bfloat16_computes(FIELDS[kind], *inputs())


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("factor", [4, 16, None])
def test_any_side_that_fits_gives_a_velocity_of_its_shape(kind, factor):
    net = FIELDS[kind](factor)
    for size in ((16, 16), (32, 16), (16, 48)):
        sides = [side // factor for side in size] if factor else []
        x, t, z = (jnp.zeros(shape) for shape in ((1, *size, 3), (1,), (1, *sides, 4)))
        assert jax.eval_shape(net, net.abstract, x, t, z).shape == x.shape


@pytest.mark.parametrize(
    ("kind", "changes", "size", "latent", "message"),
    [
        ("dit", {}, (16, 18), (2, 2), "DiT: image 16x18, but patch 4 needs sides .* of 4$"),
        ("unet", {}, (18, 16), (2, 2), "UNet: image 18x16, .* multiples of 4$"),
        ("dit", {}, (16, 16), (2, 3), "image 16x16 with latent 2x3, .* must be 1/8 of"),
        ("unet", {}, (16, 16), (4, 4), "image 16x16 with latent 4x4, .* must be 1/8 of"),
        ("dit", {"width": 18}, None, None, "DiT width 18 with 2 heads: .* multiple of 4$"),
        ("dit", {"width": 16, "heads": 3}, None, None, "DiT width 16 with 3 heads"),
        ("dit", {"patch": 3}, None, None, "patch .or stem. 3 and the latent's factor 8: one must"),
        ("unet", {"stem": 3}, None, None, "patch .or stem. 3 and the latent's factor 8: one must"),
    ],
)
def test_sizes_that_do_not_fit_are_named(kind, changes, size, latent, message):
    def build_and_call():
        net = FIELDS[kind](**changes)
        x, t, z = (jnp.zeros(shape) for shape in ((1, *size, 3), (1,), (1, *latent, 4)))
        jax.eval_shape(net, net.abstract, x, t, z)

    with pytest.raises(ValueError) as error:  # noqa: PT011 - matched without JAX's notes
        build_and_call()
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (64, 16), (24, 4), (6, 1)])
def test_group_norm_has_up_to_32_groups_of_at_least_four_channels(channels, groups):
    net = Net(lambda rngs: group_norm(channels, affine=False, rngs=rngs))
    x = np.random.default_rng(0).standard_normal((1, 5, 3, channels)).astype(np.float32)
    y = np.asarray(jax.jit(net.__call__)({}, x * np.arange(1, channels + 1)))
    y = y.reshape(15, groups, -1)
    np.testing.assert_allclose(y.mean(axis=(0, 2)), np.zeros(groups), atol=1e-5)
    np.testing.assert_allclose(y.std(axis=(0, 2)), np.ones(groups), atol=1e-4)
    if channels > groups:  # and none is finer
        assert y.std(axis=0).std() > 0.01
