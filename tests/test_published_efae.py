"""EFAE's presets beside the numbers of the original, written down from its programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from configs import efae
from efae_jax.convert.efae import to_torch
from efae_jax.errors import UserError
from efae_jax.methods.base import Weighted
from efae_jax.methods.by_time import by_time
from efae_jax.models.build import build_flow_autoencoder
from efae_jax.train import _collect

ORIGINAL = {
    "dtype": "float32",
    "model.start": "pytorch",
    "model.encoder.kind": "original",
    "model.encoder.latent_channels": 256,
    "model.velocity.kind": "original",
    "model.velocity.patch": 2,
    "group.name": "z2_h",
    "group.representation": "252*trivial + 4*sign",
    "group.in_objective": True,
    "latent.penalty": 0.0,
    "latent.noise": "none",
    "latent.clamp": 0.0,
    "flow.time": "logit_normal",
    "flow.time_loc": 0.0,
    "flow.time_scale": 1.0,
    "flow.drop_rate": 0.1,
    "train.batch_size": 512,
    "optim.lr": 2e-3,
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.0,
    "optim.schedule": "constant",
    "optim.warmup": 0,
    "optim.clip": 0.0,
    "ema.decay": 0.0,
    "data.size": (32, 32),
    "eval.steps": 50,
    "eval.solver": "euler",
    "eval.guidance": 2.0,
}
PRESETS = {
    # 100 epochs of 117 batches, the last, incomplete one left out.
    "mnist": ORIGINAL
    | {
        "data.path": "mnist",
        "data.channels": 1,
        "data.pad": 2,
        "data.flip": False,
        "model.velocity.width": 64,
        "model.velocity.depth": 6,
        "model.velocity.heads": 4,
        "train.steps": 11_700,
    },
    # 100 epochs of 97 batches.
    "cifar10": ORIGINAL
    | {
        "data.path": "cifar10",
        "data.channels": 3,
        "data.pad": 0,
        "data.flip": True,
        "model.velocity.width": 256,
        "model.velocity.depth": 10,
        "model.velocity.heads": 8,
        "train.steps": 9_700,
    },
}


@pytest.mark.parametrize("variant", PRESETS)
def test_a_preset_is_what_the_program_does(variant):
    config, found = efae.get_config(variant), {}
    for name in PRESETS[variant]:
        value = config
        for part in name.split("."):
            value = value[part]
        found[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    assert found == PRESETS[variant]


@pytest.fixture(scope="module")
def started():
    """Parameters of the MNIST model as they start, by their names in PyTorch."""
    model = build_flow_autoencoder(efae.get_config("mnist"))
    return to_torch(jax.device_get(jax.jit(model.init)(jax.random.key(0))))


def test_every_parameter_starts_as_pytorchs_modules_draw_it(started):
    torch = pytest.importorskip("torch")
    from torch_original import Original

    torch.manual_seed(0)
    theirs = {n: p.detach().numpy() for n, p in Original(1, 64, 6, 4, 2, 256).named_parameters()}
    assert {n: a.shape for n, a in started.items()} == {n: a.shape for n, a in theirs.items()}
    zero = {n for n, a in started.items() if not np.any(a)}
    # Layers of norms start with biases of zero in PyTorch, too.
    norms = {n for n, a in theirs.items() if not np.any(a)}
    last = {n for n in theirs if "final_layer.linear." in n or n.endswith("x_embedder.bias")}
    assert len(last) == 3
    assert zero == norms | last
    for name in set(theirs) - last:
        ours, there = started[name], theirs[name]
        if there.size > 2_000:
            assert np.std(ours) == pytest.approx(np.std(there), rel=0.06), name
        elif np.ptp(there):
            assert 0.4 < np.abs(ours).max() / np.abs(there).max() < 2.5, name
        else:
            np.testing.assert_array_equal(ours, there)


def test_the_latent_starts_as_small_as_the_originals(started):
    """Of 32x32 images PyTorch's start gives a latent of rms 0.015 to 0.017; Flax' 0.07 to 0.09."""
    del started
    x = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    found = {}
    for start in ("pytorch", "flax"):
        config = efae.get_config("cifar10")
        config.model.start = start
        model = build_flow_autoencoder(config)
        params = jax.jit(model.encoder.init)(jax.random.key(0))
        found[start] = float(jnp.sqrt(jnp.mean(model.encoder(params, x) ** 2)))
    assert 0.01 < found["pytorch"] < 0.025
    assert found["flax"] > 3 * found["pytorch"]


def test_only_the_original_networks_start_as_pytorchs():
    with pytest.raises(UserError, match="config.model.start='pytorch' is of the original"):
        build_flow_autoencoder(tiny(model__start="pytorch"))


# The loss by time.


def test_a_loss_falls_into_the_bin_of_its_time():
    loss = jnp.arange(1.0, 7.0)
    found = by_time("flow", loss, jnp.array([0.0, 0.05, 0.55, 0.999, 1.0, 0.1]))
    assert list(found)[:2] == ["flow_t0.0-0.1", "flow_t0.1-0.2"]
    assert len(found) == 10
    means = {n: f.weighted.sum() / f.weight.sum() for n, f in found.items() if f.weight.sum()}
    assert means == {
        "flow_t0.0-0.1": 1.5,
        "flow_t0.1-0.2": 6.0,
        "flow_t0.5-0.6": 3.0,
        "flow_t0.9-1.0": 4.5,
    }


def test_a_weighted_figure_is_a_mean_over_all_examples_that_it_is_of():
    """However unevenly they fall into batches; of none there is no figure."""

    def metrics(values, weights):
        pair = Weighted(np.mean(np.multiply(values, weights)), np.mean(weights))
        return {"a/loss": np.float32(1), "a/some": pair, "a/never": Weighted(0 * pair[0], 0.0)}

    done = [(1, metrics([5.0, 1.0], [1, 0])), (2, metrics([2.0, 3.0], [1, 1]))]
    assert _collect(done) == {"a/loss": 1.0, "a/some": pytest.approx(10 / 3)}
