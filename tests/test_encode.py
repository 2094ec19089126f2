"""`encode`: latents on disk, whole and resumed, their statistics, their reader, the mistakes."""

from __future__ import annotations

import json
from random import Random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import conv_config, flow_config, folder_of_images, save
from weights import error_of

import efae_jax
from efae_jax import encode, extract
from efae_jax.__main__ import main
from efae_jax.data import write_array_record
from efae_jax.data.latents import Latents
from efae_jax.errors import RunError
from efae_jax.extract import Extractor, Settings
from efae_jax.metrics.streaming import ChannelStatistics

COUNT = 11


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "kl", conv_config())


@pytest.fixture(scope="module")
def model(kl):
    return efae_jax.load(kl)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes in folders, image 3 of the first damaged."""
    root = tmp_path_factory.mktemp("images") / "some"
    folder_of_images(root / "cats", [(20, 30 - i) for i in range(7)], broken=[3])
    folder_of_images(root / "dogs", [(16 + i, 18) for i in range(COUNT - 7)])
    return root


def extractor(model, images, out, batch_size=4, devices=1, max_bad=100, size=None, **options):
    where = encode.make_source(model, str(images), size=size)
    return Extractor(
        model, *where, out, Settings(**{"shards": 3, **options}),
        batch_size=batch_size, max_bad=max_bad, devices=jax.devices()[:devices],
    )  # fmt: skip


def encoded(*args, **options):
    made = extractor(*args, **options)
    made.run()
    made.finish()
    return Latents(made.out)


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def plain(model, images, tmp_path_factory):
    """The folder that the tests below compare with."""
    return encoded(model, images, tmp_path_factory.mktemp("latents") / "plain")


def test_the_command_writes_what_the_model_gives(kl, images, tmp_path, capsys, caplog):
    out = tmp_path / "latents"
    command = ["encode", "--model", str(kl), "--data", str(images), "--out", str(out)]
    assert main([*command, "--shards", "3", "--batch-size", "8"]) == 0
    latents, printed = Latents(out), capsys.readouterr().out
    assert "3.png" in caplog.text
    assert len(latents) == COUNT - 1
    model = efae_jax.load(kl)
    source, transform, _ = encode.make_source(model, str(images))
    read = [latents[i] for i in range(len(latents))]
    assert [r["index"] for r in read] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # the last batch: 3 of 8
    assert [r["key"] for r in read[2:4]] == ["cats/2.png", "cats/4.png"]
    assert [r["label"] for r in read] == 6 * [0] + 4 * [1]
    x = np.stack([transform(source[r["index"]]["image"], Random(0)) for r in read])
    z = np.asarray(model.encode(x))
    found = np.stack([r["latent"] for r in read])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, z, rtol=1e-4, atol=1e-5)

    summary = json.loads((out / "latents.json").read_text())
    flat = found.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(summary["mean"], flat.mean(0), rtol=1e-9)
    np.testing.assert_allclose(summary["std"], flat.std(0), rtol=1e-9)
    np.testing.assert_array_equal(summary["quantiles"]["1.0"], flat.max(0))
    assert summary["shape"] == [8, 8, 4]
    assert summary["images"] == COUNT - 1
    assert summary["shards"] == [3, 3, 4]
    assert summary["unreadable"] == [str(images / "cats/3.png")]
    assert summary["model"]["sha256"] == model.identity["sha256"]
    mean = "(" + ", ".join(f"{value:.6g}" for value in summary["mean"]) + ",)"
    assert f"--config.latent.mean='{mean}'" in printed
    assert "used 10 of 11 images" in printed
    assert "unreadable (no image that Pillow reads here): 1 (" in printed
    assert summary["read"]["used"] == COUNT - 1


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(model, images, plain, tmp_path,
                                                          monkeypatch):  # fmt: skip
    out = tmp_path / "latents"
    with monkeypatch.context() as patch:
        patch.setattr(extract, "write_shard", cut_off(extract.write_shard, after=1))
        with pytest.raises(KeyboardInterrupt):
            extractor(model, images, out).run()
    there = {path.name for path in out.iterdir()}
    assert "latents-00000-of-00003.array_record" in there
    assert not any("00001-of-00003.array_record" in name for name in there)
    first = (out / "latents-00000-of-00003.array_record").stat()
    with pytest.raises(RunError, match="lacks 2 of 3 shards"):
        extractor(model, images, out).finish()
    assert "holds no latents.json" in error_of(Latents, out)
    assert len(encoded(model, images, out)) == len(plain)
    assert (out / "latents-00000-of-00003.array_record").stat().st_mtime_ns == first.st_mtime_ns
    assert files(out) == files(plain._files[0].parent)


def cut_off(write, after):
    """A writer of shards that the user interrupts amid the one after `after`."""
    done = []

    def some(records):
        yield next(records)
        raise KeyboardInterrupt

    def writer(path, records, form):
        if len(done) == after:
            return write(path, some(records), form)
        done.append(path)
        return write(path, records, form)

    return writer


@pytest.mark.parametrize("changes", [{"devices": 8, "batch_size": 8}, {"format": "npz"}])
def test_devices_batches_and_formats_change_nothing(model, images, plain, tmp_path, changes):
    found = encoded(model, images, tmp_path / "latents", **changes)
    assert len(found) == len(plain)
    for i in range(len(plain)):
        ours, theirs = found[i], plain[i]
        np.testing.assert_allclose(ours.pop("latent"), theirs.pop("latent"), rtol=1e-4, atol=1e-5)
        assert ours == theirs
    for name in ("mean", "std"):
        np.testing.assert_allclose(found.summary[name], plain.summary[name], rtol=1e-5)


def test_processes_share_out_the_shards(model, images, plain, tmp_path):
    out = tmp_path / "latents"
    for process in (1, 0):
        extractor(model, images, out).run(process, 2)
        names = sorted(path.name for path in out.glob("*.array_record"))
        assert len(names) == (1 if process else 3)
    extractor(model, images, out).finish()
    assert files(out) == files(plain._files[0].parent)


def test_samples_come_from_the_posterior_by_the_number_of_the_image(model, images, tmp_path):
    options = {"sample": True, "seed": 3}
    one = encoded(model, images, tmp_path / "a", **options)
    two = encoded(model, images, tmp_path / "b", **options, shards=2, batch_size=3)
    posterior = model.posterior(_pixels(model, images))
    noise = [_noise(3, one[i]["index"]) for i in range(len(one))]
    wanted = posterior.mean + np.exp(0.5 * posterior.log_variance) * np.stack(noise)
    for i in range(len(one)):
        np.testing.assert_allclose(one[i]["latent"], two[i]["latent"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one[i]["latent"], wanted[i], rtol=1e-4, atol=1e-4)


def _noise(seed, index):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), (8, 8, 4))


def _pixels(model, images):
    source, transform, _ = encode.make_source(model, str(images))
    return np.stack([transform(source[i]["image"], Random(0)) for i in range(COUNT) if i != 3])


def test_statistics_go_back_into_a_model(model, images, plain, tmp_path, kl):
    stored = tmp_path / "stored"
    encode.store_statistics(model, plain.summary, stored)
    normalised = encoded(efae_jax.load(stored), images, tmp_path / "latents", normalised=True)
    np.testing.assert_allclose(normalised.summary["mean"], 0, atol=1e-5)
    np.testing.assert_allclose(normalised.summary["std"], 1, rtol=1e-5)
    message = error_of(encode.encode_source, kl, tmp_path / "x", settings=Settings(), store=stored)
    assert "is there already" in message
    message = error_of(
        encode.encode_source, kl, tmp_path / "x", settings=Settings(normalised=True),
        store=tmp_path / "new",
    )  # fmt: skip
    assert "--store" in message


def test_any_data_source_and_a_flow_model(tmp_path):
    """Vector latents of an ArrayRecord file's images."""
    workdir = save(tmp_path / "flow", flow_config(model__encoder__vector=True))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    file = tmp_path / "x.array_record"
    write_array_record(str(file), [{"image": x, "label": i} for i, x in enumerate(images)])
    model = efae_jax.load(workdir)
    with model.config.unlocked():
        model.config.data.test_fraction = 0.0
    where = encode.make_source(model, f"array_record:{file}")
    made = Extractor(model, *where, tmp_path / "out", Settings(), batch_size=8)
    made.run()
    made.finish()
    found = Latents(tmp_path / "out")
    assert [found[i]["label"] for i in range(5)] == [0, 1, 2, 3, 4]
    z = np.stack([found[i]["latent"] for i in range(5)])
    np.testing.assert_allclose(z, model.encode(images), rtol=1e-4, atol=1e-5)
    assert found[2]["key"] == "x.array_record[2]"


# ---- mistakes


def test_other_settings_are_refused(model, images, plain, tmp_path):
    out = plain._files[0].parent

    def refused(**changes):
        message = error_of(extractor, model, images, out, **changes)
        assert "holds latents made otherwise" in message
        return message

    assert "sample: False there, True given" in refused(sample=True)
    assert "shards: 3 there, 2 given" in refused(shards=2)
    assert "data.size" in refused(size=8)
    other = folder_of_images(tmp_path / "other", [(20, 20)] * COUNT)
    assert "data.keys" in error_of(extractor, model, other, out)
    changed = efae_jax.load(save(tmp_path / "kl", conv_config(norm_eps=1e-5)))
    assert "model.config.norm_eps: 1e-06 there, 1e-05 given" in error_of(
        extractor, changed, images, out
    )


def test_mistakes_are_one_line(kl, model, images, tmp_path, capsys):
    def error(**changes):
        return error_of(extractor, model, images, tmp_path / "out", **changes)

    assert "--batch-size 6 must be a positive multiple of the 4" in error(batch_size=6, devices=4)
    assert "--format zip: allowed are array_record, npz" in error(format="zip")
    assert "--shards 12: allowed are 1 to the 11 images" in error(shards=12)
    assert "--shards 0: allowed are 1 to the 11 images" in error(shards=0)
    assert "multiples of 2; see --size" in error(size=7)
    assert "no such folder" in error_of(encode.make_source, model, str(tmp_path / "none"))
    assert "no image in" in error_of(encode.make_source, model, str(tmp_path))
    command = ["encode", "--model", str(kl), "--data", str(images), "--out", str(tmp_path / "o")]
    assert main([*command, "--split", "train"]) == 2
    assert "--test-fraction and --data-dir belong to --data SOURCE:PATH" in capsys.readouterr().err
    assert main([*command[:3], *command[5:]]) == 2
    assert "--data FOLDER or --data SOURCE:PATH names others" in capsys.readouterr().err
    message = error_of(encode.make_source, model, "glyph")
    assert "glyph: no such folder, nor SOURCE:PATH with SOURCE one of glyphs, folder" in message
    assert "no such folder" in error_of(encode.make_source, model, "folder")
    (tmp_path / "file").write_text("")
    assert "file" in error_of(extractor, model, images, tmp_path / "file")
    with pytest.raises(RunError, match=r"1 unreadable images .*3\.png"):
        extractor(model, images, tmp_path / "bad", max_bad=0).run()
    left = [path.name for path in (tmp_path / "bad").iterdir() if "array_record" in path.name]
    assert left == ["latents-00000-of-00003.array_record"]  # before that image, and nothing partial
    broken = folder_of_images(tmp_path / "broken", [(16, 16)] * 2, broken=[0, 1])
    made = extractor(model, broken, tmp_path / "none", shards=1)
    made.run()
    with pytest.raises(RunError, match="none of the 2 images could be read"):
        made.finish()


def test_the_record_says_in_which_type_it_was_computed(kl, images, tmp_path):
    """bfloat16 latents are not those of float32, whatever "auto" means where they are made."""
    auto, half = (efae_jax.load(kl, dtype=dtype) for dtype in ("auto", "bfloat16"))
    first = extractor(auto, images, tmp_path / "out")
    assert first.record["dtype"] == "float32"
    first.run()
    message = error_of(extractor, half, images, tmp_path / "out")
    assert "dtype: 'float32' there, 'bfloat16' given" in message


def test_a_deterministic_encoder_has_nothing_to_sample(images, tmp_path):
    aura = efae_jax.load(save(tmp_path / "aura", conv_config("aura")))
    message = error_of(extractor, aura, images, tmp_path / "out", sample=True)
    assert "--sample: the encoder is deterministic" in message


def test_a_latent_that_is_not_finite_names_its_image(kl, images, tmp_path):
    model = efae_jax.load(kl)
    model.params = jax.tree.map(lambda a: a * np.nan, model.params)
    with pytest.raises(RunError, match=r"the latent of .*cats/0\.png is not finite"):
        extractor(model, images, tmp_path / "out").run()


# ---- statistics


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([1e-4, 1.0, 300.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_streamed_statistics_are_numpys(parts, scale, seed):
    rng = np.random.default_rng(seed)
    numbers = [scale * (rng.standard_normal((n, 2, 3)) + [5, 0, -1]) for n in [*parts, 1]]
    joined, whole = ChannelStatistics(3), np.concatenate(numbers).reshape(-1, 3)
    for i, part in enumerate(numbers):
        if i % 2:
            joined.add(part)
        else:
            other = ChannelStatistics(3)
            other.add(part)
            joined.merge(ChannelStatistics.from_arrays(other.arrays()))
    np.testing.assert_allclose(joined.mean, whole.mean(0), rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(joined.std, whole.std(0), rtol=1e-10)
    assert joined.count == len(whole)
    fractions = [0, 0.1, 0.5, 0.9, 1]
    lower = np.quantile(whole, fractions, axis=0, method="inverted_cdf")
    upper = np.quantile(whole, fractions, axis=0, method="higher")
    low, high = np.minimum(lower, upper), np.maximum(lower, upper)
    found, bound = (
        joined.quantiles(fractions),
        2.5e-5 + 0.0025 * np.abs(high) + 0.0025 * np.abs(low),
    )
    assert (found >= low - bound).all()
    assert (found <= high + bound).all()
    np.testing.assert_array_equal(found[[0, -1]], [whole.min(0), whole.max(0)])


def test_quantiles_of_many_numbers_are_within_a_bin():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200_000, 2)) * [1, 20] + [0, 7]
    statistics = ChannelStatistics(2)
    statistics.add(x)
    fractions = [0.001, 0.05, 0.5, 0.95, 0.999]
    wanted = np.quantile(x, fractions, axis=0)
    bound = 0.0025 * np.abs(wanted) + 2.5e-5
    assert (np.abs(statistics.quantiles(fractions) - wanted) < bound).all()
    pooled = np.quantile(x, fractions)
    assert (
        np.abs(statistics.pooled_quantiles(fractions) - pooled) < 0.003 * abs(pooled) + 1e-3
    ).all()
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(np.array([[np.nan, 0]]))
