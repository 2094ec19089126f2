"""Disentangling: its loss, what it finds, and runs of it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_device
from pair_files import planted, unit, write_pairs
from saved_models import conv_config, save
from tiny import tiny_disentangle
from weights import error_of

import efae_jax
from efae_jax import groups, train
from efae_jax.__main__ import main
from efae_jax.data.pairs import Pairs
from efae_jax.disentangled import read_basis
from efae_jax.disentanglement import evaluate_workdir
from efae_jax.disentanglement.reconstruction import decoded_difference
from efae_jax.methods import complete_config
from efae_jax.methods.base import Context
from efae_jax.methods.disentangle import Disentangle
from efae_jax.metrics.subspaces import principal_angles
from efae_jax.models.disentangler import change_channels
from efae_jax.optim import make_optimizer
from efae_jax.run import Run
from efae_jax.state import init_state, make_train_step

SEEDS = 3
CONSTANT = {"optim__schedule": "constant", "optim__warmup": 0, "eval__every": 3}


def method_of(channels=4, dimension=6, **overrides):
    sizes = {"data__latent": (channels,), "data__text": dimension, "data__image": dimension}
    return Disentangle(tiny_disentangle(**sizes, model__semantic=channels // 2, **overrides))


def joint(dimension):
    return {"matrix": jnp.eye(dimension), "offset": jnp.zeros(dimension)}


def a_batch(rng, size, channels, dimension, captions=2):
    def embeddings(*shape):
        return unit(rng.standard_normal((*shape, dimension)))

    text = np.zeros((size, 5, dimension), np.float32)
    text[:, :captions] = embeddings(size, captions)
    return {
        "latent": rng.standard_normal((size, channels)).astype(np.float32),
        "captions": text,
        "count": np.full(size, captions, np.int32),
        "image": embeddings(size),
    }


def outcome(method, params, batch, frozen, key=0):
    keys = jax.random.split(jax.random.key(key), len(batch["latent"]))
    context = Context(jnp.int32(0), {}, {}, frozen, None)
    return method.loss("disentangler", params, batch, keys, context)


@pytest.mark.parametrize("form", ["distance", "mse", "l1"])
def test_the_loss_is_that_of_both_embedders_and_the_matrix(form):
    method = method_of(loss__form=form, loss__orthogonality=0.5, model__orthogonality="soft")
    params = method.init(jax.random.key(0))
    own = params["disentangler"]
    own["transform"]["matrix"] += 0.1 * jax.random.normal(jax.random.key(1), (4, 4))
    W, batch = own["transform"]["matrix"], a_batch(np.random.default_rng(0), 3, 4, 6, captions=1)
    batch["latent"][0] = [9.0, 1.0, -7.0, 0.5]  # the limit is 3
    frozen = {"matrix": 0.3 * np.ones((6, 6)), "offset": np.arange(6.0)}
    u = np.clip(batch["latent"], -3, 3) @ np.asarray(W).T
    text = batch["captions"][:, 0]
    style = batch["image"] - (text @ frozen["matrix"] + frozen["offset"])
    size = {"distance": lambda d: (d**2).sum(-1), "mse": lambda d: (d**2).mean(-1)}.get(
        form, lambda d: np.abs(d).mean(-1)
    )
    semantic, looks = method.disentangler.embed(own, u)
    excess = np.square(np.asarray(W.T @ W) - np.eye(4))
    excess = excess.mean() if form == "mse" else excess.sum()
    expected = size(semantic - text) + size(looks - style) + 0.5 * excess
    found = outcome(method, params, batch, frozen)
    np.testing.assert_allclose(found.loss_B, expected, rtol=1e-5)
    np.testing.assert_allclose(found.metrics["orthogonality"], excess, rtol=1e-5)


def test_an_exact_matrix_costs_nothing(monkeypatch):
    monkeypatch.setattr("efae_jax.methods.disentangle.orthogonality_loss", lambda *_: 1.0)
    method = method_of(loss__orthogonality=1.0)
    params, batch = method.init(jax.random.key(0)), a_batch(np.random.default_rng(0), 3, 4, 6)
    params["disentangler"]["transform"]["free"] += 0.3 * np.arange(16.0).reshape(4, 4)
    found = outcome(method, params, batch, joint(6))
    np.testing.assert_allclose(
        found.loss_B, found.metrics["semantic"] + found.metrics["style"], rtol=1e-6
    )


def test_each_example_takes_a_caption_of_its_own_by_its_key():
    method, rng = method_of(), np.random.default_rng(0)
    params, batch = method.init(jax.random.key(0)), a_batch(rng, 64, 4, 6, captions=3)
    batch["latent"][:] = batch["latent"][0]
    batch["captions"][:] = batch["captions"][0]
    u = change_channels(method.disentangler.matrix(params["disentangler"]), batch["latent"][:1])
    semantic, _ = method.disentangler.embed(params["disentangler"], u)
    each = np.square(np.asarray(semantic) - batch["captions"][0, :3]).sum(-1)
    taken = [
        np.asarray(outcome(method, params, batch, joint(6), key).metrics["semantic"])
        for key in (0, 0, 1)
    ]
    picks = [np.abs(t[:, None] - each).argmin(1) for t in taken]
    np.testing.assert_allclose(taken[0], each[picks[0]], rtol=1e-5)
    assert (np.bincount(picks[0], minlength=3) > 10).all()  # all three, none of the padding
    np.testing.assert_array_equal(picks[0], picks[1])
    assert (picks[0] != picks[2]).any()


def planted_problem(channels, seed, count=2048):
    """Latents Q^T [s; y], captions unit(A s), images caption + unit(B y)."""
    rng = np.random.default_rng((seed, channels))
    matrix, half = np.linalg.qr(rng.standard_normal((channels, channels)))[0], channels // 2
    u = rng.standard_normal((count, channels))
    text, style = (
        unit(part @ rng.standard_normal((half, channels))) for part in (u[:, :half], u[:, half:])
    )
    return matrix, {
        "latent": (u @ matrix).astype(np.float32),
        "captions": np.pad(text[:, None], ((0, 0), (0, 4), (0, 0))),
        "count": np.ones(count, np.int32),
        "image": text + style,
    }


@pytest.mark.parametrize("orthogonality", ["soft", "cayley"])
@pytest.mark.parametrize(("channels", "steps"), [(4, 200), (16, 400), (32, 600)])
def test_a_planted_basis_is_found(channels, steps, orthogonality):
    """Within 5 degrees at the end; an exact matrix is orthogonal within 1e-6 at every step."""
    method = method_of(
        channels,
        channels,
        model__orthogonality=orthogonality,
        model__blocks=0,
        model__width=max(channels, 8),
        optim__lr=2e-2,
        optim__warmup=0,
        loss__orthogonality=0.1,
        train__steps=steps,
        latent__clip=0.0,
    )
    optimizers = {"disentangler": make_optimizer(method.config.optim, steps)}
    step = make_train_step(method, optimizers, seed=0, ema_decay=0.0, accumulate=1)
    problems = [planted_problem(channels, seed) for seed in range(SEEDS)]
    data = jax.tree.map(lambda *parts: np.stack(parts), *(p for _, p in problems))
    frozen, matrix_of = joint(channels), method.disentangler.matrix

    def one(state, data, key):
        rows = jax.random.randint(key, (64,), 0, len(data["count"]))
        state, _ = step(state, {name: v[rows] for name, v in data.items()}, frozen, None)
        return state, groups.orthogonality_error(matrix_of(state["params"]["disentangler"]))

    @jax.jit
    def run(keys, data):
        states = jax.vmap(lambda key: init_state(method, optimizers, key))(keys)
        many = jax.random.split(jax.random.key(7), steps)
        return jax.lax.scan(lambda s, k: jax.vmap(one, (0, 0, None))(s, data, k), states, many)

    states, errors = run(jax.random.split(jax.random.key(0), SEEDS), data)
    if orthogonality != "soft":
        assert errors.max() < 1e-6
    half, params = channels // 2, states["params"]["disentangler"]
    for seed, (matrix, _) in enumerate(problems):
        Q = np.asarray(method.disentangler.basis(jax.tree.map(lambda v, s=seed: v[s], params)))
        assert groups.orthogonality_error(Q) < 1e-6
        assert principal_angles(Q[:half], matrix[:half])[0] < 5
        assert principal_angles(np.eye(channels)[:half], matrix[:half])[0] > 30  # the start


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    _, *parts = planted(120, channels=4)
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", *parts)


def config_of(pairs, **overrides):
    return tiny_disentangle(data__path=str(pairs), **overrides)


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    with first_device():
        workdir = tmp_path_factory.mktemp("run")
        state = train.train(config_of(pairs, **CONSTANT), workdir)
        return workdir, jax.device_get(state)


def test_a_run_is_resumed_exactly(trained, pairs, tmp_path, only_one_device):
    _, expected = trained
    train.train(config_of(pairs, **CONSTANT, train__steps=3), tmp_path)
    resumed = train.train(config_of(pairs, **CONSTANT), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), expected)


def test_a_run_moves_the_basis_and_logs_held_out_figures(trained):
    workdir, state = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    held_out = [line for line in lines if "eval/caption_r2" in line]
    assert [line["step"] for line in held_out] == [3, 6]
    assert all(line["eval/orthogonality_error"] < 1e-6 for line in held_out)
    basis = read_basis(workdir)
    assert basis.semantic == 2
    assert np.abs(basis.matrix - np.eye(4)).max() > 1e-3
    free = state["params"]["disentangler"]["transform"]["free"]
    np.testing.assert_allclose(basis.matrix, groups.orthogonal(free), atol=1e-6)


def test_its_config_knows_the_sizes_of_the_pairs(trained, pairs):
    found = json.loads((trained[0] / "config.json").read_text())
    assert found["data"] | {"path": ""} == found["data"] | {
        "latent": [2, 2, 4],
        "text": 6,
        "image": 12,
        "path": "",
    }
    assert found["model"]["semantic"] == 2
    again = complete_config(complete_config(config_of(pairs)))
    assert again.data.latent == (2, 2, 4)


def test_the_losses_agree_on_every_mesh(pairs):
    def losses(devices):
        config = complete_config(config_of(pairs, mesh__data=devices))
        run = Run(config, jax.devices()[:devices])
        state, found = run.init(), []
        batches = train.train_batches(config, train.data.make_source(config.data, "train"), 0)
        for _ in range(3):
            state, metrics = run.step(state, train.put_batch(run.mesh, next(batches)))
            found.append(float(metrics["disentangler/loss"]))
        return found

    np.testing.assert_allclose(losses(4), losses(1), rtol=2e-5)


def test_what_does_not_fit(pairs, tmp_path):
    assert "config.loss.form='l2' is not one of distance, mse, l1" in error_of(
        method_of, loss__form="l2"
    )
    assert "config.latent.clip=-1.0 must be at least 0" in error_of(method_of, latent__clip=-1.0)
    assert "only an autoencoder starts from another" in error_of(method_of, init_from="x")
    assert "width=0 must be at least 1" in error_of(method_of, model__width=0)
    message = error_of(complete_config, config_of(tmp_path))
    assert "holds no pairs.json" in message
    message = error_of(complete_config, config_of(pairs, data__text=7))
    assert "config.data.text=7 is not 6, that of" in message
    semantic = complete_config(config_of(pairs, model__semantic=4))
    assert "4 semantic of 4 channels; allowed are 1 to 3" in error_of(
        Run, semantic, jax.devices()[:1]
    )
    for field, value, words in (
        ("draws", 1, "config.eval.draws=1 must be at least 2"),
        ("lr", 0.0, "config.eval.lr=0.0 must be positive"),
        ("batch_size", 0, "config.eval.batch_size=0 must be a positive multiple"),
    ):
        config = complete_config(config_of(pairs, **{f"eval__{field}": value}))
        assert words in error_of(Run, config, jax.devices()[:1])


def test_a_run_does_not_go_on_with_other_pairs(trained, pairs):
    """What was held out may have been trained on: the config knows the split and the embedders."""
    path = pairs / "pairs.json"
    before = path.read_text()
    for name, value in (
        ("test_fraction", 0.4),
        ("text", {**json.loads(before)["text"], "name": "b"}),
    ):
        path.write_text(json.dumps({**json.loads(before), name: value}))
        message = error_of(train.train, config_of(pairs, **CONSTANT), trained[0])
        assert "holds a run of another config (config.data.identity: " in message
    path.write_text(before)


PROBES = ["--steps", "8", "--draws", "2", "--batch-size", "5", "--width", "4"]


def test_a_run_ends_with_the_figures_of_its_basis(trained, pairs, tmp_path, capsys):
    workdir, _ = trained
    config = config_of(pairs, **CONSTANT, eval__draws=2)
    record = evaluate_workdir(workdir, config, jax.devices()[:1])
    written = json.loads((workdir / "eval" / "figures.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert {"figures.txt", "figures.png"} < {path.name for path in (workdir / "eval").iterdir()}
    assert record["step"] == 6
    assert record["semantic"] == 2
    assert record["orthogonality_error"] < 1e-6
    assert record["latent"]["reconstruction_error"] < 1e-6
    assert record["pairs"]["test_fraction"] == 0.2
    assert "cannot be read" in record["reconstruction"]["missing"]  # "planted" is no model
    held_out = record["images"]["held_out"]
    assert record["images"]["train"] + held_out == 120
    assert f"{held_out} held-out images are few" in capsys.readouterr().out
    names = [f"random {part} {i}" for part in ("semantic", "style") for i in range(2)]
    assert record["parts"].keys() == {"semantic", "style", *names, "raw semantic", "raw style"}

    # The same basis from its run, and from a file, by the command.
    given = ["--pairs", str(pairs), *PROBES]
    assert (
        main(["export", str(workdir), str(tmp_path / "Q.safetensors"), "--format", "matrix"]) == 0
    )
    for name, basis in (("a", workdir), ("b", tmp_path / "Q.safetensors")):
        out = ["--out", str(tmp_path / name)]
        assert main(["probe", "--basis", str(basis), *given, *out]) == 0
    a, b = (json.loads((tmp_path / name / "figures.json").read_text()) for name in "ab")
    assert a["parts"] == b["parts"]
    assert a["parts"]["semantic"]["caption"]["r2"] != a["parts"]["style"]["caption"]["r2"]


def test_mistakes_of_probe_are_one_line(pairs, tmp_path, capsys):
    np.save(tmp_path / "Q.npy", np.eye(3))
    np.save(tmp_path / "Q4.npy", np.eye(4))

    def refused(words, basis="Q4.npy", **changes):
        options = {
            "--basis": tmp_path / basis,
            "--pairs": pairs,
            "--out": tmp_path / "o",
            **changes,
        }
        assert main(["probe", *map(str, sum(options.items(), ()))]) == 2
        printed = capsys.readouterr().err
        assert words in printed
        assert len(printed.splitlines()) == 1

    refused("is of 3 channels, the latents in", basis="Q.npy")
    refused("holds no pairs.json", **{"--pairs": tmp_path})
    refused("--draws 1: it must be at least 2", **{"--draws": 1})
    refused("--limit nan: it must be at least 0", **{"--limit": "nan"})
    refused("--lr 0.0: it must be positive", **{"--lr": 0})
    refused("--batch-size 0 must be a positive multiple", **{"--batch-size": 0})
    assert not (tmp_path / "o").exists()


def test_decoding_through_a_basis_changes_nothing(tmp_path):
    kl = save(tmp_path / "kl", conv_config("kl"))
    model, made = efae_jax.load(kl), planted(20, side=4)
    folder = write_pairs(tmp_path / "pairs", made.latents, made.captions, made.images)
    summary = json.loads((folder / "pairs.json").read_text())
    assert "is not the model" in decoded_of(folder, {**summary, "model_source": str(kl)})["missing"]
    summary["latents"]["model"]["sha256"] = model.identity["sha256"]
    summary["model_source"] = str(kl)
    found = decoded_of(folder, summary)
    assert found["images"] == 16
    assert found["largest"] < 1e-4
    assert found["psnr"] > 80
    wrong = decoded_of(folder, summary, 1.1 * np.eye(4, dtype=np.float32))
    assert wrong["psnr"] < 60


def decoded_of(folder, summary, matrix=None):
    (folder / "pairs.json").write_text(json.dumps(summary))
    matrix = groups.orthogonal(jnp.arange(16.0).reshape(4, 4)) if matrix is None else matrix
    return decoded_difference(Pairs(folder), np.asarray(matrix), list(range(20)))
