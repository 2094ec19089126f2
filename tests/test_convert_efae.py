"""The original EFAE's weights: same bytes both ways, same numbers, every problem named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from original_model import ARCHITECTURE, random_inputs, random_params
from weights import assert_same_bytes, error_of

from efae_jax import convert, flow, sampling
from efae_jax.convert import efae, files, sources

GOLDEN = Path(__file__).parents[2] / "shared" / "fixtures" / "efae_mnist.npz"


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def state_dict(params):
    return efae.to_torch(params)


@pytest.fixture
def exported(params, tmp_path):
    path = tmp_path / "out" / "model.safetensors"
    efae.export_efae(params, ARCHITECTURE, path)
    return path


def import_efae(path, heads=None):
    return efae.from_source(sources.read_source(path), heads)


def test_import_of_an_export_is_the_same_model_bit_for_bit(params, exported):
    architecture, again = import_efae(exported)
    assert architecture == ARCHITECTURE
    assert_same_bytes(again, params)


def test_export_of_an_import_is_the_same_state_dict_bit_for_bit(state_dict, tmp_path):
    rng = np.random.default_rng(5)
    theirs = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in state_dict.items()}
    safetensors.numpy.save_file(theirs, tmp_path / "theirs.safetensors")
    architecture, ours = import_efae(tmp_path / "theirs.safetensors", heads=2)
    efae.export_efae(ours, architecture, tmp_path / "again.safetensors")
    assert_same_bytes(safetensors.numpy.load_file(tmp_path / "again.safetensors"), theirs)


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers here")
def test_published_names_come_back_bit_for_bit(tmp_path):
    architecture, params = import_efae(GOLDEN, heads=4)
    efae.export_efae(params, architecture, tmp_path / "mnist.safetensors")
    with np.load(GOLDEN) as file:
        theirs = {k.removeprefix("sd/"): v for k, v in file.items() if k.startswith("sd/")}
    assert_same_bytes(safetensors.numpy.load_file(tmp_path / "mnist.safetensors"), theirs)


def test_pytorch_computes_the_same_from_an_exported_model(params, exported):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from torch_original import Original

    description = json.loads(exported.with_suffix(".json").read_text())
    theirs = Original(*(description["architecture"][key] for key in efae.NETWORK_KEYS))
    theirs.load_state_dict(load_file(exported), strict=True)
    x, t, noise = random_inputs()
    with torch.no_grad():
        x_t, noise_t = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x, noise))
        z_t = theirs.encoder(x_t)
        v_t = theirs.velocity(x_t, torch.tensor(t), z_t)
        sample_t = theirs.sample(noise_t, z_t, steps=4, guidance=2.0)

    nets = efae.nets(ARCHITECTURE)
    velocity = jax.jit(nets["velocity"].__call__)
    z = jax.jit(nets["encoder"].__call__)(params["encoder"], x)
    v = velocity(params["velocity"], x, t, z)
    field = flow.guided(lambda *xtz: velocity(params["velocity"], *xtz), z, 2.0)
    pairs = {
        "latent": (z, z_t),
        "velocity": (v, v_t.permute(0, 2, 3, 1)),
        "sample": (sampling.sample(field, noise, 4), sample_t.permute(0, 2, 3, 1)),
    }
    for name, (ours, other) in pairs.items():
        atol = 1e-4 * float(other.abs().max())
        np.testing.assert_allclose(ours, other.numpy(), rtol=0, atol=atol, err_msg=name)


def test_json_beside_the_weights_says_how_to_build_the_model(exported):
    assert sorted(p.name for p in exported.parent.iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads(exported.with_suffix(".json").read_text()) == {
        "format": "efae",
        "architecture": ARCHITECTURE,
        "image_range": [-1, 1],
    }


def test_all_problems_are_listed_at_once(state_dict, tmp_path):
    broken = dict(state_dict)
    missing = ["encoder.conv.4.bias", "velocity.layers.1.attention.wo.weight"]
    extra = ["velocity.extra", "optimizer\nstep"]
    wrong = "velocity.t_embedder.mlp.2.weight"
    for name in missing:
        del broken[name]
    broken |= {name: np.zeros(2, np.float32) for name in extra}
    broken[wrong] = np.zeros((3, 64), np.float32)
    broken["encoder.conv.0.bias"] = np.zeros(32, np.int64)
    safetensors.numpy.save_file(broken, tmp_path / "broken.safetensors")
    message = error_of(import_efae, tmp_path / "broken.safetensors", heads=2)
    assert f"2 missing: {', '.join(missing)}" in message
    assert "2 left over: 'optimizer\\nstep', velocity.extra" in message
    assert f"1 of the wrong shape: {wrong} is (3, 64), expected (64, 64)" in message
    assert "1 of the wrong type: encoder.conv.0.bias is int64" in message
    assert "broken.safetensors" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("velocity.x_embedder.weight", (64, 513), "expected (width, width/2 * patch^2)"),
        ("velocity.x_embedder.weight", (64, 32 * 5), "expected (width, width/2 * patch^2)"),
        ("velocity.x_embedder.weight", (0, 5), "expected 2 dimensions, none of them 0"),
        ("velocity.x_embedder.weight", (96, 48), "width 96"),
        ("encoder.conv.0.weight", (32, 3), "expected 4 dimensions"),
        ("velocity.c_embedder.weight", (256, 64), "expected (64, 256)"),
        ("velocity.layers.999999999.x", (1,), "left over: velocity.layers.999999999.x"),
    ],
)
def test_shapes_that_fit_no_architecture_are_named(state_dict, name, shape, expected):
    message = error_of(efae.from_torch, state_dict | {name: np.zeros(shape, np.float32)})
    assert name in message or "width" in message
    assert expected in message


def test_a_lost_block_is_listed_name_by_name(state_dict):
    broken = {k: v for k, v in state_dict.items() if not k.startswith("velocity.layers.0.")}
    message = error_of(efae.from_torch, broken)
    assert "17 missing" in message
    assert message.count("velocity.layers.0.") == 17


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly_and_written_as_it_was(state_dict, dtype, tmp_path):
    half = {k: v.astype(dtype) for k, v in state_dict.items()}
    path = tmp_path / "half.safetensors"
    path.write_bytes(safetensors.numpy.save(half))
    read = convert.read_model(path, options=convert.Options(heads=2))
    assert_same_bytes(
        efae.to_torch(read.params), {k: v.astype(np.float32) for k, v in half.items()}
    )
    out = tmp_path / "again.safetensors"
    assert convert.write_model(read.config, read.params, out) == ("efae", [])
    assert_same_bytes(files.read_state_dict(out), half)


def test_heads_come_from_the_json_or_from_the_caller(params, exported):
    assert "heads is stated as 2 and found to be 4" in error_of(import_efae, exported, heads=4)
    assert import_efae(exported, heads=2)[0] == ARCHITECTURE
    exported.with_suffix(".json").unlink()
    assert "--heads" in error_of(import_efae, exported)
    assert "3 heads do not divide width 64" in error_of(import_efae, exported, heads=3)
    assert import_efae(exported, heads=8)[0] == ARCHITECTURE | {"heads": 8}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 128, "patch": 2}, "width is stated as 128 and found to be 64; patch is"),
        ({"depth": 10**9}, "depth is stated as 1000000000"),
        ({"heads": 2.0}, "heads must be a positive whole number, not 2.0"),
        ({"heads": True}, "heads must be a positive whole number, not True"),
        ({"colour": 1}, "1 left over: colour"),
        ({"group": "z3"}, "unknown group 'z3'"),
        ({"group": 3}, "group must be a string"),
        ({"representation": "4*sign"}, "'4*sign' acts on 4 of the latent's 256 numbers"),
        ({"representation": "9999999999*trivial"}, "more than the latent's 256"),
    ],
)
def test_a_json_that_disagrees_is_refused(exported, changes, expected):
    beside = exported.with_suffix(".json")
    description = json.loads(beside.read_text())
    description["architecture"] |= changes
    beside.write_text(json.dumps(description))
    message = error_of(import_efae, exported)
    assert expected in message
    assert str(beside) in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "give --heads"),
        ("{}", "give --heads"),
        ('{"format": "ldm"}', "does not describe a model of format efae"),
        ('{"format": "efae", "architecture": {"heads": 2}}', "5 missing: channels, depth"),
        (
            json.dumps({"format": "efae", "architecture": ARCHITECTURE, "image_range": [0, 1]}),
            "image_range must be [-1, 1]",
        ),
    ],
)
def test_a_json_that_describes_no_model_is_refused(exported, text, expected):
    exported.with_suffix(".json").write_text(text)
    assert expected in error_of(import_efae, exported)


def test_models_of_other_architectures_are_told_what_can_be_exported(params, tmp_path):
    out = tmp_path / "new" / "model.safetensors"
    ours = {"encoder": {"stem": {"kernel": np.zeros(3)}}, "velocity": params["velocity"]}
    learned = params | {"representation": {"free": np.zeros((4, 4), np.float32)}}
    no_blocks = params | {"velocity": {}}
    for tree, architecture in [
        (ours, ARCHITECTURE),
        (learned, ARCHITECTURE),
        (no_blocks, ARCHITECTURE),
        (params, {"side": 32}),
    ]:
        message = error_of(efae.export_efae, tree, architecture, out)
        assert "configs/efae.py:mnist" in message
        assert "configs/efae.py:cifar10" in message
    for architecture, expected in [
        (ARCHITECTURE | {"depth": 3}, "depth is stated as 3 and found to be 2"),
        (ARCHITECTURE | {"heads": 3}, "3 heads do not divide"),
        (ARCHITECTURE | {"image_side": 32}, "left over: image_side"),
    ]:
        assert expected in error_of(efae.export_efae, params, architecture, out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_a_failed_write_leaves_nothing(params, tmp_path, fails, monkeypatch):
    out = tmp_path / "model.safetensors"

    def full(path, *args, **kwargs):
        if fails == "write_bytes":
            with path.open("wb") as file:
                file.write(args[0][:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, full)
        message = error_of(efae.export_efae, params, ARCHITECTURE, out)
    assert "No space left on device" in message
    assert list(tmp_path.iterdir()) == []
    efae.export_efae(params, ARCHITECTURE, out)
    assert_same_bytes(import_efae(out)[1], params)


def test_what_is_there_is_not_replaced(params, exported):
    before = {path: path.read_bytes() for path in exported.parent.iterdir()}
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    message = error_of(efae.export_efae, changed, ARCHITECTURE, exported)
    assert "is there already" in message
    assert {path: path.read_bytes() for path in exported.parent.iterdir()} == before


def test_places_that_cannot_be_written_are_named(params, tmp_path):
    message = error_of(efae.export_efae, params, ARCHITECTURE, tmp_path / "model.pt")
    assert "must end in .safetensors" in message
    for folder in ("a.safetensors", "b.json"):
        (tmp_path / folder).mkdir()
        out = (tmp_path / folder).with_suffix(".safetensors")
        assert "is there already" in error_of(efae.export_efae, params, ARCHITECTURE, out)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "model.safetensors"
    assert "cannot write" in error_of(efae.export_efae, params, ARCHITECTURE, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.json", "file"]
