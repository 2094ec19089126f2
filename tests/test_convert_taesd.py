"""TAESD's pairs of files: found from either, variant by shape or name, byte for byte."""

from __future__ import annotations

import functools
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
from weights import SHARED, assert_same_bytes, error_of, needs, random_state_dict, torch_shapes

import efae_jax
from configs.pretrained import get_config
from efae_jax import convert
from efae_jax.__main__ import main
from efae_jax.convert import files, taesd
from efae_jax.convert.verify import verify
from efae_jax.models.build import build_autoencoder
from efae_jax.models.taesd import VARIANTS

SIDES = ("encoder", "decoder")


@functools.cache
def shapes(variant):
    config = get_config("taesd")
    with config.unlocked():
        config.model.variant = variant
    model = build_autoencoder(config)
    abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
    return torch_shapes(taesd.table(variant), abstract)


def split(tensors):
    return {
        side: {n.removeprefix(f"{side}."): a for n, a in tensors.items() if n.startswith(side)}
        for side in SIDES
    }


def write(folder, tensors, name="model"):
    folder.mkdir(exist_ok=True)
    for side, part in split(tensors).items():
        (folder / f"{name}_{side}.pth").write_bytes(safetensors.numpy.save(part))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(variant, tmp_path):
    theirs = random_state_dict(shapes(variant), np.float16)
    folder = write(tmp_path / "in", theirs, variant)
    read = convert.read_model(folder)
    assert (read.format, read.config.model.variant) == ("taesd", variant)
    assert convert.write_model(read.config, read.params, tmp_path / "out") == ("taesd", [])
    names = {f"{variant}_{side}.safetensors" for side in SIDES} | {"efae_jax.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    for side, part in split(theirs).items():
        path = tmp_path / "out" / f"{variant}_{side}.safetensors"
        assert_same_bytes(files.read_state_dict(path), part)
    assert convert.read_model(tmp_path / "out").config.model.variant == variant


@needs("taef2/taef2_encoder.pth")
def test_published_names_come_back_bit_for_bit(tmp_path):
    read = convert.read_model(SHARED / "taef2" / "taef2_decoder.pth")
    convert.write_model(read.config, read.params, tmp_path / "out")
    for side in SIDES:
        theirs = files.read_state_dict(SHARED / "taef2" / f"taef2_{side}.pth")
        ours = files.read_state_dict(tmp_path / "out" / f"taef2_{side}.safetensors")
        assert_same_bytes(ours, theirs)


def test_either_file_leads_to_the_other(tmp_path):
    theirs = random_state_dict(shapes("taesd"))
    folder = write(tmp_path / "in", theirs, "taesd")
    expected = convert.read_model(folder).params
    for side in SIDES:
        assert_same_bytes(convert.read_model(folder / f"taesd_{side}.pth").params, expected)
    write(folder, theirs, "other")
    assert "several models; name one file" in error_of(convert.read_model, folder)


ENDINGS = [(".pth", ".pth"), (".safetensors", ".pth"), (".pt", ".safetensors")]


@pytest.mark.parametrize("endings", ENDINGS)
def test_halves_of_different_endings_are_a_pair(endings, tmp_path):
    theirs = random_state_dict(shapes("taesd"))
    folder = write(tmp_path / "in", theirs, "taesd")
    for side, ending in zip(SIDES, endings, strict=True):
        path = folder / f"taesd_{side}.pth"
        path.rename(path.with_suffix(ending))
    for path in (folder, *folder.iterdir()):
        assert convert.read_model(path).params.keys() == {"encoder", "decoder"}


@pytest.mark.parametrize("name", ["taesd_{}.pth", "{}.safetensors", "taesd-{}.pt", "x (1).pth"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("prefix", ["", "module.", "{}."])
def test_a_half_alone_is_known_by_its_name_or_shapes(name, side, prefix, tmp_path):
    part = split(random_state_dict(shapes("taesd")))[side]
    part = {prefix.format(side) + n: a for n, a in part.items()}
    (tmp_path / name.format(side)).write_bytes(safetensors.numpy.save(part))
    read = convert.read_model(tmp_path / name.format(side))
    assert read.params.keys() == {side}
    assert read.config.model.missing == SIDES[side == "encoder"]
    assert any(f"the {side} alone, which only {side[:2]}codes" in note for note in read.notes)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", SIDES)
def test_a_half_of_every_variant_is_written_as_half(variant, side, tmp_path):
    theirs = random_state_dict(shapes(variant), np.float16)
    folder = write(tmp_path / "in", theirs, variant)
    (folder / f"{variant}_{SIDES[side == 'encoder']}.pth").unlink()
    read = convert.read_model(folder)
    assert read.config.model.variant == variant
    convert.write_model(read.config, read.params, tmp_path / "out")
    written = {f"{variant}_{side}.safetensors", "efae_jax.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == written
    ours = files.read_state_dict(tmp_path / "out" / f"{variant}_{side}.safetensors")
    assert_same_bytes(ours, split(theirs)[side])
    assert convert.read_model(tmp_path / "out").config.model.variant == variant
    out = tmp_path / "diffusers"
    assert "is missing" in error_of(convert.write_model, read.config, read.params, out, "diffusers")
    assert verify(read.config, read.params, read, folder)[0].startswith("not compared")


def test_a_whole_model_may_be_called_like_a_half(tmp_path):
    """Names of both halves, or of another format, in a file *_decoder."""
    theirs = random_state_dict(shapes("taesd"))
    path = tmp_path / "consistency_decoder.safetensors"
    path.write_bytes(safetensors.numpy.save(theirs))
    assert convert.read_model(path).params.keys() == {"encoder", "decoder"}


def test_halves_that_are_swapped(tmp_path):
    parts = split(random_state_dict(shapes("taesd")))
    for side, other in (SIDES, SIDES[::-1]):
        (tmp_path / f"taesd_{side}.pth").write_bytes(safetensors.numpy.save(parts[other]))
    message = error_of(convert.read_model, tmp_path)
    assert (
        "taesd_decoder.pth is called decoder, and holds the weights of TAESD's encoder" in message
    )


def test_a_half_under_keys(tmp_path):
    kept, averaged = (split(random_state_dict(shapes("taesd"), seed=s))["encoder"] for s in (0, 1))
    path = tmp_path / "taesd_encoder.pkl"
    path.write_bytes(pickle.dumps({"model": kept, "ema": averaged, "step": 3}))
    assert f"say which: {path}::model or {path}::ema" in error_of(convert.read_model, path)
    read = convert.read_model(f"{path}::ema")
    convert.write_model(read.config, read.params, tmp_path / "out")
    assert_same_bytes(files.read_state_dict(tmp_path / "out/taesd_encoder.safetensors"), averaged)


def test_a_half_does_what_it_can(tmp_path, capsys):
    folder = write(tmp_path / "in", random_state_dict(shapes("taesd")), "taesd")
    whole = efae_jax.load(folder)
    x = np.zeros((1, 16, 16, 3), np.uint8)
    z = whole.encode(x)
    paths = {side: tmp_path / side / f"taesd_{side}.pth" for side in SIDES}
    for path in paths.values():
        path.parent.mkdir()
        (folder / path.name).rename(path)
    run = tmp_path / "run"
    assert main(["import", str(paths["encoder"]), str(run)]) == 0
    assert "the encoder alone" in capsys.readouterr().out
    for encoder in (efae_jax.load(paths["encoder"]), efae_jax.load(run)):
        assert (encoder.has_encoder, encoder.has_decoder) == (True, False)
        np.testing.assert_array_equal(encoder.encode(x), z)
        assert "decode needs the decoder" in error_of(encoder.decode, z)
    decoder = efae_jax.load(paths["decoder"])
    np.testing.assert_array_equal(decoder.decode(z), whole.decode(z))
    for call in (decoder.encode, decoder.posterior):
        message = error_of(call, x)
        assert f"needs the encoder, and {paths['decoder']} gave the decoder alone" in message
        assert "put the file taesd_encoder.pth beside it" in message
    capsys.readouterr()
    data = ["--data", str(tmp_path)]
    for command in (
        ["evaluate", "--model", str(run), "--out", str(tmp_path / "v"), *data],
        ["reconstruct", "--model", str(run), str(tmp_path), "--out", str(tmp_path / "r")],
        ["encode", "--model", str(paths["decoder"]), "--out", str(tmp_path / "e"), *data],
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{command[0]} needs the" in line


@pytest.mark.parametrize(
    ("shape", "name", "option", "expected"),
    [
        ("taesd", "taesdxl", None, "taesdxl"),
        ("taesd", "taesd", None, "taesd"),
        ("taesd", "vae", "taesdxl", "taesdxl"),
        ("taesd3", "taef1", None, "taef1"),
        ("taesd3", "TAESD3", None, "taesd3"),
        ("taesd3", "taef1", "taesd3", "taesd3"),
        ("taef2", "vae", None, "taef2"),
    ],
)
def test_variants_of_equal_shapes_are_told_apart_by_name_or_option(
    shape, name, option, expected, tmp_path
):
    folder = write(tmp_path / "in", random_state_dict(shapes(shape)), name)
    options = convert.Options(variant=option)
    read = convert.read_model(folder / f"{name}_encoder.pth", options=options)
    assert read.config.model.variant == expected
    assert not read.notes


def test_a_variant_that_nobody_names_is_said(tmp_path):
    folder = write(tmp_path / "in", random_state_dict(shapes("taef1")), "vae")
    read = convert.read_model(folder)
    assert read.config.model.variant == "taesd3"
    assert "taesd3 and taef1 have the same shapes" in read.notes[0]
    assert "--variant" in read.notes[0]


def test_a_variant_of_other_shapes_is_refused(tmp_path):
    folder = write(tmp_path / "in", random_state_dict(shapes("taesd")))
    for wrong in ("taef1", "taesd4"):
        message = error_of(convert.read_model, folder, options=convert.Options(variant=wrong))
        assert f"--variant {wrong}: the weights have the shapes of taesd or taesdxl" in message
    read = convert.read_model(folder)
    convert.write_model(read.config, read.params, tmp_path / "out")
    beside = tmp_path / "out" / "efae_jax.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"variant": "taef1"}))
    assert "stated as 'taef1'" in error_of(convert.read_model, tmp_path / "out")


def test_all_problems_are_listed_at_once(tmp_path):
    theirs = random_state_dict(shapes("taesd"))
    del theirs["encoder.3.conv.2.bias"], theirs["decoder.19.bias"]
    theirs |= {"decoder.77.weight": np.zeros(1, np.float32)}
    theirs["encoder.2.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    message = error_of(convert.read_model, write(tmp_path / "in", theirs))
    assert "2 missing: decoder.19.bias, encoder.3.conv.2.bias" in message
    assert "1 left over: decoder.77.weight" in message
    assert "encoder.2.weight is (64, 64, 1, 1), expected (64, 64, 3, 3)" in message


def test_weights_of_no_variant_are_refused(tmp_path):
    theirs = random_state_dict(shapes("taesd"))
    theirs["encoder.14.weight"] = np.zeros((5, 64, 3, 3), np.float32)
    assert "5 latent channels" in error_of(convert.read_model, write(tmp_path / "in", theirs))


@pytest.mark.parametrize("variant", ["taesdxl", "taef1"])
def test_diffusers_has_the_variants_without_the_branch_at_factor_8(variant, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    theirs = random_state_dict(shapes(variant))
    read = convert.read_model(write(tmp_path / "in", theirs, variant))
    lines = verify(read.config, read.params, read, tmp_path / "in")
    assert all(float(line.split()[-5]) < 1e-5 for line in lines)
    convert.write_model(read.config, read.params, tmp_path / "out", "diffusers")
    again = convert.read_model(tmp_path / "out")
    assert (again.format, again.config.model.variant) == ("diffusers", variant)
    assert_same_bytes(again.params, read.params)


@pytest.mark.parametrize("variant", ["taef2", "taesana"])
def test_diffusers_has_no_form_for_the_others(variant, tmp_path):
    read = convert.read_model(write(tmp_path / "in", random_state_dict(shapes(variant))))
    out = tmp_path / "out"
    message = error_of(convert.write_model, read.config, read.params, out, "diffusers")
    assert f"no form for {variant}, only for taesd, taesdxl, taesd3, taef1" in message
    assert not out.exists()
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    (line,) = verify(read.config, read.params, read, tmp_path / "in")
    assert line.startswith("not compared")
