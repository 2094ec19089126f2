"""Numbers of the original programs, through the readers of their weights; float32."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image
from weights import SHARED, assert_close, assert_same_bytes, needs, nhwc

import efae_jax
from efae_jax import convert, groups
from efae_jax.convert import files
from efae_jax.methods.base import to_float
from efae_jax.metrics.images import psnr
from efae_jax.models.build import build_autoencoder

NAMES = ("aura_vae", "aura_vae_hr_noattn", "aura_vae_wavelet", "ldm_autoencoder_kl")


def golden(name):
    with np.load(SHARED / "fixtures" / f"{name}.npz") as file:
        return {k: nhwc(v) if v.ndim == 4 else v for k, v in file.items() if k[:3] != "sd/"}


def imported(name):
    read = convert.read_model(SHARED / "fixtures" / f"{name}.npz")
    return build_autoencoder(read.config), read


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(f"fixtures/{n}.npz")) for n in NAMES])
def test_published_names_come_back_bit_for_bit(name, tmp_path):
    read = convert.read_model(SHARED / "fixtures" / f"{name}.npz")
    out = tmp_path / "model.safetensors"
    assert convert.write_model(read.config, read.params, out, read.format) == (read.format, [])
    theirs = files.read_state_dict(SHARED / "fixtures" / f"{name}.npz")
    assert_same_bytes(files.read_state_dict(out), theirs)
    again = convert.read_model(out)
    assert again.format == read.format
    assert not again.notes
    changed = again.config.to_dict() | {"model": None}
    assert changed == read.config.to_dict() | {"model": None}


@pytest.mark.parametrize(
    ("name", "model_fields"),
    [
        pytest.param(n, fields, marks=needs(f"fixtures/{n}.npz"))
        for n, fields in {
            "aura_vae": {"attention": True, "wavelet": False, "decoder_widths": ()},
            "aura_vae_hr_noattn": {
                "attention": False,
                "wavelet": False,
                "decoder_widths": (32, 64, 128, 128),
            },
            "aura_vae_wavelet": {"attention": False, "wavelet": True, "decoder_widths": ()},
        }.items()
    ],
)
def test_aura(name, model_fields):
    numbers = golden(name)
    model, read = imported(name)
    assert read.format == "vqgan-training"
    assert read.config.latent.clamp == 8
    for field, value in model_fields.items():
        assert read.config.model[field] == value, field
    # The original's latent is not clamped yet.
    z = jax.jit(model.encoder.__call__)(read.params["encoder"], numbers["in/x"])
    assert_close(z, numbers["out/z"])
    clamped = model.clip(z)
    assert_close(jax.jit(model.decode)(read.params, clamped), numbers["out/recon"])
    for g in "hv":
        index = np.full(len(clamped), groups.group("z2xz2").elements.index(g))
        assert_close(model.act(read.params, index, clamped), numbers[f"out/z_flip_{g}"])


@needs("fixtures/ldm_autoencoder_kl.npz")
def test_ldm():
    numbers = golden("ldm_autoencoder_kl")
    model, read = imported("ldm_autoencoder_kl")
    assert read.format == "ldm"
    assert "--scaling-factor" in read.asks
    posterior = jax.jit(model.posterior)(read.params, numbers["in/x"])
    moments = np.concatenate([posterior.mean, posterior.log_variance], axis=-1)
    assert_close(moments, numbers["out/moments"])
    assert_close(posterior.mean, numbers["out/mode"])
    assert_close(posterior.kl(), numbers["out/kl"])
    decode = jax.jit(model.decode)
    assert_close(decode(read.params, posterior.mean), numbers["out/recon"])
    turned = numbers["out/z_scale05_rot90k1"]
    assert_close(decode(read.params, turned), numbers["out/recon_scale05_rot90k1"])


@needs("taef2/taef2_encoder.pth")
@needs("fixtures/taef2_lavender128.npz")
def test_taef2_with_its_real_weights():
    read = convert.read_model(SHARED / "taef2")
    assert (read.format, read.config.model.variant) == ("taesd", "taef2")
    assert read.config.model.stored == "float16"
    model = build_autoencoder(read.config)
    numbers = golden("taef2_lavender128")
    x = 2 * numbers["in/x"] - 1
    z = jax.jit(model.encode)(read.params, x)
    assert_close(z, numbers["out/z"])
    decoded = jax.jit(model.decode)(read.params, z)
    assert_close((decoded + 1) / 2, numbers["out/recon"])
    error = np.mean((np.clip(decoded, -1, 1) - x) ** 2) / 4
    assert -10 * np.log10(error) == pytest.approx(28.85, abs=0.005)


@needs("taef2/taef2_encoder.pth")
@needs("images/lavender.jpg")
def test_bfloat16_keeps_the_quality_of_real_weights_on_photographs():
    pixels = []
    for path in sorted((SHARED / "images").glob("*.jpg"))[:4]:
        with Image.open(path) as image:
            side = min(image.size)
            image = image.convert("RGB").crop((0, 0, side, side)).resize((128, 128))
        pixels.append(np.asarray(image))
    x = np.stack(pixels)
    quality = {}
    for dtype in ("float32", "bfloat16"):
        model = efae_jax.load(SHARED / "taef2", dtype=dtype)
        decoded = model.decode(model.encode(x))
        assert np.isfinite(decoded).all()
        quality[dtype] = np.asarray(psnr(decoded, to_float(x)))
    assert quality["float32"].min() > 20
    loss = quality["float32"] - quality["bfloat16"]
    assert np.abs(loss).max() > 0  # it is computed in bfloat16
    assert loss.max() < 0.5
