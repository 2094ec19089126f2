"""diffusers' folders: against diffusers itself, byte for byte, and every refusal."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import sys
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weights import assert_close, assert_same_bytes, error_of, nhwc, random_state_dict, torch_shapes

from configs.pretrained import get_config
from efae_jax import convert
from efae_jax.convert import diffusers, files, kl_table, taesd
from efae_jax.convert.verify import verify
from efae_jax.models.build import build_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": 2 * ["DownEncoderBlock2D"],
    "up_block_types": 2 * ["UpDecoderBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
}
RELEASED = {
    "sd": SMALL | {"layers_per_block": 2, "sample_size": 512},
    "sdxl": SMALL | {"scaling_factor": 0.13025, "force_upcast": True},
    "sd3": SMALL
    | {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux": SMALL
    | {
        "block_out_channels": [32, 64, 64],
        "down_block_types": 3 * ["DownEncoderBlock2D"],
        "up_block_types": 3 * ["UpDecoderBlock2D"],
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "latents_mean": None,
        "latents_std": None,
    },
}
TINY = {"_class_name": "AutoencoderTiny", "latent_channels": 16, "latent_magnitude": 3}


@functools.cache
def _shapes(text):
    config = json.loads(text)
    tiny = config["_class_name"] == "AutoencoderTiny"
    c = get_config("taesd" if tiny else "kl")
    with c.unlocked():
        if tiny:
            c.model.variant = "taesd" if config["latent_channels"] == 4 else "taesd3"
        else:
            c.model.widths = tuple(config["block_out_channels"])
            c.model.blocks = config["layers_per_block"]
            c.model.latent_channels = config.get("latent_channels", 4)
            c.model.quant = config.get("use_quant_conv", True)
            c.model.post_quant = config.get("use_post_quant_conv", True)
    names = kl_table.DIFFUSERS
    table = taesd.table(c.model.variant, "diffusers") if tiny else kl_table.table(names, c.model)
    model = build_autoencoder(c)
    abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
    return torch_shapes(table, abstract)


def shapes_of(config):
    """Names and shapes as this package expects them; a test compares them with diffusers'."""
    return _shapes(json.dumps(config))


def write(folder, config, tensors=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = random_state_dict(shapes_of(config)) if tensors is None else tensors
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", RELEASED["sdxl"])


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return convert.read_model(write(tmp_path_factory.mktemp("kl") / "model", RELEASED["sdxl"]))


@pytest.fixture
def read(imported):
    """An imported model, whose config and parameters a test may change."""
    config = imported.config.copy_and_resolve_references()
    return imported._replace(config=config, params=jax.tree.map(np.copy, imported.params))


def loaded_without_a_word(library, name, folder, caplog):
    """diffusers' model, loaded with warnings as errors and nothing logged."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        logging.getLogger("diffusers").propagate = True
        model, info = getattr(library, name).from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False
        )
    assert not caplog.records
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", [*RELEASED, "tiny4", "tiny16"])
def test_diffusers_computes_the_same_and_loads_what_is_written(name, tmp_path, caplog):
    library = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    if name in RELEASED:
        config, kind = RELEASED[name], "AutoencoderKL"
    else:
        config, kind = TINY | {"latent_channels": int(name[4:])}, "AutoencoderTiny"
    theirs = getattr(library, kind).from_config(config)
    shapes = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert shapes == shapes_of(config)
    tensors = random_state_dict(shapes)
    theirs.load_state_dict({n: torch.tensor(t) for n, t in tensors.items()})
    theirs.save_pretrained(tmp_path / "theirs")

    read = convert.read_model(tmp_path / "theirs")
    assert read.format == "diffusers"
    ours = build_autoencoder(read.config)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 32, 24, 3)).astype(np.float32)
    with torch.no_grad():
        encoded = theirs.encode(torch.tensor(x).permute(0, 3, 1, 2))
        tiny = kind == "AutoencoderTiny"
        encoded = encoded.latents if tiny else encoded.latent_dist.parameters
        latent = encoded[:, : ours.representation.channels]
        decoded = theirs.decode(latent).sample
    assert_close(jax.jit(ours.encoder.__call__)(read.params["encoder"], x), nhwc(encoded))
    assert_close(
        jax.jit(ours.decoder.__call__)(read.params["decoder"], nhwc(latent)), nhwc(decoded)
    )

    assert convert.write_model(read.config, read.params, tmp_path / "ours", "diffusers")[1] == []
    assert_same_bytes(files.read_state_dict(tmp_path / "ours" / WEIGHTS), tensors)
    again = loaded_without_a_word(library, kind, tmp_path / "ours", caplog)
    private = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    stated = {k: v for k, v in theirs.config.items() if k not in private}
    written = {k: v for k, v in again.config.items() if k not in private}
    assert json.dumps(written, sort_keys=True) == json.dumps(stated, sort_keys=True)


@pytest.mark.parametrize("name", RELEASED)
def test_the_units_of_the_latent_travel_both_ways(name, tmp_path):
    config = RELEASED[name]
    read = convert.read_model(write(tmp_path / "a", config))
    latent = read.config.latent
    assert latent.scaling == config.get("scaling_factor", 0.18215)
    assert latent.shift == config.get("shift_factor", 0)
    convert.write_model(read.config, read.params, tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    for field, value in config.items():
        assert written[field] == value, field
    assert written["shift_factor"] == config.get("shift_factor")
    assert written["latents_mean"] is None
    model = build_autoencoder(read.config)
    z = np.full((1, 1, 1, model.representation.channels), 2.0, np.float32)
    expected = (2 - latent.shift) * latent.scaling
    np.testing.assert_allclose(model.normalise(z), expected, rtol=1e-6)


def test_means_and_deviations_per_channel_travel(tmp_path):
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    folder = write(tmp_path / "a", SMALL, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    read = convert.read_model(folder)
    z = np.zeros((1, 1, 1, 4), np.float32)
    normalised = build_autoencoder(read.config).normalise(z)
    np.testing.assert_allclose(normalised[0, 0, 0], -np.divide(mean, std) * 0.5, rtol=1e-6)
    convert.write_model(read.config, read.params, tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["latents_mean"], written["latents_std"]) == (mean, std)


OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("style", ["older", "convolutions", "today's convolutions"])
def test_older_names_of_the_attention_are_todays(style, tmp_path):
    today = random_state_dict(shapes_of(SMALL))
    old = {}
    for name, tensor in today.items():
        for new, before in OLDER.items():
            if f".attentions.0.{new}." in name:
                name = name if "today" in style else name.replace(new, before)
                if "convolutions" in style and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        old[name] = tensor
    read = convert.read_model(write(tmp_path / "a", SMALL, old))
    convert.write_model(read.config, read.params, tmp_path / "b")
    assert_same_bytes(files.read_state_dict(tmp_path / "b" / WEIGHTS), today)
    both = today | {n: a for n, a in old.items() if n not in today}
    if both.keys() != today.keys():
        message = error_of(convert.read_model, write(tmp_path / "c", SMALL, both))
        assert "16 left over: decoder.mid_block.attentions.0.key.bias" in message


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_written_as_it_was_unless_told_otherwise(dtype, tmp_path):
    half = random_state_dict(shapes_of(SMALL), dtype)
    read = convert.read_model(write(tmp_path / "a", SMALL, half))
    assert read.params["encoder"]["conv_in"]["kernel"].dtype == np.float32
    convert.write_model(read.config, read.params, tmp_path / "b")
    assert_same_bytes(files.read_state_dict(tmp_path / "b" / WEIGHTS), half)
    convert.write_model(read.config, read.params, tmp_path / "c", dtype="float32")
    wide = {name: tensor.astype(np.float32) for name, tensor in half.items()}
    assert_same_bytes(files.read_state_dict(tmp_path / "c" / WEIGHTS), wide)
    for bad, expected in (("float64", "no such type"), ("int8", "no such type")):
        assert expected in error_of(
            convert.write_model, read.config, read.params, tmp_path / "d", dtype=bad
        )
    read.params["encoder"]["conv_in"]["bias"][0] = 1e6
    message = error_of(
        convert.write_model, read.config, read.params, tmp_path / "d", dtype="float16"
    )
    assert "1 with numbers beyond its range: encoder.conv_in.bias" in message
    assert not (tmp_path / "d").exists()


def test_what_diffusers_cannot_say_travels_in_a_json_of_its_own(folder, tmp_path):
    read = convert.read_model(folder, options=convert.Options(padding="reflect"))
    with read.config.unlocked():
        read.config.group.name = "z2_h"
        read.config.group.representation = "2*trivial + 2*sign"
        read.config.latent.clamp = 5.0
    _, notes = convert.write_model(read.config, read.params, tmp_path / "b")
    assert len(notes) == 2
    assert "reflect" in notes[0]
    assert "clamp" in notes[1]
    again = convert.read_model(tmp_path / "b").config
    assert again.model.padding == "reflect"
    assert (again.group.name, again.group.representation) == ("z2_h", "2*trivial + 2*sign")
    assert again.latent.clamp == 5
    assert again.latent.scaling == 0.13025


def test_formats_and_options_that_do_not_apply_are_named(folder):
    assert "no such format" in error_of(convert.read_model, folder, "onnx")
    options = convert.Options(heads=4)
    message = error_of(convert.read_model, folder, options=options)
    assert (
        "--heads: format diffusers takes only --scaling-factor and --shift-factor and --padding"
        in message
    )


def test_a_stated_scaling_factor_takes_the_place_of_the_configs(folder):
    options = convert.Options(scaling_factor=0.5)
    assert convert.read_model(folder, options=options).config.latent.scaling == 0.5


def test_folders_of_pipelines_and_files_in_folders_are_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    expected = convert.read_model(folder).params
    for source in (tmp_path / "pipeline", folder / WEIGHTS, str(folder)):
        assert_same_bytes(convert.read_model(source).params, expected)


def test_weights_in_a_pickle_are_read(folder):
    torch = pytest.importorskip("torch")
    tensors = files.read_state_dict(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({n: torch.tensor(t) for n, t in tensors.items()}, folder / WEIGHTS.replace(
        ".safetensors", ".bin"
    ))  # fmt: skip
    read = convert.read_model(folder)
    np.testing.assert_array_equal(
        read.params["decoder"]["conv_out"]["bias"], tensors["decoder.conv_out.bias"]
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"act_fn": "relu"}, "act_fn is 'relu', supported: 'silu' or 'swish'"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "DownBlock2D"]},
            "['DownEncoderBlock2D', 'DownBlock2D'], supported: 2 of 'DownEncoderBlock2D' and 'Attn",
        ),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "10 missing: encoder.down_blocks.1.attentions.0.group_norm.bias",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is ['UpDecoderBlock2D']"),
        ({"out_channels": 4}, "out_channels is 4, supported: 3"),
        ({"act_fn": "mish", "out_channels": 1}, "'mish', supported: 'silu' or 'swish'; out_chan"),
        ({"temporal": 1, "blocks": 2}, "unknown 'blocks', 'temporal'; known: in_channels"),
        ({"block_out_channels": 64}, "block_out_channels must be a list of positive whole"),
        ({"block_out_channels": []}, "block_out_channels must be a list of positive whole"),
        ({"block_out_channels": [32, -1]}, "block_out_channels must be a list of positive whole"),
        ({"layers_per_block": 0}, "layers_per_block must be a positive whole number, not 0"),
        ({"layers_per_block": True}, "layers_per_block must be a positive whole number"),
        ({"scaling_factor": "1"}, "scaling_factor must be a positive number, not '1'"),
        ({"scaling_factor": 0}, "scaling_factor must be a positive number, not 0"),
        ({"use_quant_conv": 1}, "use_quant_conv must be true or false, not 1"),
        ({"latents_mean": [0, "a"]}, "latents_mean must be a list of numbers, or null"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, "1 means for 4 latent channels"),
        ({"latents_mean": [0.0, 0, 0, 0]}, "4 means but 0 standard deviations"),
        ({"latent_channels": 8}, "of the wrong shape: decoder.conv_in.weight is (64, 4, 3, 3)"),
        ({"norm_num_groups": 48}, "cannot be split into 48 groups"),
        ({"use_quant_conv": False}, "2 left over: quant_conv.bias, quant_conv.weight"),
        ({"mid_block_add_attention": False}, "20 left over: decoder.mid_block.attentions.0"),
        ({"layers_per_block": 2}, "missing: decoder.up_blocks.0.resnets.2.conv1.bias"),
        ({"_class_name": "AutoencoderKLWan"}, "'AutoencoderKLWan'; supported: AutoencoderKL, Auto"),
    ],
)
def test_configs_that_are_not_supported_are_named(folder, changes, expected):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    message = error_of(convert.read_model, folder)
    assert expected in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"act_fn": "silu"}, "act_fn is 'silu', supported: 'relu'"),
        ({"num_encoder_blocks": [1, 2, 3, 4]}, "num_encoder_blocks is [1, 2, 3, 4]"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is 4, supported: 2"),
        ({"upsample_fn": "bilinear"}, "upsample_fn is 'bilinear'"),
        ({"latent_channels": 8}, "8 latent channels"),
        ({"latent_channels": 4}, "wrong shape: decoder.layers.0.weight is (64, 16, 3, 3)"),
    ],
)
def test_tiny_configs_that_are_no_variant_are_named(changes, expected, tmp_path):
    folder = write(tmp_path / "tiny", TINY)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    assert expected in error_of(convert.read_model, folder)


def test_all_problems_of_the_names_are_listed_at_once(folder):
    tensors = files.read_state_dict(folder / WEIGHTS)
    del tensors["encoder.conv_in.bias"], tensors["decoder.up_blocks.0.resnets.1.norm2.weight"]
    tensors |= {"stranger": np.zeros(1, np.float32), "quant_conv.bias": np.zeros(9, np.float32)}
    tensors["post_quant_conv.bias"] = np.zeros(4, np.int64)
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors))
    message = error_of(convert.read_model, folder)
    assert "2 missing: decoder.up_blocks.0.resnets.1.norm2.weight, encoder.conv_in.bias" in message
    assert "1 left over: stranger" in message
    assert "1 of the wrong shape: quant_conv.bias is (9,), expected (8,)" in message
    assert "1 of the wrong type: post_quant_conv.bias is int64" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "it is no JSON"), ("[]", "a list, not an object"), ("{}", "_class_name is None")],
)
def test_config_files_that_are_none(folder, text, expected):
    (folder / "config.json").write_text(text)
    assert expected in error_of(convert.read_model, folder)


def test_folders_without_weights_or_anything(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    assert f"no weights beside it: neither {WEIGHTS}" in error_of(convert.read_model, folder)
    assert "holds neither config.json" in error_of(convert.read_model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"padding": "mirror"}, "padding must be one of zeros, reflect, not 'mirror'"),
        ({"clamp": "8"}, "clamp must be a finite number, not '8'"),
        ({"clamp": float("nan")}, "clamp must be a finite number"),
        ({"group": "z3"}, "unknown group 'z3'"),
        ({"group": 3}, "group must be a string"),
        ({"representation": "9999999*trivial"}, "absurdly many channels"),
        ({"representation": "3*trivial"}, "3 channels"),
        ({"image_range": [0, 1]}, "image_range must be [-1, 1], not [0, 1]"),
        ({"format": "ldm"}, 'for want of "format": "diffusers"'),
        ({"colour": 1}, "1 left over: colour"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(read, changes, expected, tmp_path):
    convert.write_model(read.config, read.params, tmp_path / "b")
    path = tmp_path / "b" / "efae_jax.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert expected in error_of(convert.read_model, tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"wavelet": True}, "has no wavelet input"),
        ({"decoder_widths": (32, 64, 64)}, "has no decoder of other widths"),
        ({"norm_eps": 1e-5}, "has no group norms with eps 1e-05"),
    ],
)
def test_models_that_diffusers_does_not_hold_are_refused(read, changes, expected, tmp_path):
    with read.config.unlocked():
        read.config.model.update(changes)
    message = error_of(convert.write_model, read.config, read.params, tmp_path / "b")
    assert expected in message
    assert not (tmp_path / "b").exists()


def test_a_folder_that_is_there_is_not_overwritten_and_a_failure_leaves_nothing(
    folder, tmp_path, monkeypatch
):
    read = convert.read_model(folder)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert "there already" in error_of(convert.write_model, read.config, read.params, folder)

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        message = error_of(convert.write_model, read.config, read.params, tmp_path / "b")
    assert "No space left on device" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_other_formats_are_named_where_they_do_not_hold_the_model(read, tmp_path):
    assert convert.formats_of(read.config) == ["diffusers", "ldm"]
    for name, expected in (
        ("vqgan-training", "does not hold a model of kind kl; allowed: diffusers, ldm"),
        ("onnx", "no such format; allowed: taesd, diffusers, efae, vqgan-training, ldm"),
    ):
        message = error_of(convert.write_model, read.config, read.params, tmp_path / "b", name)
        assert expected in message


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_verifying_finds_no_difference_and_finds_one(padding, folder):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    read = convert.read_model(folder, options=convert.Options(padding=padding))
    encode, decode = verify(read.config, read.params, read, folder)
    assert encode.startswith("encode")
    assert max(float(line.split()[-5]) for line in (encode, decode)) < 1e-5
    changed = jax.tree.map(np.copy, read.params)
    changed["decoder"]["conv_out"]["bias"] += 1
    encode, decode = verify(read.config, changed, read, folder)
    assert float(encode.split()[-5]) < 1e-5 < 0.05 < float(decode.split()[-5])


def test_verifying_says_what_is_missing(folder, monkeypatch):
    read = convert.read_model(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    (line,) = verify(read.config, read.params, read, folder)
    assert "pip install torch diffusers" in line
    assert read.format == diffusers.FORMAT
