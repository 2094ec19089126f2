"""`import` and `export` as a user types them, in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from test_convert_ldm import shapes
from weights import assert_same_bytes, random_state_dict

import efae_jax
from efae_jax.__main__ import main
from efae_jax.convert import files


@pytest.fixture
def checkpoint(tmp_path):
    """A file of LDM's kind, the autoencoder a part of a larger model."""
    tensors = random_state_dict(shapes("flux"))
    whole = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"model.unet.weight": np.zeros(3, np.float32)}
    path = tmp_path / "model.ckpt"
    path.write_bytes(safetensors.numpy.save(whole))
    return path, tensors


def test_from_ldm_through_a_work_directory_to_diffusers_and_back(checkpoint, tmp_path, capsys):
    path, tensors = checkpoint
    workdir = tmp_path / "workdir"
    assert main(["import", str(path), str(workdir), "--scaling-factor", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "kl, format ldm" in said
    assert "not part of the autoencoder, not imported: 1 tensors model.*" in said
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["source"] == str(path)

    assert main(["export", str(workdir), str(tmp_path / "folder")]) == 0
    assert "format diffusers" in capsys.readouterr().out
    stated = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert stated["scaling_factor"] == 0.5
    # What `import` takes, `export` and `load` take too.
    out = tmp_path / "again.safetensors"
    assert main(["export", str(tmp_path / "folder"), str(out), "--format", "ldm"]) == 0
    assert_same_bytes(files.read_state_dict(out), tensors)
    z = np.ones((1, 2, 2, 16), np.float32)
    one, other = (efae_jax.load(p).decode(z) for p in (workdir, out))
    np.testing.assert_array_equal(one, other)

    out = tmp_path / "half.safetensors"
    assert main(["export", str(workdir), str(out), "--format=ldm", "--dtype=bfloat16"]) == 0
    assert files.read_state_dict(out)["decoder.conv_in.bias"].dtype.name == "bfloat16"


def test_verifying_prints_the_largest_differences(checkpoint, tmp_path, capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    path, _ = checkpoint
    workdir, folder = tmp_path / "workdir", tmp_path / "folder"
    assert main(["import", str(path), str(workdir), "--verify", "--scaling-factor=1"]) == 0
    assert main(["export", str(workdir), str(folder), "--verify"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "JAX and PyTorch" in line]
    assert [line.split()[0].strip(",:") for line in lines] == 2 * ["encode", "decode"]
    # A folder, diffusers loads itself.
    assert ["from a copy that efae_jax wrote" in line for line in lines] == [True] * 2 + [False] * 2
    assert all(float(line.split()[-5]) < 1e-5 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["import", "MODEL", "there"], "there already"),
        (["import", "MODEL", "new", "--format", "onnx"], "no such format"),
        (["import", "MODEL", "new", "--heads", "4"], "--heads: format ldm takes only"),
        (
            ["import", "MODEL", "new", "--padding", "mirror"],
            "padding must be one of zeros, reflect",
        ),
        (["import", "MODEL", "new", "--scaling-factor", "-1"], "scaling must be positive"),
        (["import", "MODEL", "new", "--format", "efae"], "is not a model of format efae"),
        (["export", "MODEL", "new", "--format", "taesd"], "allowed: diffusers, ldm"),
        (["export", "MODEL", "new", "--format", "onnx"], "no such format"),
        (["export", "MODEL", "new", "--format", "ldm"], "must end in .safetensors"),
        (
            ["export", "MODEL", "m.safetensors"],
            "format diffusers writes a folder, and m.safetensors names a file; give a folder, or "
            "--format ldm",
        ),
        (
            ["export", "MODEL", "new", "--dtype=int4", "--scaling-factor=1"],
            "--dtype int4: no such type",
        ),
        (["export", "nowhere", "new"], "cannot read nowhere"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    checkpoint, arguments, expected, tmp_path, capsys, monkeypatch
):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main([str(checkpoint[0]) if a == "MODEL" else a for a in arguments]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert expected in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("there", ["config.safetensors", "config.json"])
def test_export_replaces_nothing(checkpoint, there, tmp_path, capsys):
    (tmp_path / there).write_text("precious")
    out = str(tmp_path / "config.safetensors")
    assert main(["export", str(checkpoint[0]), out, "--format", "ldm"]) == 2
    assert f"{there} is there already; give another name" in capsys.readouterr().err
    assert (tmp_path / there).read_text() == "precious"
    assert len([*tmp_path.iterdir()]) == 2


def test_loading_weights_says_what_importing_them_says(checkpoint, caplog):
    efae_jax.load(checkpoint[0])
    assert "model.ckpt: the file does not say how its latent is scaled" in caplog.text
    assert "not part of the autoencoder, not loaded: 1 tensors model.*" in caplog.text


def test_what_is_no_work_directory_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"method": "efae"}')
    evaluate = ["evaluate", "--model", str(run), "--out", str(tmp_path / "new")]
    for call in (evaluate, ["export", str(run), str(tmp_path / "new")]):
        assert main(call) == 2
        assert "holds no checkpoint; train first" in capsys.readouterr().err
    assert main(["import", str(run), str(tmp_path / "new")]) == 2
    assert "work directory of efae_jax, which needs no import" in capsys.readouterr().err


def test_a_stop_by_the_keyboard_is_one_line(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("efae_jax.encode.encode_source", stop)
    assert main(["encode", "--model", "m", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
