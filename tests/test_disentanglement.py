"""What channels tell: the parts that are compared, probes, their figures, the report of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from pair_files import planted, unit, write_pairs

from efae_jax.data.pairs import Pairs, Prediction
from efae_jax.data.splits import is_held_out
from efae_jax.disentanglement import measure, parts
from efae_jax.disentanglement.measure import Measurement, mean_targets
from efae_jax.disentanglement.probes import Probes, Settings
from efae_jax.errors import RunError
from efae_jax.metrics.subspaces import r_squared
from efae_jax.sharding import make_mesh, put_batch

COUNT, FRACTION = 300, 0.1
HELD = [i for i in range(COUNT) if is_held_out(str(i), FRACTION)]
QUICK = Settings(width=8, blocks=0, steps=250, lr=3e-2)


def mesh_of(devices):
    return make_mesh(devices=jax.devices()[:devices])


# ---- parts


@pytest.mark.parametrize("channels", [2, 4, 32])
def test_random_bases_are_orthogonal_and_come_again(channels):
    Q = parts.random_basis(channels, 3, 1)
    np.testing.assert_allclose(Q @ Q.T, np.eye(channels), atol=1e-6)
    np.testing.assert_array_equal(parts.random_basis(channels, 3, 1), Q)
    for other in ((3, 0), (4, 1), (1, 3)):
        assert np.abs(parts.random_basis(channels, *other) - Q).max() > 0.1


def test_random_bases_favour_nothing():
    """The uniform distribution has no mean, variance 1/C, and as many reflections as rotations."""
    draws = np.stack([parts.random_basis(3, 0, i) for i in range(2_000)])
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=4 * (3 * 2_000) ** -0.5)
    np.testing.assert_allclose((draws**2).mean(axis=0), 1 / 3, atol=0.04)
    assert abs(np.sign(np.linalg.det(draws)).mean()) < 4 * 2_000**-0.5


@pytest.mark.parametrize("seed", [0, 7])
def test_a_random_basis_is_not_the_one_that_its_seed_gives_to_anybody(seed):
    own = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))[0]
    assert np.abs(np.abs(parts.random_basis(4, seed, 0)) - np.abs(own)).max() > 0.1


def test_what_is_compared():
    Q = parts.random_basis(5, 9, 9)
    found = parts.compared(Q, 2, draws=2, seed=1)
    assert list(found) == ["semantic", "style", "random semantic 0", "random style 0",
                           "random semantic 1", "random style 1"]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([found["semantic"], found["style"]]), Q)
    for draw in range(2):
        rows = [found[f"random {part} {draw}"] for part in ("semantic", "style")]
        assert [len(r) for r in rows] == [2, 3]
        np.testing.assert_array_equal(np.concatenate(rows), parts.random_basis(5, 1, draw))


def test_raw_channels_are_rows_that_pick_them():
    z = np.arange(5.0)
    np.testing.assert_array_equal(parts.raw((3, 1), 5) @ z, [3, 1])


def test_few_subsets_are_all_tried_and_of_many_the_channels_one_by_one():
    assert parts.raw_candidates(4, 2) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert len(parts.raw_candidates(6, 3)) == 20
    assert parts.raw_candidates(7, 3) == [(0,), (1,), (2,), (3,), (4,), (5,), (6,)]
    assert parts.raw_candidates(4, 1) == [(0,), (1,), (2,), (3,)]


def test_the_best_raw_channels():
    four = parts.raw_candidates(4, 2)
    assert parts.best_raw(four, [5, 4, 1, 3, 2, 6], 2) == (0, 3)
    seven = parts.raw_candidates(7, 3)
    assert parts.best_raw(seven, [3, 9, 2, 8, 7, 1, 6], 3) == (0, 2, 5)
    assert parts.best_raw(parts.raw_candidates(4, 1), [3, 2, 1, 4], 1) == (2,)


# ---- probes


def examples(seed, count=64):
    """Latents 2x2x4, and a target [count, 3] of the means of channels 0 and 1."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((count, 1, 1, 4)) + 0.2 * rng.standard_normal((count, 2, 2, 4))
    a, b = z.mean(axis=(1, 2))[:, :2].T
    return z.astype(np.float32), np.tanh(np.stack([a, b, a - b], 1)).astype(np.float32)


def test_probes_learn_what_their_channels_tell():
    eye, mesh = np.eye(4), mesh_of(1)
    turned = np.array([[0.6, 0.8], [-0.8, 0.6]]) @ eye[:2]
    compared = {"right": eye[:2], "wrong": eye[2:], "turned": turned, "one": eye[:1]}
    settings = QUICK._replace(steps=150)
    probes, losses = Probes(compared, 2, 3, settings, mesh), []
    assert probes.names == tuple(compared)
    z, target = examples(0)
    before = [np.asarray(e) for e in probes.predict(put_batch(mesh, {"z": z})["z"])]
    for step in range(settings.steps):
        z, target = examples(step)
        losses.append(probes.learn(*put_batch(mesh, {"z": z, "t": target}).values()))
    z, target = examples(10_000, 512)
    found = probes.predict(put_batch(mesh, {"z": z})["z"])
    r2 = {n: r_squared(e, target, target.mean(0)) for n, e in zip(compared, found, strict=True)}
    assert min(r2["right"], r2["turned"]) > 0.9
    assert abs(r2["wrong"]) < 0.1
    assert 0.2 < r2["one"] < 0.6  # a, of three
    # The losses are those of the batch before its step.
    first, last = [np.square(e - examples(0)[1]).sum(-1).mean() for e in before], losses[-1]
    np.testing.assert_allclose(losses[0], first, rtol=1e-5)
    assert last[0] < 0.1 * first[0]
    # All parts, whatever their rows, are trained by one program.
    assert probes._programs.step._cache_size() == 1


def test_four_devices_learn_what_one_learns():
    """Predictions to 1e-4, so figures too."""
    found = []
    for devices in (1, 4):
        mesh = mesh_of(devices)
        probes = Probes({"a": np.eye(4)[:2], "b": np.eye(4)[1:2]}, 2, 3, QUICK, mesh)
        for step in range(5):
            batch = put_batch(mesh, dict(zip("zt", examples(step), strict=True)))
            losses = probes.learn(batch["z"], batch["t"])
        found.append((np.float32(losses), np.stack(probes.predict(batch["z"]))))
    for one, four in zip(*found, strict=True):
        np.testing.assert_allclose(four, one, rtol=0, atol=1e-4)


def test_every_probe_starts_from_a_draw_of_its_own_by_the_seed():
    eye, mesh = np.eye(4), mesh_of(1)
    device = put_batch(mesh, {"z": examples(0)[0]})["z"]

    def predictions(seed):
        settings = QUICK._replace(seed=seed)
        return np.stack(Probes({"a": eye[:2], "b": eye[:2]}, 2, 3, settings, mesh).predict(device))

    one, again, other = predictions(1), predictions(1), predictions(2)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one[0] - one[1]).max() > 0.1


def test_the_learning_rate_falls_from_lr_to_nothing():
    """Adam's first step is of the learning rate's size, whatever the gradient."""
    mesh = mesh_of(1)
    settings = QUICK._replace(steps=2, lr=1e-2)
    probes = Probes({"a": np.eye(4)[:2]}, 2, 3, settings, mesh)
    z, target = examples(0)
    device = put_batch(mesh, {"z": z, "t": target})
    sizes = []
    for _ in range(3):
        before = jax.device_get(probes._states[0][0])
        probes.learn(device["z"], device["t"])
        after = jax.device_get(probes._states[0][0])
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, before)
        sizes.append(max(jax.tree.leaves(moved)))
    np.testing.assert_allclose(sizes[0], 1e-2, rtol=1e-3)
    assert 0.3e-2 < sizes[1] < 0.6e-2  # half, by a gradient that is about the same
    assert sizes[2] == 0


# ---- the measurement


@pytest.fixture(scope="module")
def made():
    """Channels 0 and 2 tell the captions, 1 and 3 the style; each pair is turned in its plane."""
    matrix = np.zeros((4, 4))
    matrix[:2, [0, 2]] = [[0.6, 0.8], [-0.8, 0.6]]
    matrix[2:, [1, 3]] = [[0.8, 0.6], [0.6, -0.8]]
    return planted(COUNT, channels=4, dimension=3, matrix=matrix, noise=0.05)


@pytest.fixture(scope="module")
def pairs(made, tmp_path_factory):
    return written(tmp_path_factory.mktemp("pairs") / "planted", made)


def written(folder, made, **options):
    return Pairs(write_pairs(folder, *made[1:], test_fraction=FRACTION, **options))


def measurement(pairs, devices=1, settings=QUICK, **changes):
    options = {"batch_size": 32, "draws": 2, "clip": 0.0, "threads": 1} | changes
    return Measurement(pairs, mesh_of(devices), settings, **options)


@pytest.fixture(scope="module")
def figures(made, pairs):
    return measurement(pairs)(made.matrix, 2)


def test_each_half_of_the_channels_tells_what_it_should(figures):
    rows = figures["parts"]
    chance = 1 / len(HELD)
    for part, target, other in (("semantic", "caption", "style"), ("style", "style", "caption")):
        right, wrong = rows[part][target], rows[part][other]
        assert right["r2"] > 0.95
        assert right["recall_1"] > 8 * chance
        assert right["recall_5"] > 0.9
        assert wrong["r2"] < 0.15
        assert wrong["recall_1"] <= wrong["recall_5"] < 3 * 5 * chance
        for draw in range(2):
            assert 0.05 < rows[f"random {part} {draw}"][target]["r2"] < right["r2"] - 0.02
        # Here the best raw channels are as good: they span the same.
        assert rows[f"raw {part}"][target]["r2"] > 0.95
        assert rows[f"raw {part}"][other]["r2"] < 0.15
    assert figures["raw"] == {"raw semantic": [0, 2], "raw style": [1, 3]}
    assert {row["channels"] for row in rows.values()} == {2}
    assert figures["images"] == {"train": COUNT - len(HELD), "held_out": len(HELD)}
    captions = sum(1 + i % 3 for i in HELD)
    assert figures["candidates"] == {"caption": captions, "style": len(HELD)}


def test_the_latents_are_described_before_and_behind_the_basis(made, figures):
    z = made.latents[HELD].reshape(-1, 4).astype(np.float64)
    for name, u in (("raw", z), ("basis", z @ made.matrix.T)):
        np.testing.assert_allclose(figures["latent"][name]["mean"], u.mean(0), atol=1e-9)
        np.testing.assert_allclose(figures["latent"][name]["std"], u.std(0), rtol=1e-9)
    assert figures["latent"]["reconstruction_error"] < 1e-12


class Known:
    """A probe of two parts that needs no training: some means of channels."""

    def __init__(self, picks):
        self.picks = picks

    def predict(self, z):
        means = np.asarray(z).mean(axis=(1, 2))
        return [means[:, self.picks], -means[:, self.picks]]


KNOWN = {"caption": Known([0, 1, 2]), "style": Known([3, 2, 1, 0, 3, 2])}


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 32), (1, 7), (4, 8), (2, 64), (8, 16)])
def test_held_out_pairs_are_each_seen_once_in_any_division(made, pairs, devices, batch_size):
    m = measurement(pairs, devices, batch_size=batch_size)
    found, held, latent = m._held_out(KNOWN, made.matrix)
    means = made.latents[HELD].mean(axis=(1, 2))
    for target, known in KNOWN.items():
        wanted = means[:, known.picks]
        for e, sign in zip(found[target], (1, -1), strict=True):
            np.testing.assert_allclose(e, sign * wanted, rtol=1e-5, atol=1e-6)
    text = np.stack([made.captions[i].mean(axis=0) for i in HELD])
    np.testing.assert_allclose(held.caption, text, rtol=1e-5, atol=1e-6)
    style = made.images[HELD] - text @ pairs.prediction.matrix - pairs.prediction.offset
    np.testing.assert_allclose(held.style, style, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(held.candidates, np.concatenate([made.captions[i] for i in HELD]))
    for own, i in zip(held.own, HELD, strict=True):
        count = len(made.captions[i])
        np.testing.assert_array_equal(held.candidates[own[:count]], made.captions[i])
        assert (own[count:] == -1).all()
    np.testing.assert_allclose(
        latent["raw"]["std"], made.latents[HELD].reshape(-1, 4).std(0, dtype=float), rtol=1e-9
    )


class Still(Known):
    """Learns nothing. Part i's loss at step s is s (i + 1)."""

    def __init__(self, parts, most, dimension, settings, mesh):
        super().__init__(np.arange(dimension) % 4)
        self.parts, self.step = parts, 0
        assert most >= max(map(len, parts.values()))

    def learn(self, z, target):
        self.step += 1
        return [np.float32(self.step * (i + 1)) for i in range(len(self.parts))]

    def predict(self, z):
        return [super().predict(z)[0]] * len(self.parts)


def test_figures_are_against_the_means_of_the_training_pairs(made, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Probes", Still)
    captions = [c + np.float32(0.5) for c in made.captions]
    pairs = written(tmp_path, made._replace(captions=captions))
    train = [i for i in range(COUNT) if i not in HELD]
    epoch = QUICK._replace(steps=len(train) // 39)
    m = measurement(pairs, settings=epoch, batch_size=39)
    assert len(train) % 39 == 0
    text = np.stack([c.mean(axis=0) for c in captions])
    targets = {
        "caption": text,
        "style": made.images - text @ pairs.prediction.matrix - pairs.prediction.offset,
    }
    figures = m(made.matrix, 2)
    for target, values in targets.items():
        found = made.latents[HELD].mean(axis=(1, 2))[:, np.arange(values.shape[1]) % 4]
        left = np.square(found - values[HELD]).sum()
        spread = np.square(values[HELD] - values[train].mean(axis=0)).sum()
        for row in figures["parts"].values():
            assert row[target]["r2"] == pytest.approx(1 - left / spread, rel=1e-4)
    assert figures["raw"] == {"raw semantic": [0, 1], "raw style": [0, 1]}
    one = m(made.matrix, 1)
    assert one["raw"] == {"raw semantic": [0], "raw style": [0, 1, 2]}
    for name, row in one["parts"].items():
        assert row["channels"] == (3 if "style" in name else 1)


def test_late_losses_decide(pairs, monkeypatch):
    monkeypatch.setattr(measure, "Probes", Still)
    settings = QUICK._replace(steps=28)
    compared = {target: {"a": np.eye(4)[:2], "b": np.eye(4)[:1]} for target in KNOWN}
    _, losses = measurement(pairs)._trained(compared, 2, "", settings)
    assert losses == {target: [25, 50] for target in KNOWN}  # means of 22 to 28


def test_what_cannot_be_read_is_left_out_of_everything(made, tmp_path):
    captions = list(made.captions)
    bad = HELD[4]
    captions[bad] = np.concatenate([captions[bad]] * 6)  # more than there may be
    pairs = written(tmp_path, made._replace(captions=captions))
    left = [i for i in HELD if i != bad]
    found, held, latent = measurement(pairs, max_bad=1)._held_out(KNOWN, made.matrix)
    np.testing.assert_allclose(
        found["caption"][0], made.latents[left].mean(axis=(1, 2))[:, :3], rtol=1e-5, atol=1e-6
    )
    text = [made.captions[i].mean(axis=0) for i in left]
    np.testing.assert_allclose(held.caption, text, rtol=1e-5, atol=1e-6)
    assert held.style.shape == (len(left), 6)
    for own, i in zip(held.own, left, strict=True):
        np.testing.assert_array_equal(held.candidates[own[own >= 0]], made.captions[i])
    z = made.latents[left].reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(latent["raw"]["mean"], z.mean(0), atol=1e-9)
    with pytest.raises(RunError, match="unreadable"):
        measurement(pairs)._held_out(KNOWN, made.matrix)


def test_nothing_that_can_be_read_is_one_line(made, tmp_path):
    captions = [np.concatenate([c] * 6) for c in made.captions]
    pairs = written(tmp_path, made._replace(captions=captions))
    with pytest.raises(RunError, match="none of the held-out pairs could be read"):
        measurement(pairs, max_bad=COUNT)._held_out(KNOWN, made.matrix)


def test_captions_that_several_images_share_are_found_by_each(made, tmp_path):
    """As the one-hot ones of the built-in images: a candidate is there once."""
    kinds = np.eye(3, dtype=np.float32)
    captions = [np.stack([kinds[i % 3]] * 2) for i in range(COUNT)]
    pairs = written(tmp_path, made._replace(captions=captions))
    _, held, _ = measurement(pairs)._held_out(KNOWN, made.matrix)
    assert sorted(held.candidates.tolist()) == sorted(kinds.tolist())
    for own, i in zip(held.own, HELD, strict=True):
        np.testing.assert_array_equal(held.candidates[own[:2]], [kinds[i % 3]] * 2)


def test_captions_of_equal_texts_are_one_whatever_rounding_left_of_them(made, tmp_path):
    rng = np.random.default_rng(0)
    captions = [c + np.float32(1e-7) * rng.standard_normal(c.shape).astype(np.float32)
                for c in (made.captions[i % 4] for i in range(COUNT))]  # fmt: skip
    texts = [[f"text {n} of {i % 4}" for n in range(len(c))] for i, c in enumerate(captions)]
    pairs = written(tmp_path, made._replace(captions=captions), texts=texts)
    _, held, _ = measurement(pairs)._held_out(KNOWN, made.matrix)
    different = np.concatenate([made.captions[i] for i in range(4)])
    assert len(held.candidates) == len(different)
    for own, i in zip(held.own, HELD, strict=True):
        found = held.candidates[own[own >= 0]]
        np.testing.assert_allclose(found, made.captions[i % 4], rtol=0, atol=1e-6)


def test_captions_whose_texts_are_not_known_one_by_one_are_told_apart(made, tmp_path):
    """A user's own embeddings need not be as many as the captions."""
    pairs = written(tmp_path, made, texts=[["the same"]] * COUNT)
    _, held, _ = measurement(pairs)._held_out(KNOWN, made.matrix)
    several = [made.captions[i] for i in HELD if len(made.captions[i]) > 1]
    assert len(held.candidates) == 1 + sum(map(len, several))


def test_a_probe_that_diverged_is_named(made, pairs, monkeypatch):
    class Diverged(Still):
        def predict(self, z):
            return [e * (np.nan if name == "style" else 1) for name, e in
                    zip(self.parts, super().predict(z), strict=True)]  # fmt: skip

    monkeypatch.setattr(measure, "Probes", Diverged)
    with pytest.raises(RunError, match="the probe of style diverged"):
        measurement(pairs, settings=QUICK._replace(steps=4))(made.matrix, 2)


def test_latents_are_clipped_for_probes_but_described_as_they_are(made, pairs):
    seen = []

    class Seeing(Known):
        def predict(self, z):
            seen.append(np.asarray(z))
            return super().predict(z)

    m = measurement(pairs, clip=0.5, batch_size=len(HELD))
    probes = {"caption": Seeing([0, 1, 2]), "style": KNOWN["style"]}
    _, _, latent = m._held_out(probes, made.matrix)
    np.testing.assert_array_equal(seen[0], np.clip(made.latents[HELD], -0.5, 0.5))
    assert min(latent["raw"]["std"]) > 0.8


def test_so_many_held_out_pairs_as_are_asked_for(made, pairs):
    m = measurement(pairs, num_images=9)
    _, held, _ = m._held_out(KNOWN, made.matrix)
    text = [made.captions[i].mean(axis=0) for i in HELD[:9]]
    np.testing.assert_allclose(held.caption, text, rtol=1e-5, atol=1e-6)
    assert len(measurement(pairs, num_images=10_000).test) == len(HELD)


def test_a_matrix_that_is_not_orthogonal_does_not_lead_back(made, pairs):
    _, _, latent = measurement(pairs)._held_out(KNOWN, 1.1 * made.matrix)
    assert latent["reconstruction_error"] == pytest.approx(0.21, rel=1e-6)


def test_targets_are_means_of_the_captions_there_are(made):
    rng = np.random.default_rng(0)
    prediction = Prediction(*(rng.standard_normal(s).astype(np.float32) for s in ((3, 6), (6,))))
    captions = np.zeros((3, 5, 3), np.float32)
    for row, count in enumerate((1, 3, 5)):
        captions[row, :count] = unit(rng.standard_normal((count, 3)))
    batch = {
        "captions": captions, "count": np.int32([1, 3, 5]),
        "image": unit(rng.standard_normal((3, 6))),
    }  # fmt: skip
    found = mean_targets(prediction, batch)
    text = np.stack([captions[row, :count].mean(0) for row, count in enumerate((1, 3, 5))])
    np.testing.assert_allclose(found["caption"], text, rtol=1e-6)
    np.testing.assert_allclose(
        found["style"], batch["image"] - text @ prediction.matrix - prediction.offset, rtol=1e-5
    )
    assert {value.dtype.name for value in found.values()} == {"float32"}
