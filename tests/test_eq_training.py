"""EQ-VAE in the training loop: programs per shape, the compilation cache, meshes, warm starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_aura_training import steps
from test_lpips import needs_weights
from tiny import tiny_eq

import efae_jax
from efae_jax import train
from efae_jax.convert import files
from efae_jax.errors import UserError
from efae_jax.run import Run

CONSTANT = {"eq__min_scale": 0.5, "eq__scale_buckets": 1, "train__steps": 12}


def test_each_shape_compiles_once_and_a_resumed_run_is_the_same(tmp_path, only_one_device, runs):
    state = jax.device_get(train.train(tiny_eq(**CONSTANT), tmp_path / "whole"))
    run = runs[0]
    plans = [run.method.plan(step) for step in range(12)]
    assert len(runs) == 12
    assert run.programs.keys() == set(plans)
    assert {plan.branch for plan in plans} == {"equivariance", "prior", "plain"}
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["programs"] == len(set(plans))
    assert last["compile_seconds"] == pytest.approx(run.compile_seconds)
    train.train(tiny_eq(**CONSTANT | {"train__steps": 6}), tmp_path / "cut")
    resumed = jax.device_get(train.train(tiny_eq(**CONSTANT), tmp_path / "cut"))
    jax.tree.map(np.testing.assert_array_equal, state, resumed)


def test_no_step_after_warm_up_compiles():
    run = Run(tiny_eq(eq__min_scale=0.5, eq__scale_buckets=1), jax.devices()[:1])
    state, _ = steps(run, 1)
    batch = jax.device_put({"image": np.zeros((8, 8, 8, 3), np.uint8), "label": np.zeros(8, int)})
    for step in range(40):
        state, _ = run.step(state, batch, run.method.plan(step))
    assert run.programs.keys() == set(run.method.plans())
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for step in range(40, 120):
            state, _ = run.step(state, batch, run.method.plan(step))
        assert not [event for event in compiled if "compile" in event]
        jax.jit(lambda x: x * 3.25)(np.float32(1))
        assert [event for event in compiled if "compile" in event]  # it would have been noticed
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_all_devices_and_parts_give_the_same_steps():
    """Scales, elements and draws follow from (seed, step, example), so the mesh changes nothing."""
    results = []
    for devices, accumulate in ((1, 1), (4, 1), (1, 2)):
        config = tiny_eq(
            mesh__data=devices, train__accumulate=accumulate, optim__lr=1e-2, eq__min_scale=1.0
        )
        run = Run(config, jax.devices()[:devices])
        state, figures = steps(run, 2)
        results.append((jax.device_get(state["params"]), figures))
    for params, figures in results[1:]:
        for one, other in zip(results[0][1], figures, strict=True):
            for name in ("loss", "kl", "gradient_norm"):
                name = f"autoencoder/{name}"
                np.testing.assert_allclose(one[name], other[name], rtol=1e-4)
        kernel = lambda tree: tree["autoencoder"]["decoder"]["conv_out"]["kernel"]  # noqa: E731
        np.testing.assert_allclose(kernel(results[0][0]), kernel(params), atol=1e-4)


@needs_weights
def test_every_player_learns(only_one_device):
    """With LPIPS, discriminator and logvar: all parameters move, statistics are carried on."""
    config = tiny_eq(
        data__size=(48, 48),
        loss__lpips=1.0,
        loss__gan=0.5,
        loss__learn_logvar=True,
        eq__min_scale=0.5,
        eq__scale_buckets=1,
        eq__p_prior=0.0,
        train__batch_size=4,
        train__accumulate=2,
    )
    run = Run(config, jax.devices()[:1])
    before = jax.device_get(run.init())
    state, figures = steps(run, 2)
    assert run.method.players == ("autoencoder", "logvar", "discriminator")
    for player in run.method.players:
        for old, new in zip(
            jax.tree.leaves(before["params"][player]),
            jax.tree.leaves(jax.device_get(state["params"][player])),
            strict=True,
        ):
            assert np.any(old != new)
    means = [norm["mean"] for norm in state["variables"]["discriminator"].values()]
    assert all(np.any(np.asarray(mean) != 0) for mean in means)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(figures))


def test_fine_tuning_from_a_file_of_weights_to_a_folder_of_diffusers(tmp_path, only_one_device):
    """The way of README's two commands, from weights that another program could have written."""
    first = tmp_path / "first"
    train.train(tiny_eq(regulariser="none", train__steps=1), first)
    from efae_jax.__main__ import main

    assert main(["export", str(first), str(tmp_path / "kl.safetensors"), "--format", "ldm"]) == 0
    config = tiny_eq(
        init_from=str(tmp_path / "kl.safetensors"), train__steps=2, eq__min_scale=1.0,
        optim__lr=1e-6, optim__warmup=0,
    )  # fmt: skip
    state = train.train(config, tmp_path / "eq")
    ours = jax.device_get(state["params"]["autoencoder"]["decoder"]["conv_out"]["kernel"])
    start = efae_jax.load(first).params["decoder"]["conv_out"]["kernel"]
    assert 0 < np.abs(ours - start).max() < 1e-4
    assert main(["export", str(tmp_path / "eq"), str(tmp_path / "out")]) == 0
    there = files.read_state_dict(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert "decoder.conv_out.weight" in there
    # The model's shapes come from the config; another model is refused before anything is written.
    wrong = tiny_eq(init_from=str(first), model__latent_channels=3)
    with pytest.raises(UserError, match="latent_channels"):
        train.train(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


RUN = """
import json, sys
import jax
from tiny import tiny_eq
from efae_jax import train
workdir, steps = sys.argv[1], int(sys.argv[2])
config = tiny_eq(eq__min_scale=1.0, eq__p_prior=0.0, train__steps=steps, mesh__data=1)
config.checkpoint.every = 100
train.train(config, workdir)
"""


def test_a_second_start_compiles_nothing(tmp_path):
    """In processes of their own: every program of a step is read back from the work directory."""
    drop = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

    def figures(steps):
        subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / "run"), str(steps)],
            env=environment,
            check=True,
            capture_output=True,
        )
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])

    first, second = figures(4), figures(8)
    assert (tmp_path / "run" / "compilation_cache").is_dir()
    assert first["programs"] >= 1
    assert first["cache_hits"] == 0
    assert second["programs"] == first["programs"]
    assert second["cache_hits"] == second["programs"]
