"""Bases on the command line: imported, exported, carried along, seen."""

from __future__ import annotations

import numpy as np
from saved_models import conv_config, folder_of_images, save
from sketch_weights import saved_state_dict

import efae_jax
from efae_jax.__main__ import main
from efae_jax.basis import make_basis
from efae_jax.disentangled import Disentangled, read_basis


def rotation(seed):
    u, _, v = np.linalg.svd(np.random.default_rng(seed).standard_normal((4, 4)))
    return u @ v


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_disentangler_goes_in_and_out(tmp_path, capsys):
    file = saved_state_dict(tmp_path / "theirs.safetensors", rotation(0))
    assert run("import", file, tmp_path / "run") == 0
    assert "4 channels, 1 of them semantic" in capsys.readouterr().out
    assert run("import", "--format", "sketch", file, tmp_path / "again") == 0
    for options, error in (
        (("--padding", "zeros"), "--padding: format sketch takes no such option"),
        (("--verify",), "--verify: format sketch takes no such option"),
    ):
        assert run("import", file, tmp_path / "other", *options) == 2
        assert error in capsys.readouterr().err
    assert run("export", tmp_path / "run", tmp_path / "out.safetensors") == 0
    assert "out.safetensors, format sketch" in capsys.readouterr().out
    matrix = tmp_path / "m.safetensors"
    assert run("export", tmp_path / "run", matrix, "--format", "matrix") == 0
    assert read_basis(matrix).semantic == 1
    assert run("export", tmp_path / "run", tmp_path / "x.safetensors", "--format", "ldm") == 2
    assert "allowed: sketch, matrix" in capsys.readouterr().err


def test_a_models_basis_is_exported_and_imported_with_it_and_moves_channels(tmp_path, capsys):
    images = folder_of_images(tmp_path / "images", [(16, 16), (16, 16)])
    model = efae_jax.load(save(tmp_path / "plain", conv_config()))
    basis = make_basis(rotation(0), 3, "here")
    Disentangled(model, basis).save(tmp_path / "model")
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    assert "basis.safetensors, the basis that the model carries" in capsys.readouterr().out
    assert run("import", tmp_path / "out", tmp_path / "back") == 0
    assert "with the basis" in capsys.readouterr().out
    found = efae_jax.load(tmp_path / "back").basis
    assert (found.matrix.tobytes(), found.semantic) == (basis.matrix.tobytes(), 3)

    shared = ("lerp", images / "0.png", images / "1.png", "--out", tmp_path / "lerp", "--alpha", 1)
    assert run(*shared, "--model", tmp_path / "back", "--size", 8) == 0
    assert "semantic" in capsys.readouterr().out
    assert run(*shared, "--model", tmp_path / "plain") == 2
    assert "no basis travels with the model" in capsys.readouterr().err
