"""`reconstruct`: its figures, its pictures, its mistakes."""

from __future__ import annotations

import json
import warnings

import jax
import numpy as np
import pytest
from data_files import encoded, picture, write_tar
from PIL import Image
from saved_models import conv_config, flow_config, folder_of_images, pixels, save
from weights import error_of

import efae_jax
from efae_jax import groups, reconstruct
from efae_jax.__main__ import main
from efae_jax.data.transforms import BadImageError, read_picture
from efae_jax.errors import RunError, UserError
from efae_jax.metrics.images import psnr, ssim
from efae_jax.panels import Panel, draw_panels
from efae_jax.pictures import to_pixels


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "kl", conv_config())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two of 21 x 35 pixels, one damaged, one square."""
    sizes = [(21, 35), (21, 35), (21, 35), (24, 24)]
    return folder_of_images(tmp_path_factory.mktemp("images") / "some", sizes, broken=[1])


def pictures_of(out, name):
    return {path.name.split(".")[1] for path in out.glob(f"{name}.*png")}


def test_figures_and_pictures_are_what_the_model_gives(kl, images, tmp_path, capsys, caplog):
    assert main(["reconstruct", "--model", str(kl), str(images), "--out", str(tmp_path / "out"),
                 "--act", "h"]) == 0  # fmt: skip
    out, printed = tmp_path / "out", capsys.readouterr().out
    record = json.loads((out / "figures.json").read_text())
    assert list(record["images"]) == ["0", "2", "3"]
    assert [*record["unreadable"]] == [str(images / "1.png")]
    assert "1.png" in caplog.text
    assert "used 3 of 4 images" in printed
    assert record["read"]["used"] == 3

    model = efae_jax.load(kl)
    x = pixels(images / "2.png")[:, :20, :34]  # the centre, as far as the factor divides it
    z = model.encode(x)
    y, gx = model.decode(z), x[:, :, ::-1]
    gy = model.decode(model.act("h", z))
    row = record["images"]["2"]
    assert row["size"] == [20, 34]
    for prefix, a, b in (("", y, x), ("h_", gy, gx)):
        np.testing.assert_allclose(row[prefix + "psnr"], psnr(a, b)[0], rtol=1e-5)
        np.testing.assert_allclose(row[prefix + "ssim"], ssim(a, b)[0], rtol=1e-4, atol=1e-5)
    means = [np.mean([r["h_psnr"] for r in record["images"].values()]), record["mean"]["h_psnr"]]
    assert means[0] == pytest.approx(means[1])
    assert f"{row['psnr']:.2f}" in printed
    assert f"{record['mean']['h_ssim']:.4f}" in printed
    assert record["model"]["sha256"] == model.identity["sha256"]

    assert pictures_of(out, "2") == {"png", "input", "reconstruction", "h", "h-difference"}
    for kind, wanted in (
        ("input", x),
        ("reconstruction", y),
        ("h", gy),
        ("h-difference", reconstruct.AMPLIFY * np.abs(gy - gx) - 1),
    ):
        found = np.asarray(Image.open(out / f"2.{kind}.png"), np.int32)
        assert np.abs(found - to_pixels(wanted)[0]).max() <= 1, kind


def test_without_an_element_there_is_the_reconstruction_alone(kl, images, tmp_path):
    record = reconstruct.reconstruct(kl, [images / "3.png"], tmp_path / "out", size=16)
    assert list(record["mean"]) == ["psnr", "ssim"]
    assert record["images"]["3"]["size"] == [16, 16]
    assert pictures_of(tmp_path / "out", "3") == {"png", "input", "reconstruction"}


def test_tiles_give_the_same_pictures(kl, images, tmp_path):
    """Bounded memory, and figures by strips: close to the whole image's (see test_tiled)."""
    whole = reconstruct.reconstruct(kl, [images / "0.png"], tmp_path / "a", act="v")
    tiled = reconstruct.reconstruct(kl, [images / "0.png"], tmp_path / "b", act="v", tile=40)
    assert tiled["mean"] == pytest.approx(whole["mean"], rel=1e-3)


def test_ssim_by_strips_is_that_of_the_image(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1.2, 1.2, (2, 1, 61, 20, 3)).astype(np.float32)
    b = np.clip(a + 0.3 * b, -1, 1)
    for strip in (30, 51, 512):
        monkeypatch.setattr(reconstruct, "STRIP", strip)
        found = reconstruct._figures(a, b)
        np.testing.assert_allclose(found["ssim"], ssim(a, b)[0], rtol=1e-5)
        np.testing.assert_allclose(found["psnr"], psnr(a, b)[0], rtol=1e-5)


def test_a_decoder_of_twice_the_side_is_compared_with_the_image(tmp_path):
    """The encoder sees the image's half."""
    config = conv_config("aura", decoder_widths=(4, 8, 8), shrink=2)
    workdir = save(tmp_path / "hr", config)
    folder = folder_of_images(tmp_path / "images", [(22, 30)])
    record = reconstruct.reconstruct(workdir, [folder], tmp_path / "out", act="hv")
    assert record["images"]["0"]["size"] == [20, 28]
    model = efae_jax.load(workdir)
    x = pixels(folder / "0.png")[:, 1:21, 1:29]
    half = x.reshape(1, 10, 2, 14, 2, 3).mean((2, 4))
    y = model.decode(model.encode(half))
    np.testing.assert_allclose(record["mean"]["psnr"], psnr(y, x)[0], rtol=1e-5)
    assert record["act"] == "r180"


def test_a_flow_decoder_works_and_its_noise_is_transformed(tmp_path):
    workdir = save(tmp_path / "flow", flow_config())
    folder = folder_of_images(tmp_path / "images", [(20, 31)])
    record = reconstruct.reconstruct(workdir, [folder], tmp_path / "out", act="v")
    assert record["images"]["0"]["size"] == [8, 8]  # what the model was trained on
    model = efae_jax.load(workdir)
    x = pixels(tmp_path / "out" / "0.input.png")
    z = model.encode(x)
    noise = jax.random.normal(jax.random.key(reconstruct.SEED), x.shape)
    y = model.decode(model.act("v", z), noise=noise[:, ::-1])
    np.testing.assert_allclose(record["mean"]["v_psnr"], psnr(y, x[:, ::-1])[0], rtol=1e-5)
    assert "--tile: a flow" in error_of(
        reconstruct.reconstruct, workdir, [folder], tmp_path / "o", tile=8
    )


# ---- how elements act


@pytest.mark.parametrize("g", groups.group("d4").elements)
def test_symmetries_act_as_those_of_the_group(g):
    d4 = groups.group("d4")
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
    wanted = groups.act_image(d4, np.full(2, d4.elements.index(g)), x)
    np.testing.assert_array_equal(reconstruct.act_on_positions(g, x), wanted)


def test_an_element_of_the_group_acts_on_the_channels_and_another_does_not(kl, images, tmp_path,
                                                                           capsys):  # fmt: skip
    model = efae_jax.load(kl)
    z = np.random.default_rng(0).standard_normal((1, 6, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(reconstruct.act_on_latent(model, "h", z), model.act("h", z))
    assert np.abs(reconstruct.act_on_latent(model, "h", z) - z[:, :, ::-1]).max() > 1
    oblong = z[:, :4]
    turned = np.rot90(oblong, axes=(1, 2))
    np.testing.assert_array_equal(reconstruct.act_on_latent(model, "r90", oblong), turned)
    reconstruct.reconstruct(kl, [images / "0.png"], tmp_path / "out", act="r90")
    assert "r90 is no element of the model's group z2xz2" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "0.r90.png").size == (20, 34)


def test_quarter_turns_of_a_group_act_on_oblong_latents(tmp_path):
    config = conv_config()
    with config.unlocked():
        config.group.name, config.group.representation = "c4", "2*trivial + freq1"
    model = efae_jax.load(save(tmp_path / "c4", config))
    z = np.random.default_rng(0).standard_normal((1, 4, 6, 4)).astype(np.float32)
    found = np.asarray(reconstruct.act_on_latent(model, "r90", z))
    square = np.zeros((1, 6, 6, 4), np.float32)
    square[:, :4] = z
    np.testing.assert_allclose(found, np.asarray(model.act("r90", square))[:, :, :4], atol=1e-6)
    assert np.abs(found - np.rot90(z, axes=(1, 2))).max() > 0.5


# ---- the picture


def test_panels_enlarge_by_whole_pixels_and_shrink():
    little = np.zeros((10, 20, 3), np.uint8)
    little[:, 10:] = 200
    sheet = np.asarray(draw_panels([Panel(little, "a"), Panel(little[..., :1], "b", "grey")]))
    black = (sheet == 0).all(-1).sum()
    assert black == 2 * 130 * 130  # 13 times larger: the least that reaches 256
    large = np.full((400, 3000, 3), 7, np.uint8)
    sheet = draw_panels([Panel(large, "a")])
    assert sheet.width < 900


# ---- mistakes


def test_mistakes_are_one_line(kl, images, tmp_path, capsys):
    def error(*paths, out=tmp_path / "out", **options):
        return error_of(reconstruct.reconstruct, kl, paths or [images], out, **options)

    assert "--act flip: allowed are e, r90" in error(act="flip")
    assert "no such file or folder" in error(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no image in" in error(tmp_path / "empty")
    assert "--size 15 must be a positive multiple of 2" in error(size=15)
    assert "--tile 15 must be a positive multiple of 2" in error(tile=15)
    (tmp_path / "file").write_text("")
    assert "--out" in error(out=tmp_path / "file")
    command = ["reconstruct", "--model", str(kl), str(images / "1.png"), "--out", str(tmp_path)]
    assert main(command) == 1
    assert "none of the 1 images could be read" in capsys.readouterr().err
    folder = folder_of_images(tmp_path / "thin", [(1, 9)])
    with pytest.raises(RunError, match="too small: 9x1 pixels; at least 2 a side"):
        reconstruct.reconstruct(kl, [folder], tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Image size .620 pixels. exceeds")
def test_pictures_beyond_pillows_limit_are_read(tmp_path, monkeypatch):
    """And the limit is as it was, also behind an error."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    picture = (folder_of_images(tmp_path / "large", [(20, 31)]) / "0.png").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(picture, multiple=2).shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(BadImageError, match="more pixels than data.max_pixels=619 .*31x20"):
        read_picture(picture, max_pixels=619)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_device_that_is_full_is_one_line(kl, images, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError(f"{reason}: Out of memory\nmore lines")

    monkeypatch.setattr(reconstruct, "_one", full)
    reason = "RESOURCE_EXHAUSTED"
    call = [reconstruct.reconstruct, kl, [images / "0.png"], tmp_path / "out"]
    message = error_of(*call)
    assert "0.png: 34x20 pixels do not fit into the device's memory; --tile 128" in message
    assert "give a smaller --tile than 16" in error_of(*call, tile=16)
    reason = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError):
        reconstruct.reconstruct(*call[1:])


def test_latents_that_do_not_fit_are_one_line(kl):
    model = efae_jax.load(kl)
    for shape in ((1, 4, 4, 3), (4, 4, 4), (1, 4)):
        for call in (model.decode, lambda z: model.act("h", z), lambda z: model.decode(z, tile=16)):
            with pytest.raises(
                ValueError, match=r"latents must be \[B, h, w, 4\], not \("
            ) as caught:
                call(np.zeros(shape, np.float32))
            assert len(str(caught.value).splitlines()) == 1


def test_a_vector_latent_has_no_positions(tmp_path, images):
    workdir = save(tmp_path / "vector", flow_config(model__encoder__vector=True))
    message = error_of(reconstruct.reconstruct, workdir, [images], tmp_path / "out", act="r90")
    assert "--act r90: the latent has no positions" in message
    with pytest.raises(ValueError, match=r"latents must be \[B, \d+\], not"):
        efae_jax.load(workdir).act("h", np.zeros((1, 2, 2, 8), np.float32))


def test_files_of_one_name_do_not_overwrite_each_other():
    keys = ["a/b.png", "a_b.jpg", "c.png", "shot at 10.07", "d.tar/x.1"]
    assert reconstruct._names(keys) == ["a_b", "a_b-2", "c", "shot at 10.07", "d.tar_x.1"]


def test_images_of_a_data_source(kl, tmp_path):
    files = [(f"{i}.png", encoded(picture(i, 16, 16))) for i in range(3)]
    write_tar(tmp_path / "a.tar", [*files, ("0.cls", b"dog")])
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    found = reconstruct.reconstruct(
        kl, [f"webdataset:{tmp_path}/a.tar", tmp_path / "b.png"], tmp_path / "out"
    )
    assert [*found["images"]] == ["a.tar_0", "a.tar_1", "a.tar_2", "b"]
    assert found["read"] == {"images": 4, "used": 4, "left_out": {}}
    with pytest.raises(UserError, match="--split: files and folders have no splits"):
        reconstruct.reconstruct(kl, [tmp_path / "b.png"], tmp_path / "out", split="all")
