"""Structures that released KL models have: attention in levels, FLUX.2's patches, weights alone."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weights import assert_close, assert_same_bytes, error_of, nhwc, random_state_dict, torch_shapes

from configs.pretrained import get_config
from efae_jax import convert
from efae_jax.convert import files, kl_table
from efae_jax.convert.verify import verify
from efae_jax.models.build import build_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENDED = {"down_attention": (1, 2), "up_attention": (2,), "widths": (32, 32, 64), "blocks": 1}
HALF = {"widths": (32, 64), "blocks": 1, "attention": False, "quant": False, "post_quant": False}
NUMBERS = (np.arange(128) / 64 - 1, 0.5 + np.arange(128) / 100)  # of the patches of 32 channels


def shapes(names, fields):
    config = get_config("kl")
    with config.unlocked():
        config.model.update(fields)
    model = build_autoencoder(config)
    abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
    return torch_shapes(kl_table.table(names, config.model), abstract)


def save(path, tensors):
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


def statistics(counter=7):
    mean, variance = (a.astype(np.float32) for a in NUMBERS)
    counter = np.array(counter, np.int64)
    return {
        "bn.running_mean": mean,
        "bn.running_var": variance,
        "bn.num_batches_tracked": counter,
    }


def differences(lines):
    return [float(line.split()[-5]) for line in lines]


def test_attention_in_levels_is_diffusers_and_comes_back(tmp_path):
    """Encoder and decoder apart, counted from the image in both; diffusers counts otherwise."""
    library = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    plain, attended = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
    theirs = library.AutoencoderKL(
        down_block_types=(plain, attended, attended),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 64),
    )
    tensors = random_state_dict({n: tuple(t.shape) for n, t in theirs.state_dict().items()})
    assert {n: t.shape for n, t in tensors.items()} == shapes(kl_table.DIFFUSERS, ATTENDED)
    theirs.load_state_dict({n: torch.tensor(t) for n, t in tensors.items()})
    theirs.save_pretrained(tmp_path / "theirs")
    read = convert.read_model(tmp_path / "theirs")
    assert {n: read.config.model[n] for n in ATTENDED} == ATTENDED
    ours = build_autoencoder(read.config)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        encoded = theirs.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist.parameters
        decoded = theirs.decode(encoded[:, :4]).sample
    found = jax.jit(ours.encoder.__call__)(read.params["encoder"], x)
    assert_close(found, nhwc(encoded))
    latent = nhwc(encoded[:, :4])
    assert_close(jax.jit(ours.decoder.__call__)(read.params["decoder"], latent), nhwc(decoded))

    convert.write_model(read.config, read.params, tmp_path / "ours", "diffusers")
    assert_same_bytes(files.read_state_dict(tmp_path / "ours" / WEIGHTS), tensors)
    config = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "theirs")]
    assert config[0]["up_block_types"] == config[1]["up_block_types"]
    assert config[0]["down_block_types"] == config[1]["down_block_types"]
    # LDM's names, and from them back.
    convert.write_model(read.config, read.params, tmp_path / "a.safetensors", "ldm")
    ldm = files.read_state_dict(tmp_path / "a.safetensors")
    assert "encoder.down.2.attn.0.proj_out.weight" in ldm
    assert {n for n in ldm if ".up." in n and ".attn." in n and ".q.weight" in n} == {
        f"decoder.up.2.attn.{j}.q.weight" for j in (0, 1)
    }
    again = convert.read_model(tmp_path / "a.safetensors")
    assert_same_bytes(again.params, read.params)
    assert {n: again.config.model[n] for n in ATTENDED} == ATTENDED


def test_attention_behind_a_level_that_is_not_there_is_refused():
    config = get_config("kl")
    for name, levels in (("down_attention", (4,)), ("up_attention", (0, -1))):
        with config.unlocked():
            config.model.update(down_attention=(), up_attention=())
            config.model[name] = levels
        assert f"config.model.{name}={levels}: there are levels 0 to 3" in error_of(
            build_autoencoder, config
        )


def matrices(tensors, which):
    """The attention's weights as matrices, as 1x1 convolutions of two or one axis, or mixed."""
    changed, kinds = {}, {"matrix": (0,), "2d": (2,), "1d": (1,), "mixed": (0, 1, 2)}[which]
    for i, (name, a) in enumerate(sorted(tensors.items())):
        if ".att" in name and name.endswith("weight") and a.ndim > 1:
            a = a.reshape(a.shape[:2] + kinds[i % len(kinds)] * (1,))
        changed[name] = a
    return changed


@pytest.mark.parametrize("which", ["matrix", "2d", "1d", "mixed"])
@pytest.mark.parametrize("names", [kl_table.LDM, kl_table.DIFFUSERS], ids=["ldm", "diffusers"])
def test_matrices_and_convolutions_of_one_pixel_are_the_same(names, which, tmp_path):
    fields = {"widths": (32,), "blocks": 1, "down_attention": (0,)}
    tensors = random_state_dict(shapes(names, fields))
    expected = convert.read_model(save(tmp_path / "a", tensors)).params
    found = convert.read_model(save(tmp_path / "b", matrices(tensors, which))).params
    assert_same_bytes(found, expected)
    wrong = {n: a[:-1] if n.endswith("q.weight") else a for n, a in tensors.items()}
    assert "of the wrong shape" in error_of(convert.read_model, save(tmp_path / "c", wrong))


def test_older_names_inside_levels_are_todays(tmp_path):
    tensors = random_state_dict(shapes(kl_table.DIFFUSERS, ATTENDED))
    old = {
        n.replace("to_out.0", "proj_attn").replace("to_q", "query"): a for n, a in tensors.items()
    }
    assert old.keys() != tensors.keys()
    expected = convert.read_model(save(tmp_path / "a", tensors)).params
    assert_same_bytes(convert.read_model(save(tmp_path / "b", old)).params, expected)


ALONE = {
    "sd": {"widths": (32, 32, 64), "blocks": 2},
    "flux": {"widths": (32, 64), "blocks": 1, "latent_channels": 16} | HALF,
    "attended": ATTENDED,
    "other decoder": {"widths": (32, 64), "decoder_widths": (64, 32), "blocks": 1},
}


@pytest.mark.parametrize("name", ALONE)
def test_weights_with_diffusers_names_need_no_config(name, tmp_path):
    tensors = random_state_dict(shapes(kl_table.DIFFUSERS, ALONE[name]))
    read = convert.read_model(save(tmp_path / "vae.safetensors", tensors))
    assert read.format == "diffusers"
    for field, value in ALONE[name].items():
        assert read.config.model[field] == value, field
    assert "no config.json" in read.notes[0]
    assert "--scaling-factor" in read.asks
    assert "norm_groups" in read.config.model
    if name != "other decoder":
        assert "nobody has stated it" in error_of(
            convert.write_model, read.config, read.params, tmp_path / "out"
        )
    options = convert.Options(scaling_factor=0.5, shift_factor=0.25)
    read = convert.read_model(tmp_path / "vae.safetensors", options=options)
    assert not read.asks
    if name != "other decoder":
        convert.write_model(read.config, read.params, tmp_path / "out")
        assert_same_bytes(files.read_state_dict(tmp_path / "out" / WEIGHTS), tensors)
        stated = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (stated["scaling_factor"], stated["shift_factor"]) == (0.5, 0.25)


@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_weights_need_no_config_either(channels, tmp_path):
    config = get_config("taesd")
    with config.unlocked():
        config.model.variant = "taesd" if channels == 4 else "taef1"
    from efae_jax.convert import taesd

    model = build_autoencoder(config)
    abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
    tensors = random_state_dict(torch_shapes(taesd.table(config.model.variant, "x"), abstract))
    read = convert.read_model(save(tmp_path / "tiny.safetensors", tensors))
    assert (read.config.model.kind, read.asks) == ("taesd", "")
    assert build_autoencoder(read.config).representation.channels == channels
    convert.write_model(read.config, read.params, tmp_path / "out", "diffusers")
    assert_same_bytes(files.read_state_dict(tmp_path / "out" / WEIGHTS), tensors)


def test_flux2_is_diffusers_in_the_units_of_its_pipeline(tmp_path):
    library = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    if not hasattr(library, "AutoencoderKLFlux2"):
        pytest.skip("this diffusers has no AutoencoderKLFlux2")
    from diffusers import Flux2Pipeline

    theirs = library.AutoencoderKLFlux2(
        down_block_types=2 * ("DownEncoderBlock2D",),
        up_block_types=2 * ("UpDecoderBlock2D",),
        block_out_channels=(32, 64),
        decoder_block_out_channels=(32, 32),
        layers_per_block=1,
    )
    tensors = {n: tuple(t.shape) for n, t in theirs.state_dict().items() if "bn." not in n}
    tensors = random_state_dict(tensors) | statistics()
    theirs.load_state_dict({n: torch.tensor(t) for n, t in tensors.items()})
    theirs.save_pretrained(tmp_path / "theirs")
    read = convert.read_model(tmp_path / "theirs")
    assert (read.config.latent.patch, read.asks) == (2, "")
    ours = build_autoencoder(read.config)
    x = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    with torch.no_grad():
        encoded = theirs.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist.parameters
        z = encoded[:, :32]
        decoded = theirs.decode(z).sample
        packed = Flux2Pipeline._patchify_latents(z)
        std = torch.sqrt(theirs.bn.running_var + theirs.config.batch_norm_eps).view(1, -1, 1, 1)
        packed = (packed - theirs.bn.running_mean.view(1, -1, 1, 1)) / std
    assert_close(jax.jit(ours.encoder.__call__)(read.params["encoder"], x), nhwc(encoded))
    assert_close(jax.jit(ours.decoder.__call__)(read.params["decoder"], nhwc(z)), nhwc(decoded))
    assert_close(ours.normalise(nhwc(z)), nhwc(packed), 1e-6)
    assert_close(ours.denormalise(nhwc(packed)), nhwc(z), 1e-6)

    convert.write_model(read.config, read.params, tmp_path / "ours")
    assert_same_bytes(files.read_state_dict(tmp_path / "ours" / WEIGHTS), tensors)
    again = library.AutoencoderKLFlux2.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    private = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    one, other = (
        json.dumps({k: v for k, v in m.config.items() if k not in private}, sort_keys=True)
        for m in (again, theirs)
    )
    assert one == other
    assert max(differences(verify(read.config, read.params, read, tmp_path / "ours"))) < 1e-5


@pytest.mark.parametrize("nested", [False, True])
def test_flux2_in_one_file_comes_back(nested, tmp_path):
    """Black Forest Labs' file counts the convolutions around the latent to the networks."""
    fields = {"widths": (32, 32), "blocks": 1, "latent_channels": 32, "attention": False}
    plain = random_state_dict(shapes(kl_table.LDM, fields), np.float16) | statistics()
    tensors = plain
    if nested:
        tensors = {
            {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(n.split(".")[0], "")
            + n: a
            for n, a in plain.items()
        }
        assert "decoder.post_quant_conv.bias" in tensors
    read = convert.read_model(save(tmp_path / "ae.safetensors", tensors))
    assert (read.format, read.asks, read.config.model.quant) == ("ldm", "", True)
    assert "mean and variance of its patches" in read.notes[0]
    out = tmp_path / "out.safetensors"
    convert.write_model(read.config, read.params, out, "ldm")
    # What float16 does not hold stays in float32.
    assert_same_bytes(files.read_state_dict(out), plain)
    assert convert.read_model(out).config.latent == read.config.latent
    convert.write_model(read.config, read.params, tmp_path / "folder")
    assert convert.read_model(tmp_path / "folder").config.latent == read.config.latent
    alone = convert.read_model((tmp_path / "folder" / WEIGHTS).rename(tmp_path / "b.safetensors"))
    assert alone.config.latent == read.config.latent
    with read.config.unlocked():
        read.config.latent.eps = 1e-5
    arguments = (read.config, read.params, tmp_path / "c.safetensors", "ldm")
    assert "takes 0.0001 for granted" in error_of(convert.write_model, *arguments)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"bn.running_var": np.zeros(128, np.float32)},
            "running_var holds numbers that are not po",
        ),
        ({"bn.running_mean": np.full(128, np.nan, np.float32)}, "running_mean holds numbers that"),
        ({"bn.running_mean": np.zeros(64, np.float32)}, "64 means but 128 standard deviations"),
        ({"bn.running_mean": None}, "left over: bn."),
    ],
)
def test_statistics_that_make_no_sense_are_refused(changes, expected, tmp_path):
    fields = HALF | {"latent_channels": 32, "widths": (32,)}
    tensors = random_state_dict(shapes(kl_table.LDM, fields)) | statistics() | changes
    tensors = {name: a for name, a in tensors.items() if a is not None}
    assert expected in error_of(convert.read_model, save(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("encoder.conv1.weight", 5, "a model of videos, with 3D convolutions (encoder.conv1"),
        ("first_stage_model.quantize.embedding.weight", 2, "a model with a codebook (VQ)"),
        ("vquantizer.codebook.weight", 2, "a model with a codebook (VQ)"),
        ("decoder.condition_encoder.layers.0.bias", 1, "an asymmetric AutoencoderKL"),
        ("encoder.down_blocks.0.1.conv1.weight", 4, "a deep-compression autoencoder (DC-AE)"),
        ("encoder.project_in.conv.weight", 4, "a deep-compression autoencoder (DC-AE)"),
    ],
)
def test_autoencoders_of_other_kinds_are_called_so(name, dims, expected, tmp_path):
    tensors = random_state_dict(shapes(kl_table.LDM, HALF)) | {name: np.zeros(dims * (1,))}
    path = save(tmp_path / "other.safetensors", tensors)
    assert f"{path} is {expected}" in error_of(convert.read_model, path)


@pytest.mark.parametrize(
    ("value", "which"),
    [(np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16)],
)
def test_weights_that_are_not_finite_are_refused(value, which, tmp_path):
    tensors = random_state_dict(shapes(kl_table.LDM, HALF), which)
    for name in ("decoder.conv_in.bias", "encoder.conv_out.weight"):
        tensors[name].flat[3] = value
    message = error_of(convert.read_model, save(tmp_path / "a", tensors))
    assert f"2 of {len(tensors)} tensors hold numbers that are not finite: decoder" in message
