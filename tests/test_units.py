"""Units of the latent: who states them, what is asked for, what takes whose place."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from saved_models import conv_config, folder_of_images, save
from test_convert_ldm import shapes
from weights import error_of, random_state_dict

import efae_jax
from configs.pretrained import get_config
from efae_jax import convert
from efae_jax.__main__ import main
from efae_jax.checkpoint import check_config
from efae_jax.convert import units
from efae_jax.models.latent import Normalisation
from efae_jax.warm_start import read_autoencoder

SD, SDXL = (f for f in units.FAMILIES if f.name in ("Stable Diffusion 1 and 2", "SDXL"))


@pytest.fixture(scope="module")
def tensors():
    return random_state_dict(shapes("sd"))


@pytest.fixture
def known(monkeypatch):
    """The families, as if their models were as small as the tests'."""
    small = [dataclasses.replace(f, widths=(32, 32, 64)) for f in units.FAMILIES]
    monkeypatch.setattr(units, "FAMILIES", small)


def write(path, tensors):
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


def told(latent):
    return (latent.scaling, latent.shift, latent.stated)


def test_patches_are_packed_and_unpacked():
    n = Normalisation(mean=tuple(range(8)), std=(2.0,) * 8, patch=2)
    z = np.arange(2 * 4 * 6 * 2, dtype=np.float32).reshape(2, 4, 6, 2)
    packed = np.asarray(n.normalise(z))
    assert packed.shape == (2, 2, 3, 8)
    # Channel by channel, in each row by row.
    expected = [z[1, 2 + p, 4 + q, c] for c in range(2) for p in range(2) for q in range(2)]
    np.testing.assert_array_equal(packed[1, 1, 2], (np.array(expected) - np.arange(8)) / 2)
    np.testing.assert_array_equal(n.denormalise(packed), z)
    np.testing.assert_array_equal(n.normalise(z[0]), packed[0])
    n.check(2)
    with pytest.raises(ValueError, match="8 means for 12 latent channels"):
        n.check(3)
    for bad in (z[:, :3], z[:, :, :5], z[0, 0]):
        with pytest.raises(ValueError, match="patches of 2x2 do not divide"):
            n.normalise(bad)
    with pytest.raises(ValueError, match="is not packed"):
        n.denormalise(packed[..., :6])


def test_models_of_the_same_shapes_are_named_with_their_numbers():
    config = get_config("kl")
    with config.unlocked():
        config.latent.stated = False
    note = units.unstated_note(config)
    assert "--scaling-factor 0.18215 (Stable Diffusion 1 and 2)" in note
    assert "--scaling-factor 0.13025 (SDXL)" in note
    with config.unlocked():
        config.model.update(latent_channels=16, quant=False, post_quant=False)
    note = units.unstated_note(config)
    assert "--scaling-factor 0.3611 --shift-factor 0.1159 (FLUX.1)" in note
    assert "--scaling-factor 1.5305 --shift-factor 0.0609 (Stable Diffusion 3)" in note
    with config.unlocked():
        config.model.up_attention = (3,)
    assert "FLUX" not in units.unstated_note(config)
    assert "--scaling-factor and --shift-factor state it" in units.unstated_note(config)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("scale_factor", (), np.float32),
        ("model.scale_factor", (1,), np.float32),
        ("scaling_factor", (1, 1), np.float64),
        ("scale_factor", (), np.float16),
        ("scale_factor", (1,), ml_dtypes.bfloat16),
    ],
)
def test_a_scale_factor_in_the_file_is_taken(name, shape, dtype, tensors, tmp_path):
    factor = np.full(shape, 0.18215).astype(dtype)
    for prefix in ("", "first_stage_model."):
        whole = {prefix + n: a for n, a in tensors.items()} | {name: factor}
        read = convert.read_model(write(tmp_path / "a.ckpt", whole))
        assert told(read.config.latent) == (0.18215, 0, True)  # half precision rounded it
        assert (read.asks, dict(read.ignored)) == ("", {})
        assert "states the units of the latent: scaling 0.18215" in read.notes[0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"scale_factor": np.ones(4, np.float32)}, "scale_factor is float32(4,), expected one"),
        ({"scale_factor": np.float32([-1])}, "scale_factor is -1; it must be positive"),
        ({"scale_factor": np.float32([np.nan])}, "scale_factor is nan; it must be finite"),
        (
            {"scale_factor": np.float32([1]), "model.scale_factor": np.float32([2])},
            "states its units twice",
        ),
        (
            {"edm_mean": np.zeros(3, np.float32), "edm_std": np.ones(3, np.float32)},
            "3 means for 4 latent channels",
        ),
        (
            {"edm_mean": np.zeros(4, np.float32), "edm_std": np.zeros(4, np.float32)},
            "edm_std holds numbers that are not positive",
        ),
    ],
)
def test_units_in_the_file_that_make_no_sense_are_refused(more, expected, tensors, tmp_path):
    assert expected in error_of(convert.read_model, write(tmp_path / "a", tensors | more))


def test_playgrounds_mean_and_std_are_taken(tensors, tmp_path):
    mean, std = np.float32([1, 2, 3, 4]), np.float32([4, 3, 2, 1])
    read = convert.read_model(write(tmp_path / "a", tensors | {"edm_mean": mean, "edm_std": std}))
    latent = read.config.latent
    assert (latent.scaling, latent.mean, latent.std) == (0.5, (1, 2, 3, 4), (4, 3, 2, 1))
    message = error_of(
        convert.read_model, tmp_path / "a", options=convert.Options(shift_factor=0.1)
    )
    assert "--shift-factor 0.1: latent: a shift and means per channel exclude" in message


@pytest.mark.parametrize(
    ("beside", "family"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.x", SD),
        ("cond_stage_model.model.ln_final.weight", SD),
        ("conditioner.embedders.0.transformer.x", SDXL),
        ("cond_stage_model.embedding.weight", None),
        ("model.diffusion_model.double_blocks.0.x", None),  # of a model with other shapes
    ],
)
def test_the_diffusion_model_beside_tells_the_units(beside, family, tensors, known, tmp_path):
    whole = {f"first_stage_model.{n}": a for n, a in tensors.items()}
    path = write(tmp_path / "a.ckpt", whole | {beside: np.zeros(3, np.float32)})
    read = convert.read_model(path)
    if family is None:
        assert told(read.config.latent) == (1, 0, False)
        assert "SDXL" in read.asks
    else:
        assert told(read.config.latent) == (family.scaling, family.shift, True)
        assert (read.asks, len(read.notes)) == ("", 1)
        assert f"those of {family.name}" in read.notes[0]


def test_what_a_user_gives_takes_the_place_of_what_is_stated(tensors, tmp_path):
    path = write(tmp_path / "a", tensors | {"scale_factor": np.array(0.18215, np.float32)})
    options = convert.Options(scaling_factor=0.5, shift_factor=0.1)
    read = convert.read_model(path, options=options)
    assert told(read.config.latent) == (0.5, 0.1, True)
    assert "scaling 0.5, shift 0.1, as given, takes the place of scaling 0.182" in read.notes[-1]
    same = convert.read_model(path, options=convert.Options(scaling_factor=0.18215))
    assert len(same.notes) == 1
    write(path, tensors)
    message = error_of(convert.read_model, path, options=convert.Options(shift_factor=0.1))
    assert "--shift-factor alone does not say how the latent is scaled" in message
    for bad in (0.0, float("nan"), float("inf")):
        options = convert.Options(scaling_factor=1.0, shift_factor=bad)
        if bad:
            assert "shift must be finite" in error_of(convert.read_model, path, options=options)
        else:
            assert convert.read_model(path, options=options).asks == ""


def test_a_null_factor_of_diffusers_is_not_stated(tmp_path):
    from test_convert_diffusers import SMALL
    from test_convert_diffusers import write as write_folder

    folder = write_folder(tmp_path / "a", SMALL, scaling_factor=None)
    read = convert.read_model(folder)
    assert told(read.config.latent) == (1, 0, False)
    assert "--scaling-factor" in read.asks
    read = convert.read_model(folder, options=convert.Options(scaling_factor=0.5))
    assert told(read.config.latent) == (0.5, 0, True)


def test_nothing_is_exported_that_nobody_stated(tensors, known, tmp_path, capsys):
    path, workdir, out = write(tmp_path / "a.ckpt", tensors), tmp_path / "w", tmp_path / "out"
    assert main(["import", str(path), str(workdir)]) == 0
    assert "of these shapes are --scaling-factor 0.18215 (Stable" in capsys.readouterr().out
    for source in (path, workdir):
        assert main(["export", str(source), str(out)]) == 2
        message = capsys.readouterr().err
        assert "must say how the latent is scaled, and nobody has stated it" in message
        assert "--scaling-factor 0.13025 (SDXL)" in message
        assert len(message.splitlines()) == 1
    assert not out.exists()
    # LDM's file may leave it open, and says so when it is read again.
    again = tmp_path / "b.safetensors"
    assert main(["export", str(workdir), str(again), "--format=ldm"]) == 0
    assert json.loads(again.with_suffix(".json").read_text())["scaling"] is None
    assert "SDXL" in convert.read_model(again).asks
    given = ["--scaling-factor=0.13025", "--shift-factor=0.5"]
    for i, source in enumerate((path, workdir, again)):
        assert main(["export", str(source), f"{out}{i}", *given]) == 0
        config = json.loads((tmp_path / f"out{i}" / "config.json").read_text())
        assert (config["scaling_factor"], config["shift_factor"]) == (0.13025, 0.5)
    assert main(["import", str(path), str(tmp_path / "v"), *given]) == 0
    assert main(["export", str(tmp_path / "v"), str(out)]) == 0


def test_work_directories_of_before_there_was_such_a_field(tmp_path):
    config = conv_config()
    with config.unlocked():
        config.latent.scaling = 1.0
    assert not units.is_stated(config)
    with config.unlocked():
        config.method = "eq_vae"  # a run's
    assert units.is_stated(config)
    with config.unlocked():
        config.method, config.latent.scaling = "", 0.5
    assert units.is_stated(config)
    assert units.is_stated(conv_config("aura"))


def test_loading_with_other_units(tmp_path, caplog):
    workdir = save(tmp_path / "w", conv_config())
    z = np.ones((1, 2, 2, 4), np.float32)
    np.testing.assert_allclose(efae_jax.load(workdir).normalise(z), 0.18215, rtol=1e-6)
    assert not caplog.text
    config = conv_config()
    with config.unlocked():
        config.latent.update(scaling=1.0, stated=False)
    efae_jax.load(save(tmp_path / "unstated", config))
    assert "does not say how its latent is scaled; taken as 1" in caplog.text
    model = efae_jax.load(workdir, scaling_factor=2.0, shift_factor=0.25)
    np.testing.assert_allclose(model.normalise(z), 1.5)
    assert "scaling 2, shift 0.25, as given, takes the place of scaling 0.18215" in caplog.text


def test_every_command_that_names_a_model_takes_units(tmp_path, capsys, monkeypatch):
    seen = []

    def load(source, *_, **options):
        seen.append(options)
        raise efae_jax.errors.UserError("seen")

    for module in ("evaluation.command", "reconstruct", "encode", "embed.command", "lerp.command"):
        monkeypatch.setattr(f"efae_jax.{module}.load", load)
    images = folder_of_images(tmp_path / "i", [(8, 8)] * 2)
    one, out = str(images / "0.png"), ["--out", str(tmp_path / "out")]
    calls = (
        ["evaluate", "--data", str(images), *out],
        ["reconstruct", one, *out],
        ["encode", "--data", str(images), *out],
        ["embed", "--data", "captioned_glyphs", "--text=one_hot", "--image=one_hot", *out],
        ["lerp", one, one, *out],
    )
    for call in calls:
        given = ["--model", "m", "--scaling-factor", "0.5", "--shift-factor", "0.25"]
        assert main([call[0], *given, *call[1:]]) == 2
        assert "seen" in capsys.readouterr().err
    assert [(s["scaling_factor"], s["shift_factor"]) for s in seen] == len(calls) * [(0.5, 0.25)]


def test_a_run_starts_from_weights_that_state_no_units(tensors, tmp_path, capsys):
    path = write(tmp_path / "a.ckpt", tensors)
    config = get_config("kl")
    with config.unlocked():
        config.model.update(widths=(32, 32, 64), blocks=2)
        config.latent.shift = 0.25
    read_autoencoder(config, str(path))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "does not say how its latent is scaled; the config does: scaling 0.18215, shift 0.25"
        in (said)
    )
    write(path, tensors | {"scale_factor": np.array(0.13025, np.float32)})
    message = error_of(read_autoencoder, config, str(path))
    assert "config.latent.scaling: 0.13025 there, 0.18215 given" in message
    assert "import MODEL WORKDIR --scaling-factor X --shift-factor Y" in message
    with config.unlocked():
        config.model.blocks = 1
    message = error_of(read_autoencoder, config, str(path))
    assert "give the config those fields" in message
    assert "import MODEL" not in message


def test_a_work_directory_with_weights_that_are_not_finite_is_refused(tmp_path, monkeypatch):
    config = conv_config()
    original = np.float32(np.nan)
    monkeypatch.setattr("saved_models.random_params", broken(original))
    workdir = save(tmp_path / "w", config)
    message = error_of(efae_jax.load, workdir)
    assert f"{workdir} cannot be used: 2 of " in message
    assert "tensors hold numbers that are not finite: decoder/conv_in/bias, encoder" in message


def broken(value):
    from tiny_nets import random_params

    def params(net):
        found = random_params(net)
        found["conv_in"]["bias"][0] = value
        return found

    return params


def test_an_image_whose_latent_is_not_finite_is_named(tmp_path, capsys, monkeypatch):
    """Weights that are fine, and too large for what is computed with them."""
    monkeypatch.setattr("saved_models.random_params", broken(3e38))
    workdir = save(tmp_path / "w", conv_config(quant=False, post_quant=False))
    images = folder_of_images(tmp_path / "i", [(16, 16)])
    call = ["reconstruct", "--model", str(workdir), str(images), "--out"]
    for dtype, advice in (("float32", ""), ("bfloat16", "; --dtype float32 computes with more")):
        assert main([*call, str(tmp_path / dtype), "--dtype", dtype]) == 1
        message = capsys.readouterr().err
        assert f"the latent of {images / '0.png'} is not finite, computed in {dtype}" in message
        assert advice in message
        assert ("--dtype" in message) == bool(advice)
        assert not (tmp_path / dtype / "figures.json").exists()


@pytest.fixture
def packed(tmp_path):
    """A work directory whose units are of 2x2 patches."""
    config = conv_config()
    with config.unlocked():
        numbers = {"mean": tuple(range(16)), "variance": (4.0,) * 16, "eps": 0.0, "patch": 2}
        config.latent.update(scaling=1.0, stated=True, **numbers)
    return save(tmp_path / "packed", config)


def test_latents_are_written_packed_where_a_diffusion_models_units_are(packed, tmp_path, capsys):
    images = folder_of_images(tmp_path / "i", [(16, 16)] * 2)
    call = ["encode", "--model", str(packed), "--data", str(images), "--out"]
    assert main([*call, str(tmp_path / "n"), "--normalised", "--size=16", "--format=npz"]) == 0
    stored = str(tmp_path / "stored")
    assert main([*call, str(tmp_path / "m"), "--size=16", "--format=npz", "--store", stored]) == 0
    plain = efae_jax.load(stored)
    assert plain.normalise(np.zeros((1, 3, 3, 4), np.float32)).shape == (1, 3, 3, 4)
    shapes = [json.loads((tmp_path / n / "latents.json").read_text())["shape"] for n in "nm"]
    assert shapes == [[4, 4, 16], [8, 8, 4]]
    (one, two) = (
        next(p for p in (tmp_path / n).glob("latents-*.npz") if "stat" not in p.name) for n in "nm"
    )
    with np.load(one) as a, np.load(two) as b:
        expected = efae_jax.load(packed).normalise(b["latents"])
        np.testing.assert_allclose(a["latents"], expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main([*call, str(tmp_path / "o"), "--normalised", "--size=18"]) == 2
    message = capsys.readouterr().err
    assert "patches of 2x2 do not divide" in message
    assert len(message.splitlines()) == 1


def test_no_basis_belongs_to_packed_channels(packed):
    message = error_of(efae_jax.Disentangled, efae_jax.load(packed), np.eye(4, dtype=np.float32), 2)
    assert "2x2 positions are packed" in message


def test_a_run_of_before_there_was_a_field_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("efae_jax.checkpoint.has_checkpoint", lambda workdir: True)
    config = json.loads(conv_config().to_json_best_effort())
    older = json.loads(json.dumps(config))
    del older["model"]["down_attention"], older["model"]["up_attention"], older["model"]["start"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    check_config(tmp_path, config)
    config["model"]["up_attention"] = [1]
    assert "model.up_attention: None there, [1] given" in error_of(check_config, tmp_path, config)
    config["model"].update(up_attention=[], start="pytorch")
    message = error_of(check_config, tmp_path, config)
    assert "config.model.start: None there, 'pytorch' given" in message
