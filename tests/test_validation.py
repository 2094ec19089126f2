"""Evaluation: exact figures on any batch size and device count, and what it writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_device
from PIL import Image
from tiny import tiny

import efae_jax
from efae_jax import data, train, validation
from efae_jax.errors import RunError, UserError
from efae_jax.groups import act_image, act_latent, group, representation
from efae_jax.methods.base import to_float
from efae_jax.sharding import make_mesh


class Blocks:
    """An autoencoder without parameters: 2x2 means, repeated; exactly equivariant under flips."""

    group = group("z2xz2")
    matrices = representation(group, "3*trivial").matrices
    is_flow = True

    def views(self, x):
        return x, x

    def decode_options(self, config):
        return {}

    def encode(self, params, x):
        return x.reshape(x.shape[0], 4, 2, 4, 2, 3).mean((2, 4))

    def act(self, params, g_B, z):
        return act_latent(self.group, self.matrices, g_B, z)

    def act_image(self, g_B, x):
        return act_image(self.group, g_B, x)

    def decode(self, params, z, noise, **options):
        return z.repeat(2, axis=1).repeat(2, axis=2) + params * noise


class Shifted(Blocks):
    """The same, with a latent that knows its column: not equivariant under h."""

    shift = jnp.linspace(-1, 1, 4)[None, None, :, None]

    def encode(self, params, x):
        return super().encode(params, x) + self.shift

    def decode(self, params, z, noise, **options):
        return super().decode(params, z - self.shift, noise)


def figures(model, devices=1, params=0.1, **overrides):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return validation.Evaluator(model, tiny(**overrides), mesh).figures(params)


def test_an_equivariant_model_scores_alike_for_every_element():
    result = figures(Blocks())
    assert set(result) == {"e", "h", "v", "r180"}
    for row in result.values():
        assert row["equivariance_error"] < 1e-10
        # The noise is transformed along, so even the noisy decoder is the same picture.
        assert row["psnr"] == pytest.approx(result["e"]["psnr"], abs=1e-3)
        assert row["ssim"] == pytest.approx(result["e"]["ssim"], abs=1e-4)


def test_another_model_does_not():
    result = figures(Shifted(), params=0.0)
    assert result["e"]["equivariance_error"] == 0
    assert result["v"]["equivariance_error"] < 1e-10  # the shift is along the width only
    assert result["h"]["equivariance_error"] > 0.1
    assert result["h"]["psnr"] < result["v"]["psnr"] - 1


def test_figures_equal_the_mean_over_single_images():
    config, model = tiny(), Blocks()
    result = figures(model, params=0.0)
    batch = next(validation.held_out_batches(data.make_source(config.data, "test"), config, 21))
    x = np.asarray(to_float(jnp.asarray(batch["image"])), np.float64)
    y = np.asarray(model.decode(0.0, model.encode(None, jnp.asarray(x)), 0.0), np.float64)
    per_image = 10 * np.log10(4 / ((x - y) ** 2).mean((1, 2, 3)))
    assert result["e"]["psnr"] == pytest.approx(per_image.mean(), abs=1e-3)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (1, 21), (1, 32), (8, 8), (4, 16)])
def test_neither_devices_nor_batches_matter(devices, batch_size):
    """21 images: the last batch is partial for most."""
    one = figures(Blocks(), 1, eval__batch_size=1)
    other = figures(Blocks(), devices, eval__batch_size=batch_size)
    for g, row in one.items():
        for name, value in row.items():
            assert other[g][name] == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_num_images_takes_the_first():
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluator = validation.Evaluator(Blocks(), tiny(eval__num_images=10), mesh)
    evaluator.figures(0.1)
    assert evaluator.count == 10
    assert evaluator.read()["used"] == 10
    left_out = evaluator.read()["left_out"]["beyond config.eval.num_images"]
    assert left_out["count"] == len(evaluator.source) - 10
    masks = np.concatenate([b["mask"] for b in evaluator.batches()])
    assert masks[:10].all()
    assert not masks[10:].any()


def test_unreadable_images_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    held_out = tmp_path / "test"
    for folder in (tmp_path / "train", held_out):
        folder.mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    whole = {"data__source": "folder", "data__path": str(tmp_path)}
    (held_out / "3.png").write_bytes(b"no image")
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluator = validation.Evaluator(Blocks(), tiny(**whole), mesh)
    assert np.isfinite(evaluator.figures(0.0)["h"]["psnr"])
    assert evaluator.count == 5
    read = evaluator.read()
    assert (read["images"], read["used"]) == (6, 5)
    (entry,) = [e for kind, e in read["left_out"].items() if kind.startswith("unreadable")]
    assert entry["count"] == 1
    assert "3.png" in entry["example"]
    for i in range(6):
        (held_out / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="none of the held-out images could be read"):
        validation.Evaluator(Blocks(), tiny(**whole), mesh).figures(0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny(train__steps=3)
    with first_device():
        state = train.train(config, workdir)
    validation.evaluate_workdir(workdir, config, jax.devices()[:1])
    return workdir, state


def test_what_evaluation_writes(trained):
    out = trained[0] / "eval"
    record = json.loads((out / "figures.json").read_text())
    assert record["images"] == 21
    assert record["step"] == 3
    assert set(record["figures"]) == {"e", "h", "v", "r180"}
    assert record["decode"] == {"steps": 2, "solver": "euler", "guidance": 1.0}
    table = (out / "figures.txt").read_text()
    assert f"{record['figures']['h']['psnr']:.2f}" in table
    with Image.open(out / "equivariance.png") as picture:
        assert picture.width > picture.height
    with Image.open(out / "flow.gif") as film:
        assert film.n_frames > 10
        film.seek(film.n_frames - 1)
        assert film.info["duration"] > 1000


def test_load_gives_the_averaged_weights_as_an_object(trained):
    workdir, state = trained
    model = efae_jax.load(workdir)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(model.params),
        jax.device_get(state["ema"]["autoencoder"]),
    )
    x = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    z = model.encode(x)
    assert z.shape == (2, 2, 2, 8)
    np.testing.assert_allclose(model.encode(np.float32(x) / 127.5 - 1), z, atol=1e-5)
    flipped = model.act("h", z)
    np.testing.assert_array_equal(model.act("h", flipped), z)
    np.testing.assert_array_equal(model.act(jnp.array([1, 1]), z), flipped)
    np.testing.assert_array_equal(model.act_image("h", x), x[:, :, ::-1])
    a = model.decode(flipped, jax.random.key(0), steps=3)
    assert a.shape == x.shape
    assert np.abs(a).max() <= 1
    np.testing.assert_array_equal(a, model.decode(flipped, jax.random.key(0), steps=3))
    assert not np.array_equal(a, model.decode(flipped, jax.random.key(1), steps=3))
    wide = model.decode(jnp.zeros((1, 2, 4, 8)), jax.random.key(0))
    assert wide.shape == (1, 8, 16, 3)


def test_likelihood_of_images(trained):
    """The exact trace and the mean of many probes agree; one value per image."""
    model = efae_jax.load(trained[0])
    x = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    exact = model.bits_per_dimension(x, jax.random.key(0), steps=2, probes=None)
    assert exact.shape == (2,)
    assert np.all((exact > 1) & (exact < 20))
    estimate = model.bits_per_dimension(x, jax.random.key(0), steps=2, probes=64)
    np.testing.assert_allclose(estimate, exact, atol=0.05)


def test_older_checkpoints_can_be_named(trained):
    assert efae_jax.load(trained[0], step=3).step == 3
    with pytest.raises(UserError, match="no checkpoint of step 2; there are 3"):
        efae_jax.load(trained[0], step=2)


def test_mistakes_with_a_loaded_model_say_what_is_allowed(trained, tmp_path):
    model = efae_jax.load(trained[0])
    with pytest.raises(ValueError, match="e, h, v, r180"):
        model.act("r90", jnp.zeros((1, 2, 2, 8)))
    with pytest.raises(ValueError, match="indices 0 to 3"):
        model.act(np.array([7]), jnp.zeros((1, 2, 2, 8)))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        model.decode(jnp.zeros((1, 2, 2, 8)), jax.random.key(0), steps=0)
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        model.encode(np.zeros((8, 8, 3), np.uint8))
    for wrong in (np.full((1, 8, 8, 3), 200.0), np.full((1, 8, 8, 3), np.nan)):
        with pytest.raises(ValueError, match=r"floats must lie in \[-1, 1\], found"):
            model.encode(wrong)
    with pytest.raises(UserError, match="neither config.json"):
        efae_jax.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError):
        efae_jax.load(tmp_path)
