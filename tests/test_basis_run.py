"""Disentangling runs: the basis that they hold, and the original program's files."""

from __future__ import annotations

import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from sketch_weights import saved_state_dict
from weights import SHARED, assert_same_bytes, error_of, needs

import efae_jax
from configs import disentangle
from efae_jax import convert, groups
from efae_jax.checkpoint import save_model
from efae_jax.convert import files, sketch
from efae_jax.disentangled import read_basis
from efae_jax.disentangled.runs import PLAYER, export_run, import_run, restore_run
from efae_jax.models.disentangler import build_disentangler

MATRIX = "z_transform.weight"


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def near(seed, side):
    """Some way from orthogonal: further than a file may be."""
    return 1.5 * np.linalg.svd(normal(seed, side, side))[0] + 1e-2 * normal(seed + 1, side, side)


@pytest.mark.parametrize("orthogonality", ["soft", "cayley"])
def test_a_run_gives_the_basis_that_it_found(tmp_path, orthogonality, caplog):
    config = disentangle.get_config("smoke")
    with config.unlocked():
        config.data.latent, config.data.text, config.data.image = (4, 4, 6), 5, 7
        config.model.semantic, config.model.orthogonality = 2, orthogonality
        config.model.blocks = 1
    disentangler = build_disentangler(config)
    shapes = jax.eval_shape(disentangler.init, jax.random.key(0))
    params = jax.tree.map(lambda shape: normal(math.prod(shape.shape), *shape.shape), shapes)
    if orthogonality == "soft":
        params["transform"]["matrix"] = W = near(0, 6)
        wanted = groups.qr_basis(W)
    else:
        params["transform"]["free"] = normal(0, 6, 6)
        wanted = groups.orthogonal(jnp.asarray(normal(0, 6, 6)))
    workdir = tmp_path / "run"
    save_model(workdir, {PLAYER: params}, json.loads(config.to_json_best_effort()))
    with caplog.at_level(logging.WARNING):
        found = read_basis(workdir)
    np.testing.assert_allclose(found.matrix, wanted, rtol=0, atol=1e-5)
    assert groups.orthogonality_error(found.matrix) < 2e-6
    assert (found.semantic, found.source) == (2, f"{workdir}, step 0")
    assert not caplog.records
    assert "holds a basis of a model's latent and no model" in error_of(efae_jax.load, workdir)

    # What is exported is the basis, whatever it was made of, and embedders that give the same.
    assert export_run(workdir, tmp_path / "out.safetensors") == "sketch"
    exported = sketch.read(tmp_path / "out.safetensors")
    np.testing.assert_allclose(exported["transform"]["matrix"], found.matrix, rtol=0, atol=2e-6)
    config = sketch.new_config(exported, "out")
    u, embeddings = normal(1, 2, 4, 4, 6), []
    for model, weights in ((disentangler, params), (build_disentangler(config), exported)):
        embeddings.append(jax.jit(model.embed)(weights, u))
    for ours, theirs in zip(*embeddings, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_originals_file_makes_a_run_and_comes_back(tmp_path):
    W = near(1, 4)
    file = saved_state_dict(tmp_path / "theirs.safetensors", W)
    said = import_run(file, tmp_path / "run")
    assert f"{file}: disentangler, format sketch" in said
    assert "4 channels, 1 of them semantic; embeddings of 5 (text) and 6 (image) numbers" in said
    run = restore_run(tmp_path / "run")
    assert_same_bytes(jax.device_get(run.params), sketch.read(file))
    assert (run.config.method, run.config.model.orthogonality) == ("disentangle", "soft")
    assert (run.config.model.width, run.config.model.blocks, run.step) == (2, 1, 0)

    Q = groups.qr_basis(W)
    assert read_basis(tmp_path / "run", semantic=3).semantic == 3
    export_run(tmp_path / "run", tmp_path / "out.safetensors")
    ours = files.read_state_dict(tmp_path / "out.safetensors")
    theirs = files.read_state_dict(file)
    np.testing.assert_allclose(ours.pop(MATRIX), Q, rtol=0, atol=1e-6)
    del theirs[MATRIX]
    assert_same_bytes(ours, theirs)

    assert export_run(tmp_path / "run", tmp_path / "m.safetensors", "matrix") == "matrix"
    basis = read_basis(tmp_path / "m.safetensors")
    assert basis.semantic == 1
    np.testing.assert_allclose(basis.matrix, Q, rtol=0, atol=1e-6)
    bare = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert_same_bytes(bare, {"weight": basis.matrix})

    export_run(tmp_path / "run", tmp_path / "half.safetensors", dtype="bfloat16")
    half = files.read_state_dict(tmp_path / "half.safetensors")
    assert {a.dtype.name for a in half.values()} == {"bfloat16"}
    bias = "sem_embedder.in_conv.bias"
    np.testing.assert_array_equal(half[bias], theirs[bias].astype(half[bias].dtype))


@needs("fixtures/sketch.npz")
def test_the_published_sizes_are_recognised():
    config = sketch.new_config(sketch.read(SHARED / "fixtures" / "sketch.npz"), "sketch.npz")
    data, model = config.data, config.model
    assert (data.latent, data.text, data.image) == ((4,), 512, 512)
    assert (model.semantic, model.width, model.blocks) == (2, 4, 3)


def test_mistakes_are_one_line_and_write_nothing(tmp_path):
    file = saved_state_dict(tmp_path / "theirs.safetensors", near(1, 4))
    with pytest.raises(sketch.DisentanglerError, match="efae_jax.read_basis the basis"):
        convert.read_model(file)
    tensors = safetensors.numpy.load_file(file)
    tensors["style_embedder.in_conv.bias"] = np.zeros(3, np.float32)
    tensors["sem_embedder.embedder.1.weight"] = np.zeros(3, np.float32)
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(safetensors.numpy.save(tensors))
    message = error_of(import_run, wrong, tmp_path / "run")
    assert "2 of the wrong shape: sem_embedder.embedder.1.weight is (3,), expected (4,)" in message
    assert "style_embedder.in_conv.bias is (3,), expected (2,)" in message
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(safetensors.numpy.save({"weight": np.eye(4, dtype=np.float32)}))
    assert "give the file as --basis" in error_of(import_run, bare, tmp_path / "run")
    assert "is there already; give a new directory" in error_of(import_run, file, tmp_path)
    assert not (tmp_path / "run").exists()

    import_run(file, tmp_path / "run")
    out = tmp_path / "out.safetensors"
    assert "allowed: sketch, matrix" in error_of(export_run, tmp_path / "run", out, "ldm")
    for place, dtype in ((tmp_path / "out.npy", None), (out, "bfloat16")):
        message = error_of(export_run, tmp_path / "run", place, "matrix", dtype)
        assert "--format matrix writes a .safetensors file of float32" in message
    assert "--dtype int8: no such type" in error_of(
        export_run, tmp_path / "run", out, "sketch", "int8"
    )
    for format in ("sketch", "matrix"):
        assert "is there already" in error_of(export_run, tmp_path / "run", file, format)
    assert not out.exists()
