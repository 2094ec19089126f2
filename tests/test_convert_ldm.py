"""LDM's and vqgan-training's files: prefixes, strangers, structure read off names and shapes."""

from __future__ import annotations

import functools
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weights import assert_same_bytes, error_of, random_state_dict, torch_shapes

from configs.pretrained import get_config
from efae_jax import convert
from efae_jax.convert import files, kl_table
from efae_jax.convert.verify import verify
from efae_jax.models.build import build_autoencoder

LDM = {"widths": (32, 64), "blocks": 1, "latent_channels": 4}
AURA = {"widths": (32, 32, 64), "blocks": 1, "latent_channels": 6}
STRUCTURES = {
    "sd": ("kl", LDM | {"widths": (32, 32, 64), "blocks": 2}),
    "flux": ("kl", LDM | {"latent_channels": 16, "quant": False, "post_quant": False}),
    "without attention": ("kl", LDM | {"attention": False}),
    "aura": ("aura", AURA | {"widths": (32, 64)}),
    "aura without attention": ("aura", AURA | {"attention": False}),
    "aura hr": ("aura", AURA | {"decoder_widths": (32, 32, 64, 64), "shrink": 2}),
    "aura wavelet": ("aura", AURA | {"attention": False, "wavelet": True}),
}


@functools.cache
def shapes(name):
    kind, fields = STRUCTURES[name]
    config = get_config(kind)
    with config.unlocked():
        config.model.update(fields)
        config.group.representation = ""
    model = build_autoencoder(config)
    names = kl_table.LDM if kind == "kl" else kl_table.AURA
    abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
    return torch_shapes(kl_table.table(names, config.model), abstract)


def save(path, tensors):
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


@pytest.fixture
def tensors():
    return random_state_dict(shapes("flux"))


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_structure_is_read_off_names_and_shapes_and_all_comes_back(name, tmp_path):
    kind, fields = STRUCTURES[name]
    theirs = random_state_dict(shapes(name))
    read = convert.read_model(save(tmp_path / "a.pt", theirs))
    assert read.format == {"kl": "ldm", "aura": "vqgan-training"}[kind]
    for field, value in fields.items():
        assert read.config.model[field] == value, field
    out = tmp_path / "b.safetensors"
    assert convert.write_model(read.config, read.params, out, read.format) == (read.format, [])
    assert_same_bytes(files.read_state_dict(out), theirs)


def test_the_decoders_levels_are_counted_from_the_image(tmp_path):
    theirs = random_state_dict(shapes("sd"))
    read = convert.read_model(save(tmp_path / "a", theirs))
    first = read.params["decoder"]["levels"]["0"]["blocks"]["0"]["conv1"]["bias"]
    np.testing.assert_array_equal(first, theirs["decoder.up.2.block.0.conv1.bias"])
    assert set(read.params["decoder"]["levels"]["2"]) == {"blocks"}


def test_diffusers_has_the_same_model_under_its_names(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    path = save(tmp_path / "a", random_state_dict(shapes("flux")))
    read = convert.read_model(path, options=convert.Options(scaling_factor=0.5))
    assert all(
        float(line.split()[-5]) < 1e-5 for line in verify(read.config, read.params, read, path)
    )
    convert.write_model(read.config, read.params, tmp_path / "folder", "diffusers")
    again = convert.read_model(tmp_path / "folder")
    assert_same_bytes(again.params, read.params)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "model.vae."])
def test_what_lies_outside_the_autoencoder_is_counted(tensors, prefix, tmp_path):
    one = np.zeros(1, np.float32)
    whole = {prefix + name: tensor for name, tensor in tensors.items()}
    whole |= {f"{prefix}loss.{n}": one for n in ("logvar", "discriminator.main.0.weight")}
    whole |= {f"{prefix}model_ema.decay": one}
    expected = {f"{prefix}loss.": 2, f"{prefix}model_ema.": 1}
    if prefix == "first_stage_model.":
        whole |= {f"model.diffusion_model.{i}.weight": one for i in range(5)}
        whole |= {"betas": one, "cond_stage_model.encoder.mid.x": one}
        expected |= {"model.": 5, "betas": 1, "cond_stage_model.": 1}
        # Another autoencoder, with more names.
        whole |= {f"low_scale_model.{name}": tensor for name, tensor in tensors.items()}
        whole |= {"low_scale_model.encoder.mid.more": one}
        expected |= {"low_scale_model.": len(tensors) + 1}
    read = convert.read_model(save(tmp_path / "a.ckpt", whole))
    assert read.ignored == expected
    out = tmp_path / "b.safetensors"
    convert.write_model(read.config, read.params, out, "ldm")
    assert_same_bytes(files.read_state_dict(out), tensors)


def test_checkpoints_of_training_frameworks_are_read(tensors, tmp_path):
    torch = pytest.importorskip("torch")
    inside = {f"first_stage_model.{n}": torch.tensor(t) for n, t in tensors.items()}
    torch.save(
        {"state_dict": inside, "callbacks": {torch.optim.Adam: {}}, "epoch": 1}, tmp_path / "a.ckpt"
    )
    read = convert.read_model(tmp_path / "a.ckpt")
    expected = convert.read_model(save(tmp_path / "b", tensors))
    assert_same_bytes(read.params, expected.params)


def test_the_scaling_factor_is_asked_for_and_travels(tensors, tmp_path):
    path = save(tmp_path / "a.safetensors", tensors)
    read = convert.read_model(path)
    assert read.config.latent.scaling == 1
    assert "--scaling-factor" in read.asks
    assert not read.notes
    read = convert.read_model(path, options=convert.Options(scaling_factor=0.18215))
    assert read.config.latent.scaling == 0.18215
    assert not read.asks
    out = tmp_path / "b.safetensors"
    convert.write_model(read.config, read.params, out, "ldm")
    assert convert.read_model(out).config.latent.scaling == 0.18215
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        options = convert.Options(scaling_factor=bad)
        assert "scaling must be" in error_of(convert.read_model, path, options=options)


FIELDS = {
    "padding": "reflect",
    "norm_groups": 16,
    "norm_eps": 1e-5,
    "shift": 0.5,
    "scaling": 2.0,
    "clamp": 3.0,
    "group": "z2_h",
    "representation": "14*trivial + 2*sign",
    "mean": [],
    "std": [],
}


def test_all_fields_that_travel_are_read_back(tensors, tmp_path):
    read = convert.read_model(save(tmp_path / "a", tensors))
    out = tmp_path / "b.safetensors"
    convert.write_model(read.config, read.params, out, "ldm")
    beside = out.with_suffix(".json")
    stated = json.loads(beside.read_text())
    assert stated.keys() == FIELDS.keys() | {"format", "image_range"}
    assert all(stated[name] != value for name, value in FIELDS.items() if value != [])
    beside.write_text(json.dumps(stated | FIELDS))
    changed = convert.read_model(out)
    convert.write_model(changed.config, changed.params, tmp_path / "c.safetensors", "ldm")
    assert json.loads((tmp_path / "c.json").read_text()) == stated | FIELDS


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_groups": 33}, "33 groups"),
        ({"norm_groups": 0}, "norm_groups must be positive"),
        ({"norm_groups": 2.5}, "norm_groups must be a whole number"),
        ({"mean": [0.0], "std": [1.0], "shift": 0.0}, "1 means for 16 latent channels"),
        ({"mean": "a"}, "mean must be a list of numbers"),
        ({"format": "vqgan-training"}, 'for want of "format": "ldm"'),
        ({"image_range": [0, 1]}, "image_range must be [-1, 1]"),
        ({"more": 1}, "1 left over: more"),
    ],
)
def test_a_json_that_makes_no_sense_is_refused(tensors, changes, expected, tmp_path):
    path = save(tmp_path / "a.safetensors", tensors)
    stated = {"format": "ldm", "image_range": [-1, 1]} | FIELDS | changes
    path.with_suffix(".json").write_text(json.dumps(stated))
    assert expected in error_of(convert.read_model, path)


def test_all_problems_of_the_names_are_listed_at_once(tensors, tmp_path):
    del tensors["encoder.down.1.block.0.conv1.weight"], tensors["decoder.conv_out.bias"]
    tensors |= {
        "encoder.down.0.stranger": np.zeros(1, np.float32),
        "decoder.up.900000000.block.0.conv1.weight": np.zeros(1, np.float32),
        "encoder.norm_out.bias": np.zeros(3, np.float32),
        "decoder.norm_out.bias": np.zeros(32, np.int64),
    }
    message = error_of(convert.read_model, save(tmp_path / "a", tensors))
    assert "2 missing: decoder.conv_out.bias, encoder.down.1.block.0.conv1.weight" in message
    assert (
        "2 left over: decoder.up.900000000.block.0.conv1.weight, encoder.down.0.stranger" in message
    )
    assert "1 of the wrong shape: encoder.norm_out.bias is (3,), expected (64,)" in message
    assert "1 of the wrong type: decoder.norm_out.bias is int64" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("decoder.conv_in.weight", (64, 16), "is (64, 16), expected 4 dimensions"),
        ("decoder.conv_in.weight", (64, 0, 3, 3), "none of them 0"),
        ("encoder.down.0.block.0.conv1.weight", (33, 32, 3, 3), "33 channels cannot be split"),
        ("encoder.conv_in.weight", (32, 4, 3, 3), "expected (32, 3, 3, 3)"),
        ("encoder.conv_out.weight", (16, 64, 3, 3), "expected (32, 64, 3, 3)"),
    ],
)
def test_shapes_that_fit_no_model_are_named(tensors, name, shape, expected, tmp_path):
    tensors[name] = np.zeros(shape, np.float32)
    assert expected in error_of(convert.read_model, save(tmp_path / "a", tensors))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_before_auras_names_are_taken_off(prefix, tmp_path):
    plain = random_state_dict(shapes("aura"), ml_dtypes.bfloat16)
    wrapped = {prefix + name: tensor for name, tensor in plain.items()}
    read = convert.read_model(save(tmp_path / "vae.pt", wrapped))
    assert read.format == "vqgan-training"
    assert read.config.model.stored == "bfloat16"
    out = tmp_path / "b.safetensors"
    convert.write_model(read.config, read.params, out)
    assert_same_bytes(files.read_state_dict(out), plain)
    both = wrapped | {"decoder.conv_in.bias": plain["decoder.conv_in.bias"]}
    message = error_of(convert.read_model, save(tmp_path / "c", both))
    assert "1 left over" in message


@pytest.mark.parametrize(
    ("channels", "representation"),
    [(3, ""), (4, "2*sign_h + 2*sign_v"), (6, "2*trivial + 2*sign_h + 2*sign_v")],
)
def test_aura_without_a_json_acts_as_its_model_card_says(channels, representation, tmp_path):
    theirs = random_state_dict(shapes("aura"))
    theirs["encoder.conv_out.weight"] = theirs["encoder.conv_out.weight"][:channels]
    theirs["encoder.conv_out.bias"] = theirs["encoder.conv_out.bias"][:channels]
    theirs["decoder.conv_in.weight"] = theirs["decoder.conv_in.weight"][:, :channels]
    read = convert.read_model(save(tmp_path / "a", theirs))
    assert read.config.group.name == "z2xz2"
    assert read.config.group.representation == representation
    assert read.config.latent.clamp == 8
    assert "model card" in read.notes[0]
    with read.config.unlocked():
        read.config.latent.clamp = 0.0
        read.config.group.representation = ""
    convert.write_model(read.config, read.params, tmp_path / "b.safetensors")
    again = convert.read_model(tmp_path / "b.safetensors")
    assert (again.config.latent.clamp, again.config.group.representation) == (0, "")
    assert not again.notes


def test_aura_is_written_in_its_own_format_only(tmp_path):
    read = convert.read_model(save(tmp_path / "a", random_state_dict(shapes("aura"))))
    assert convert.formats_of(read.config) == ["vqgan-training"]
    for name in ("diffusers", "ldm", "taesd", "efae"):
        message = error_of(convert.write_model, read.config, read.params, tmp_path / "b", name)
        assert "kind aura; allowed: vqgan-training" in message
    (line,) = verify(read.config, read.params, read, tmp_path / "a")
    assert "no library loads a model of kind aura" in line


def test_names_of_no_format_are_shown(tmp_path):
    path = save(tmp_path / "a", {"layer\n1.weight": np.zeros(3, np.float32)})
    message = error_of(convert.read_model, path)
    assert "of no format of taesd, diffusers, efae, vqgan-training, ldm" in message
    assert "'layer\\n1.weight'" in message
