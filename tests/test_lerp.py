"""`lerp`: which latents lie between two, what they decode to, the sheet, and mistakes."""

from __future__ import annotations

import functools
import json
from itertools import combinations

import numpy as np
import pytest
import scipy.ndimage
from data_files import picture
from PIL import Image
from saved_models import conv_config, flow_config, folder_of_images, pixels, save
from weights import error_of

import efae_jax
from efae_jax.basis import make_basis, write_beside
from efae_jax.disentangled import Disentangled
from efae_jax.lerp import command, lerp, mixing, sheet
from efae_jax.lerp.mixing import decode_mixtures, mixtures
from efae_jax.models.conv_autoencoder import shrink
from efae_jax.pictures import to_pixels

PLACES = ("input", "target", "difference", "target-difference")


def rotation(seed, side=4):
    u, _, v = np.linalg.svd(np.random.default_rng(seed).standard_normal((side, side)))
    return u @ v


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """4 channels, each in units of its own."""
    config = conv_config()
    with config.unlocked():
        config.latent.scaling = 1.0
        config.latent.mean, config.latent.std = (0.5, -1.0, 2.0, 0.25), (0.5, 2.0, 1.5, 4.0)
    return save(tmp_path_factory.mktemp("models") / "kl", config)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """8 channels without positions."""
    config = flow_config(model__encoder__vector=True)
    return save(tmp_path_factory.mktemp("models") / "flow", config)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """0.png and 1.png, of other sizes than the model's; 2.png is damaged."""
    folder = tmp_path_factory.mktemp("images") / "some"
    return folder_of_images(folder, [(21, 35), (40, 24), (9, 9)], broken=[2])


# Which


def test_every_set_of_channels_is_moved_by_the_share_and_the_others_stay():
    basis = make_basis(rotation(0), 1, "here")
    found = mixtures(basis, 0.75)
    singles, pairs = [f"raw-{i}" for i in range(4)], [*combinations(range(4), 2)]
    names = ["reconstruction", "target-reconstruction", "semantic", "style", *singles]
    assert list(found) == names + [f"raw-{i}-{j}" for i, j in pairs]
    n, target, Q = *normal(1, 2, 5, 4).astype(np.float64), basis.matrix.astype(np.float64)
    moved = {name: n + (target - n) @ A.T for name, A in found.items()}
    np.testing.assert_allclose(moved["reconstruction"], n)
    np.testing.assert_allclose(moved["target-reconstruction"], target)
    for i, j in [(i, i) for i in range(4)] + pairs:
        wanted = n.copy()
        for c in (i, j):
            wanted[:, c] = 0.75 * target[:, c] + 0.25 * n[:, c]
        name = f"raw-{i}" if i == j else f"raw-{i}-{j}"
        np.testing.assert_allclose(moved[name], wanted)
    u, v = n @ Q.T, target @ Q.T
    for name, channels in (("semantic", [0]), ("style", [1, 2, 3])):
        wanted = u.copy()
        wanted[:, channels] = 0.75 * v[:, channels] + 0.25 * u[:, channels]
        np.testing.assert_allclose(moved[name] @ Q.T, wanted, atol=1e-6)


def test_many_channels_are_not_paired(monkeypatch):
    monkeypatch.setattr(mixing, "MOST_PAIRED", 5)
    count = {c: len(mixtures(make_basis(np.eye(c), 1, ""), 0.5)) for c in (5, 6)}
    assert count == {5: 4 + 5 + 10, 6: 4 + 6}


# What they decode to


def test_batches_of_one_size_give_what_single_ones_give(kl, monkeypatch):
    model = efae_jax.load(kl)
    both = Disentangled(model, rotation(1), 3)
    z, target = normal(2, 2, 4, 6, 4)
    matrices = mixtures(both.basis, 0.9)
    shapes = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z, **o: shapes.append(z.shape) or decode(z, **o))
    monkeypatch.setattr(mixing, "PIXELS", 4 * 8 * 12)
    found = dict(decode_mixtures(model, z, target, matrices, (8, 12, 3)))
    assert shapes == [(4, 4, 6, 4)] * 4  # of 14
    assert list(found) == list(matrices)
    parts, others = both.split(z[None]), both.split(target[None])
    mixed = [0.9 * np.asarray(b) + 0.1 * np.asarray(a) for a, b in zip(parts, others, strict=True)]
    raw = z.copy()
    raw[..., [1, 3]] = 0.9 * target[..., [1, 3]] + 0.1 * z[..., [1, 3]]
    moved = {
        "reconstruction": z,
        "semantic": both.join(mixed[0], parts[1])[0],
        "style": both.join(parts[0], mixed[1])[0],
        "raw-1-3": raw,
    }
    wanted = decoded(model, *moved.values(), batch=4)
    for name, image in zip(moved, wanted, strict=True):
        np.testing.assert_allclose(found[name], image, rtol=0, atol=1e-4)


def test_a_flow_starts_from_one_noise(flow):
    """At a share of nothing every image is the reconstruction."""
    model = efae_jax.load(flow)
    z, target = normal(0, 2, 8)
    basis = make_basis(rotation(0, 8), 4, "")
    found = dict(decode_mixtures(model, z, target, mixtures(basis, 0.0), (8, 8, 3)))
    other = found.pop("target-reconstruction")
    assert np.abs(other - found["reconstruction"]).max() > 1e-3
    for image in found.values():
        np.testing.assert_array_equal(image, found["reconstruction"])


# The command


def decoded(model, *latents, batch=14):
    """In a batch of the command's size: a program that is there already."""
    return model.decode(np.resize(np.stack(latents), (batch, *latents[0].shape)))[: len(latents)]


def read(path):
    return np.asarray(Image.open(path), np.int32)


def test_the_files_show_what_the_model_gives(kl, images, tmp_path, capsys):
    paths, out = (images / "0.png", images / "1.png"), tmp_path / "out"
    np.save(tmp_path / "q.npy", np.eye(4)[[2, 0, 1, 3]])
    record = lerp(kl, tmp_path / "q.npy", *paths, out, size=12, alpha=0.8, semantic=1)
    assert json.loads((out / "lerp.json").read_text()) == record
    mixed = ["semantic", "style", *(f"raw-{i}" for i in range(4))]
    mixed += [f"raw-{i}-{j}" for i, j in combinations(range(4), 2)]
    assert list(record["mixtures"]) == mixed
    names = {*PLACES, *mixing.RECONSTRUCTIONS, *mixed, "lerp"}
    assert {path.name for path in out.iterdir()} == {*(f"{n}.png" for n in names), "lerp.json"}

    model = efae_jax.load(kl)
    x = np.concatenate([pixels(out / f"{name}.png") for name in ("input", "target")])
    assert x.shape == (2, 12, 12, 3)
    z = np.asarray(model.encode(x))
    one = z[0].copy()
    one[..., 2] = 0.8 * z[1, ..., 2] + 0.2 * one[..., 2]  # in units of its own, too
    *y, one = decoded(model, *z, one)
    for name, wanted in (
        ("reconstruction", y[0]),
        ("target-reconstruction", y[1]),
        ("difference", 10 * np.abs(y[0] - x[0]) - 1),
        ("target-difference", 10 * np.abs(y[1] - x[1]) - 1),
        ("semantic", one),
        ("raw-2", one),
    ):
        assert np.abs(read(out / f"{name}.png") - to_pixels(wanted)).max() <= 1, name
    assert (read(out / "style.png") != read(out / "raw-0-1.png")).any()

    for end, i in (("original", 0), ("target", 1)):
        wanted = np.abs(y[i] - x[i]).mean()
        assert record["reconstruction"][end] == pytest.approx(wanted, rel=1e-4)
        wanted = np.abs(one - y[i]).mean()
        assert record["mixtures"]["semantic"][f"from_{end}"] == pytest.approx(wanted, rel=1e-3)
    assert record["model"] == model.identity
    assert (record["basis"]["source"], record["basis"]["semantic"]) == (str(tmp_path / "q.npy"), 1)
    assert (record["alpha"], record["size"]) == (0.8, [12, 12])
    printed = capsys.readouterr().out
    assert "0.8 of the target" in printed
    for name in ("semantic", "style"):
        assert f"{record['mixtures'][name]['from_target']:.4f}" in printed
    mean = np.mean([record["mixtures"][n]["from_original"] for n in mixed if n.count("-") == 2])
    assert "two raw channels, mean of 6" in printed
    assert f"{mean:.4f}" in printed


def test_the_whole_share_and_the_models_own_basis(kl, images, tmp_path):
    """At 1 it is the semantic channels of the one with the style channels of the other."""
    out = tmp_path / "out"
    write_beside(make_basis(rotation(3), 2, ""), kl)
    try:
        record = lerp(kl, None, images / "1.png", images / "0.png", out, alpha=1)
        both = Disentangled(efae_jax.load(kl))
    finally:
        (kl / "basis.safetensors").unlink()
    assert record["basis"]["source"] == str(kl / "basis.safetensors")
    assert record["size"] == [16, 16]  # as the config says
    x = np.concatenate([pixels(out / f"{name}.png") for name in ("input", "target")])
    semantic, style = both.encode(x)
    made = both.join(semantic[::-1], style)
    for name, image in zip(("semantic", "style"), decoded(both.model, *made), strict=True):
        assert np.abs(read(out / f"{name}.png") - to_pixels(image)).max() <= 1


def test_a_decoder_of_twice_the_side_is_given_half_the_image(images, tmp_path):
    config = conv_config("aura", decoder_widths=(4, 8, 8), shrink=2)
    workdir = save(tmp_path / "hr", config)
    out = tmp_path / "out"
    record = lerp(workdir, np.eye(4), images / "0.png", images / "1.png", out, size=8)
    assert record["size"] == [8, 8]
    model = efae_jax.load(workdir)
    x = np.concatenate([pixels(out / f"{name}.png") for name in ("input", "target")])
    wanted = to_pixels(decoded(model, *np.asarray(model.encode(shrink(x, 2))))[1])
    assert np.abs(read(out / "target-reconstruction.png") - wanted).max() <= 1
    assert "--size 6 must be a positive multiple of 4" in error_of(
        lerp, workdir, np.eye(4), images / "0.png", images / "1.png", out, size=6
    )


def test_mistakes_are_one_line(kl, flow, images, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", functools.cache(command.load))
    first, second, out = images / "0.png", images / "1.png", tmp_path / "out"

    def says(expected, *arguments, **options):
        message = error_of(lerp, *arguments, **options)
        assert expected in message, message

    for alpha in (-0.1, 1.5, float("nan")):
        expected = f"--alpha {alpha}: the target's share must lie between 0 and 1"
        says(expected, kl, np.eye(4), first, second, out, alpha=alpha)
    says("none.png: no such image file", kl, np.eye(4), first, images / "none.png", out)
    says("some: no such image file", kl, np.eye(4), images, second, out)
    assert not out.exists()
    says(
        "2.png cannot be read as an image: no image that Pillow reads here",
        kl,
        np.eye(4),
        first,
        images / "2.png",
        out,
    )
    says(f"--out {first} is a file", kl, np.eye(4), first, second, first)
    says("basis of 3 channels; the model's latent has 4", kl, np.eye(3), first, second, out)
    says("no basis travels with the model", kl, None, first, second, out)
    for size in (7, 0):
        expected = f"--size {size} must be a positive multiple of 2"
        says(expected, kl, np.eye(4), first, second, out, size=size)
    expected = "--size 16: the model's latent has no positions, so that it takes images of 8x8 only"
    says(expected, flow, np.eye(8), first, second, out, size=16)
    assert not list(out.iterdir())


# The sheet


class Colours:
    """A picture of one colour for every name."""

    def __init__(self, size):
        self.size, self.names = size, {}

    def __call__(self, name):
        number = self.names.setdefault(name, len(self.names))
        return Image.new("RGB", self.size, (number % 25 * 10, number // 25 * 10, 100))


@pytest.mark.parametrize(
    ("channels", "paired", "size"),
    [(2, True, (32, 32)), (4, True, (256, 256)), (7, True, (20, 14)), (8, True, (256, 256)),
     (16, True, (160, 160)), (32, True, (32, 32)), (12, True, (50, 130)), (40, False, (96, 64))],
)  # fmt: skip
def test_every_picture_stands_on_the_sheet_once_and_whole(channels, paired, size):
    colours = Colours(size)
    found = sheet.draw_sheet(colours, channels, paired, sheet.Captions("Title", "note " * 200, 10))
    assert max(found.size) <= 3000
    array = np.asarray(found, np.int32)
    painted = (array[..., 2] == 100) & ~(array[..., :2] % 10).any(-1)
    numbers = np.where(painted, array[..., 0] // 10 + array[..., 1] // 10 * 25 + 1, 0)
    counts = np.bincount(numbers.ravel())
    boxes, places, areas = scipy.ndimage.find_objects(numbers), {}, {}
    for name, number in colours.names.items():
        rows, columns = boxes[number]
        places[name] = (rows.start, columns.start)
        areas[name] = (rows.stop - rows.start, columns.stop - columns.start)
        # It is one rectangle, of the picture's proportions, and nothing lies over it.
        assert counts[number + 1] == np.prod(areas[name])
        assert areas[name][1] / areas[name][0] == pytest.approx(size[0] / size[1], rel=0.05)
    raw = [f"raw-{i}" for i in range(channels)]
    pairs = [(i, j) for i, j in combinations(range(channels), 2) if paired]
    large = ["input", "reconstruction", "difference", "semantic", "target",
             "target-reconstruction", "target-difference", "style"]  # fmt: skip
    assert set(places) == {*large, *raw, *(f"raw-{i}-{j}" for i, j in pairs)}
    assert len({areas[name] for name in large}) == 1
    assert areas["input"] >= areas["raw-0"]
    for i, j in pairs:
        assert places[f"raw-{i}-{j}"] == (places[raw[j]][0], places[raw[i]][1])
    assert [places[name][0] for name in large] == [places["input"][0]] * 4 + [
        places["style"][0]
    ] * 4
    lefts = [places[name][1] for name in large]
    assert lefts[:4] == lefts[4:] == sorted(set(lefts))
    if paired:
        assert [places[n] for n in raw] == sorted(places[n] for n in raw)
        assert len({places[n][0] for n in raw}) == len({places[n][1] for n in raw}) == channels
    # Where there is nothing, it is white: no picture is cut off at an edge.
    edges = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
    assert (edges == 255).all()


def test_small_pictures_keep_their_pixels_and_one_channel_is_grey():
    def read(name):
        return picture(3, 24, 24).convert("L")

    found = np.asarray(sheet.draw_sheet(read, 4, True, sheet.Captions("", "", 10)))
    enlarged = np.asarray(read("").resize((240, 240), Image.Resampling.NEAREST).convert("RGB"))
    column = found[:, sheet.LEFT : sheet.LEFT + 240]
    tops = [y for y in range(len(column) - 240) if (column[y] == enlarged[0]).all()]
    # In the first column: original and target; channel 0, alone and with the others.
    assert sum((column[y : y + 240] == enlarged).all() for y in tops) == 6
