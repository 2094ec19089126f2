"""Evaluations by published protocols: how images are prepared and compared, by name."""

from __future__ import annotations

import json
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_files import data_config, encoded, picture
from PIL import Image
from saved_models import conv_config, folder_of_images, save
from weights import error_of

import efae_jax
from efae_jax.__main__ import main
from efae_jax.data.bad_image import BadImageError
from efae_jax.data.tensor_resize import TensorTransform, resize_shorter
from efae_jax.evaluation import Settings, evaluate, networks
from efae_jax.evaluation.protocols import PROTOCOLS
from efae_jax.metrics.images import ssim_torchmetrics
from efae_jax.report.comparing import comparable, differences

SIDE = 16


def noise(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def torchvisions(pixels, side, antialias):
    """ToTensor, Resize(side), CenterCrop(side), by their arithmetic on torch's interpolation."""
    torch = pytest.importorskip("torch")
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    longer = int(side * long / short)
    sides = (side, longer) if height <= width else (longer, side)
    tensor = torch.tensor(pixels).permute(2, 0, 1)[None].double() / 255
    if short != side:
        tensor = torch.nn.functional.interpolate(
            tensor, sides, mode="bilinear", align_corners=False, antialias=antialias
        )
    top, left = (round((n - side) / 2.0) for n in tensor.shape[2:])
    cut = tensor[0, :, top : top + side, left : left + side]
    return cut.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("height", "width"),
    [(40, 40), (37, 64), (91, 53), (16, 29), (33, 16), (7, 9), (16, 16), (200, 31), (18, 17)],
)
def test_images_are_those_of_torchvisions_tensors(height, width, antialias):
    pixels = noise(height, width)
    transform = TensorTransform((SIDE, SIDE), antialias=antialias)
    found = transform(pixels, Random(0))
    assert found.shape == (SIDE, SIDE, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found / 255, torchvisions(pixels, SIDE, antialias), atol=1e-6)


def test_bilinear_weights_by_hand():
    """Two thirds of the scale: an antialiased pixel sees four, another the two around it."""
    ramp = np.array([[0, 30, 90, 180, 60, 210]], np.uint8)[..., None].repeat(6, 0)
    plain = resize_shorter(ramp, 4, antialias=False)[0, :, 0]
    # Centres lie at 1.5 j + 0.25.
    np.testing.assert_allclose(plain, [7.5, 75, 150, 172.5], atol=1e-4)
    smooth = resize_shorter(ramp, 4, antialias=True)[0, :, 0]
    weights = np.maximum(0, 1 - np.abs(np.arange(6) - 1.75) / 1.5)
    assert smooth[1] == pytest.approx((weights @ ramp[0, :, 0]) / weights.sum(), abs=1e-4)


def test_an_odd_line_goes_where_torchvision_leaves_it():
    pixels = np.arange(16 * 21, dtype=np.uint8).reshape(16, 21, 1)
    transform = TensorTransform((16, 16), channels=1)
    np.testing.assert_array_equal(transform(pixels, Random(0)), pixels[:, 2:18])  # 2.5
    pixels = np.arange(16 * 23, dtype=np.uint8).reshape(16, 23, 1)
    np.testing.assert_array_equal(transform(pixels, Random(0)), pixels[:, 4:20])  # 3.5


def test_images_are_read_as_everywhere():
    """Upright, white behind transparency, grey as grey, decoded in full; bad ones are counted."""
    image = picture(0, 24, 24)
    whole = TensorTransform((24, 24))
    np.testing.assert_array_equal(whole(encoded(image), Random(0)), np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    np.testing.assert_array_equal(whole(sideways, Random(0)), np.asarray(image))
    clear = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    np.testing.assert_array_equal(whole(encoded(clear), Random(0)), 255)
    grey = TensorTransform((8, 8), channels=1)
    assert grey(encoded(image), Random(0)).shape == (8, 8, 1)
    jpeg = encoded(picture(0, 400, 400), "JPEG", quality=95)  # a draft would be of half the side
    pixels = np.asarray(Image.open(__import__("io").BytesIO(jpeg)))
    expected = resize_shorter(pixels, 24, antialias=True)
    np.testing.assert_array_equal(whole(jpeg, Random(0)), expected)
    with pytest.raises(BadImageError, match="data.max_pixels=99"):
        TensorTransform((8, 8), max_pixels=99)(encoded(image), Random(0))
    blank = whole.blank()
    assert (blank["image"].dtype, blank["image"].shape) == (np.float32, (24, 24, 3))


@pytest.mark.parametrize("ranges", [None, (-1.0, 1.0)])
def test_ssim_of_either_range_equals_torchmetrics(ranges):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torchmetrics", minversion="1.4.2")
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (3, 20, 24, 3)).astype(np.float32)
    b = (0.7 * a + 0.5 * rng.standard_normal(a.shape)).astype(np.float32)  # beyond the range
    similarity = metrics.functional.image.structural_similarity_index_measure
    tensors = [torch.tensor(x).double().permute(0, 3, 1, 2)[:, None] for x in (b, a)]
    expected = [float(similarity(q, p, data_range=ranges)) for q, p in zip(*tensors, strict=True)]
    np.testing.assert_allclose(ssim_torchmetrics(b, a, ranges), expected, atol=1e-6)


def test_the_fixed_range_is_another_figure():
    rng = np.random.default_rng(0)
    a = 0.3 * rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    b = a + 0.1 * rng.standard_normal(a.shape).astype(np.float32)
    own, fixed = ssim_torchmetrics(a, b), ssim_torchmetrics(a, b, (-1.0, 1.0))
    assert np.all(fixed > own + 0.01)  # larger constants forgive more
    clipped = ssim_torchmetrics(10 * a, 10 * b, (-1.0, 1.0))
    np.testing.assert_allclose(
        clipped, ssim_torchmetrics(np.clip(10 * a, -1, 1), np.clip(10 * b, -1, 1), (-1.0, 1.0))
    )


# A whole evaluation.


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "kl", conv_config())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    folder_of_images(folder, [(40, 48)] * 5)
    return folder


@pytest.fixture(autouse=True)
def no_networks(monkeypatch):
    def read(kind, path):
        raise efae_jax.errors.UserError("the pretrained weights are not here")

    monkeypatch.setattr(networks, "read_lpips", read)


def run(model, out, images, **settings):
    settings = Settings(batch_size=5, pictures=1, **settings)
    return evaluate(model, out, settings=settings, data=str(images), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def records(kl, images, tmp_path_factory):
    patch = pytest.MonkeyPatch()

    def read(kind, path):
        raise efae_jax.errors.UserError("the pretrained weights are not here")

    patch.setattr(networks, "read_lpips", read)
    out = tmp_path_factory.mktemp("out")
    yield {name: run(kl, out / name, images, protocol=name) for name in PROTOCOLS}
    patch.undo()


def test_floats_go_into_the_encoder_and_into_the_comparison(kl, images, records):
    """By hand: PSNR of 8 bits with the fraction cut off, SSIM of floats."""
    model = efae_jax.load(kl)
    files = sorted(images.rglob("*.png"))
    transform = TensorTransform((SIDE, SIDE))
    x = np.stack([transform(f.read_bytes(), Random(0)) for f in files]) / np.float32(127.5) - 1
    assert np.any(np.abs(127.5 * (x + 1) - np.rint(127.5 * (x + 1))) > 0.1)
    order = np.random.default_rng(0).permutation(len(files))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i))
    posterior = model.autoencoder.posterior(model.params, jnp.asarray(x[order]))
    z = model.autoencoder.clip(posterior.sample_each(keys(jnp.asarray(order))))
    decoded = np.asarray(model.autoencoder.decode(model.params, z))

    def eight(v):
        return np.clip(127.5 * v + 128, 0, 255).astype(np.uint8).astype(float)

    mse = np.square(eight(decoded) - eight(x[order])).mean(axis=(1, 2, 3))
    psnr = float(np.mean(10 * np.log10(255**2 / mse)))
    for name, ranges in (("eq-vae", None), ("lightningdit", (-1.0, 1.0))):
        found = records[name]["reconstruction"]
        assert found["psnr"] == pytest.approx(psnr, rel=1e-4)
        ssim = float(ssim_torchmetrics(decoded, x[order], ranges).mean())
        assert found["ssim"] == pytest.approx(ssim, rel=1e-4)


def test_protocols_give_different_figures_and_say_what_they_are(records):
    psnr = {name: record["reconstruction"]["psnr"] for name, record in records.items()}
    assert psnr["eq-vae"] == psnr["lightningdit"]
    assert len({round(value, 3) for value in psnr.values()}) == 3
    words = {name: record["protocol"] for name, record in records.items()}
    assert {name: w["name"] for name, w in words.items()} == {n: n for n in PROTOCOLS}
    assert "8 bits" in words["pillow"]["images"]
    assert "not antialiased" in words["eq-vae-aliased"]["images"]
    assert "clipped to [-1, 1], data range 2" in words["lightningdit"]["ssim"]
    assert "pair's own values" in words["eq-vae"]["ssim"]
    assert all("zelaki" in words[n]["source"] for n in ("eq-vae", "eq-vae-aliased"))
    assert all("a sample of the posterior" in w["latent"] for w in words.values())


def test_figures_of_different_protocols_are_not_compared(records, tmp_path, capsys):
    pair = [records["eq-vae"], records["pillow"]]
    found = differences(pair)
    assert "protocol" in {d.what for d in found}
    assert not any(comparable(found, name) for name in ("psnr", "ssim", "lpips", "frechet"))
    assert comparable(differences([pair[0], pair[0]]), "psnr")
    paths = []
    for record in pair:
        paths.append(tmp_path / f"{record['protocol']['name']}.json")
        paths[-1].write_text(json.dumps(record))
    assert main(["compare", *map(str, paths), "--out", str(tmp_path / "both")]) == 0
    assert "not alike: protocol (A: eq-vae; B: pillow)" in " ".join(capsys.readouterr().out.split())


def test_an_unfinished_evaluation_goes_on_under_its_own_protocol_only(
    kl, images, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    record = run(kl, out, images, protocol="eq-vae", num_images=3)
    (out / "evaluation.json").unlink()
    # What a stopped run leaves: the same folder with the sums so far.
    from efae_jax.evaluation import command
    from efae_jax.evaluation import run as run_module

    monkeypatch.setattr(command, "_write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        run(kl, again, images, protocol="eq-vae", num_images=3)
    monkeypatch.undo()
    assert (again / run_module.UNFINISHED).exists()
    message = error_of(run, kl, again, images, protocol="lightningdit", num_images=3)
    assert "settings.protocol: 'eq-vae' there, 'lightningdit' given" in message
    monkeypatch.setattr(
        networks, "read_lpips", lambda *a: (_ for _ in ()).throw(efae_jax.errors.UserError("no"))
    )
    finished = run(kl, again, images, protocol="eq-vae", num_images=3)
    assert finished["reconstruction"] == record["reconstruction"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "imagenet"}, "--protocol imagenet: allowed are pillow, eq-vae, "),
        ({"protocol": "eq-vae", "latent": "mean"}, "--latent mean: --protocol eq-vae decodes"),
        ({"latent": "mode"}, "--latent mode: allowed are sample, mean"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, message, kl, images, tmp_path):
    found = error_of(run, kl, tmp_path / "out", images, **settings)
    assert message in found
    assert not (tmp_path / "out").exists()


def test_published_protocols_take_squares(tmp_path):
    config = data_config(size=[16, 24])
    with pytest.raises(ValueError, match="16x24: published protocols resize to squares"):
        PROTOCOLS["eq-vae"].reader(config)
    PROTOCOLS["pillow"].reader(config)
