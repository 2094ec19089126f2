"""AuraEquiVAE in the training loop: meshes, windows, both recipes, warm starts."""

from __future__ import annotations

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_aura

from efae_jax import data, train
from efae_jax.checkpoint import Checkpoints, save_model
from efae_jax.convert import perceptual
from efae_jax.errors import UserError
from efae_jax.methods import aura_equivae, make_method
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS
from efae_jax.models.vgg import VGG16
from efae_jax.run import Run
from efae_jax.sharding import put_batch


def steps(run, count, state=None):
    source = data.make_source(run.config.data, "train")
    batches = train.train_batches(run.config, source, 0)
    state, figures = state or run.init(), []
    for step in range(count):
        batch = put_batch(run.mesh, next(batches))
        state, metrics = run.step(state, batch, run.method.plan(step))
        figures.append(jax.device_get(metrics))
    return state, figures


@pytest.mark.parametrize("kind", ["elementwise", "global"])
def test_normalised_gradients_are_those_of_the_global_batch(kind):
    """The same norms, losses and parameters on one device and on eight."""
    overrides = {"loss__gradient": kind, "crop__rate": 0.0}
    results = []
    for devices in (1, 8):
        config = tiny_aura(mesh__data=devices, **overrides)
        state, figures = steps(Run(config, jax.devices()[:devices]), 2)
        results.append((jax.device_get(state["params"]), figures))
    # Adam turns the rounding of gradients that are zero (biases before a norm) into steps.
    kernels = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(results[0][0])
        if path[-1].key == "kernel"
    ]
    for path, one in kernels:
        eight = functools.reduce(lambda tree, part: tree[part.key], path, results[1][0])
        assert np.mean(np.abs(one - eight) < 1e-5) > 0.95, path
    for one, eight in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(
            one["autoencoder/gradient_norm"], eight["autoencoder/gradient_norm"], rtol=1e-3
        )
        np.testing.assert_allclose(one["autoencoder/loss"], eight["autoencoder/loss"], rtol=1e-4)


def test_each_window_compiles_once_and_a_resumed_run_is_the_same(tmp_path, only_one_device, runs):
    # A schedule that does not know the run's length, so that fewer steps are a run cut off.
    constant = {"optim__schedule": "constant", "optim__warmup": 2}
    config = tiny_aura(**constant)
    state = jax.device_get(train.train(config, tmp_path / "whole"))
    plans = [runs[0].method.plan(step) for step in range(6)]
    assert len(runs) == 6
    assert len(runs[0].programs) == len(set(plans)) == 2
    train.train(tiny_aura(train__steps=3, **constant), tmp_path / "cut")
    resumed = jax.device_get(train.train(config, tmp_path / "cut"))
    jax.tree.map(np.testing.assert_array_equal, state, resumed)


def test_a_run_starts_from_another_model(tmp_path, monkeypatch, only_one_device):
    trained = train.train(tiny_aura(train__steps=1, crop__rate=0.0), tmp_path / "first")
    source = jax.device_get(trained["ema"]["autoencoder"])
    config = tiny_aura(init_from=str(tmp_path / "first"), crop__rate=0.0, train__steps=1)
    run = Run(config, jax.devices()[:1])
    state = jax.device_get(run.init())
    for tree in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, state[tree]["autoencoder"], source)
    # A save that was cut off is no checkpoint: the run still starts from the model.
    (tmp_path / "second" / "checkpoints" / "500.orbax-checkpoint-tmp").mkdir(parents=True)
    starts = []
    monkeypatch.setattr(Run, "init", lambda self, given=None: starts.append(given) or state)
    train.train(config, tmp_path / "second")
    jax.tree.map(np.testing.assert_array_equal, starts[0]["autoencoder"], source)


def test_a_model_that_cannot_be_started_from_is_named_and_leaves_nothing(tmp_path, only_one_device):
    first = tmp_path / "first"
    # Of the same shapes, but of other units, it is another model as well.
    config = tiny_aura(model__widths=(4, 12), latent__scaling=0.5)
    other_units = "config.latent.scaling: 0.5 there, 1.0 given"
    model = make_method(config).autoencoder
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    save_model(first, {"autoencoder": params}, json.loads(config.to_json_best_effort()))
    other = "config.model.widths: [4, 12] there, [4, 8] given"
    for source, message in ((first, other), (tmp_path / "none", "none")):
        with pytest.raises(UserError) as error:
            train.train(tiny_aura(init_from=str(source)), tmp_path / "second")
        assert message in str(error.value)
        assert (other_units in str(error.value)) == (source == first)
        assert not (tmp_path / "second").exists()


def test_an_interrupted_import_does_not_reach_the_next(tmp_path):
    config = json.loads(tiny_aura().to_json_best_effort())
    temporary = tmp_path / f".model.{os.getpid()}.tmp"
    save_model(temporary, {"autoencoder": {"a": np.zeros(3)}}, config)
    save_model(tmp_path / "model", {"autoencoder": {"a": np.ones(3)}}, config)
    checkpoints = Checkpoints(tmp_path / "model")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"ema": {"autoencoder": {"a": jax.ShapeDtypeStruct((3,), float, sharding=place)}}}
    restored, _ = checkpoints.restore(abstract)
    checkpoints.close()
    np.testing.assert_array_equal(restored["ema"]["autoencoder"]["a"], np.ones(3))


def random_weights(abstract, seed=0):
    random = np.random.default_rng(seed)

    def one(leaf):
        size = np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
        return (size * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(one, abstract)


@pytest.fixture
def vgg(monkeypatch):
    """Random weights of the real networks, so that no download is needed."""
    monkeypatch.setattr(perceptual, "_packaged", lambda kind: pytest.fail("reads the weights"))
    monkeypatch.setattr(
        aura_equivae,
        "read_lpips",
        lambda kind, path: jax.tree.map(np.abs, random_weights(lpips_shapes())),
    )
    monkeypatch.setattr(
        aura_equivae, "read_vgg16", lambda path, stages: random_weights(trunk_shapes(stages), 1)
    )


def lpips_shapes():
    return Net(lambda rngs: LPIPS("vgg", rngs=rngs)).abstract


def trunk_shapes(stages):
    return Net(lambda rngs: VGG16(stages, rngs=rngs)).abstract


def test_the_released_recipe_trains_both_players(vgg):
    config = tiny_aura("released", crop__rate=0.0, train__batch_size=2, mesh__data=2)
    config.loss.recipe, config.loss.gan_start = "custom", 1
    run = Run(config, jax.devices()[:2])
    start = run.init()
    trunk = random_weights(trunk_shapes(3), 1)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(start["params"]["discriminator"]["trunk"]),
        trunk,
    )
    assert set(start["ema"]) == {"autoencoder"}
    # The head starts at zero, which leaves images and decodings level; let it have an opinion.
    head = start["params"]["discriminator"]["head"]
    head["kernel"] += np.random.default_rng(3).standard_normal(head["kernel"].shape)
    before = jax.device_get(start["params"])
    state, figures = steps(run, 2, start)
    after = jax.device_get(state["params"])
    for player in ("autoencoder", "discriminator"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[player], after[player])
        assert min(jax.tree.leaves(moved)) > 0
    named = set(figures[0])
    for name in ("lpips", "reconstruction", "gan", "latent_square", "latent_kurtosis"):
        assert f"autoencoder/{name}" in named
    for name in ("logit_real", "logit_fake", "accuracy", "loss"):
        assert f"discriminator/{name}" in named
    assert all(np.isfinite(v) for row in figures for v in row.values())
    # Before `gan_start` the GAN term counts nothing.
    for started, row in enumerate(figures):
        weights = {"lpips": 1, "reconstruction": 0.2, "latent_square": 1, "gan": started}
        loss = sum(weight * row[f"autoencoder/{name}"] for name, weight in weights.items())
        assert row["autoencoder/loss"] == pytest.approx(loss, rel=1e-5)
        assert row["autoencoder/gan"] > 1e-3
        # The discriminator is shown the images and the decoded ones.
        assert abs(row["discriminator/logit_real"] - row["discriminator/logit_fake"]) > 1e-3


LATER_WEIGHTS = {"lpips": 1, "gan": 1, "latent_square": 0.1}


def test_the_later_recipe_carries_lecams_anchors(vgg):
    config = tiny_aura(
        "later",
        data__size=(64, 64),
        model__shrink=2,
        crop__rate=0.0,
        train__batch_size=2,
        loss__lecam=0.1,
    )
    run = Run(config, jax.devices()[:1])
    state, figures = steps(run, 2)
    # The heads start at zero, so the first step's logits are zero; those of the second are not.
    assert figures[0]["discriminator/logit_real"] == 0
    for name in ("real", "fake"):
        logit = figures[1][f"discriminator/logit_{name}"]
        assert abs(logit) > 0
        assert state["variables"]["anchors"][name] == pytest.approx(0.1 * logit, rel=1e-4)
    assert figures[0]["discriminator/loss"] == pytest.approx(np.log(2), rel=1e-5)  # halved
    row = figures[1]
    loss = sum(w * row[f"autoencoder/{n}"] for n, w in LATER_WEIGHTS.items())
    assert row["autoencoder/loss"] == pytest.approx(loss, rel=1e-5)
    assert "autoencoder/reconstruction" not in row


def test_a_high_resolution_decoder_is_compared_with_the_images_at_twice_the_side():
    sides = {"data__size": (16, 16), "model__shrink": 2}
    run = Run(tiny_aura(model__decoder_widths=(4, 8, 8), **sides), jax.devices()[:1])
    model = run.method.autoencoder
    x = jnp.arange(256.0).reshape(1, 16, 16, 1).repeat(3, -1)
    small, target = model.views(x)
    assert (small.shape[1], target.shape[1]) == (8, 16)
    np.testing.assert_array_equal(target, x)
    assert small[0, 0, 0, 0] == x[0, :2, :2, 0].mean()
    params = run.abstract_state["params"]["autoencoder"]
    latent = jax.eval_shape(model.encode, params, small)
    assert jax.eval_shape(model.decode, params, latent).shape == x.shape
    # Without it the target is what the encoder sees.
    plain = make_method(tiny_aura(**sides)).autoencoder
    np.testing.assert_array_equal(*plain.views(x))
