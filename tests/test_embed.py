"""`embed`: latents with embeddings on disk, whole and resumed; the prediction; the mistakes."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Sequence
from random import Random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from saved_models import conv_config, folder_of_images, save
from weights import error_of

import efae_jax
from efae_jax import extract
from efae_jax.__main__ import main
from efae_jax.data.captioned_glyphs import CaptionedGlyphs, captions, shape_vector, style_vector
from efae_jax.data.captions import open_captioned
from efae_jax.data.pairs import Pairs
from efae_jax.data.splits import is_held_out
from efae_jax.data.transforms import Transform
from efae_jax.embed import command, embed, shards
from efae_jax.embed.command import Settings
from efae_jax.embed.prediction import LeastSquares, same_space
from efae_jax.embed.shards import EmbeddingShards
from efae_jax.embedders import Captioned
from efae_jax.errors import RunError

COUNT, DAMAGED, SILENT = 14, 3, 7
READABLE = [i for i in range(COUNT) if i not in (DAMAGED, SILENT)]
FRACTION = 0.4


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "kl", conv_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images 00.png, ..., with one to three captions each. One is damaged, one has no captions."""
    root = tmp_path_factory.mktemp("images") / "some"
    folder_of_images(root, [(20, 30 - i) for i in range(COUNT)], broken=[DAMAGED])
    for i in range(COUNT):
        (root / f"{i}.png").rename(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text("".join(f"{text}\n" for text in texts_of(i)))
    (root / f"{SILENT:02}.txt").write_text("\n")
    return root


def texts_of(i):
    return [f"caption {n} of {i}" for n in range(1 + i % 3)]


class Texts:
    """Unit rows that depend on nothing but the caption."""

    name, space, dimension = "texts", "space of texts", 3

    def __call__(self, examples: Sequence[Captioned]) -> list[np.ndarray]:
        return [np.stack([self.row(text) for text in e.captions]) for e in examples]

    def row(self, text):
        row = np.random.default_rng(list(text.encode())).standard_normal(self.dimension)
        return np.float32(row / np.linalg.norm(row))


class Images:
    """The mean colours, of unit length; the user stops it at the image `last`."""

    name, space, dimension, needs_image = "images", "space of images", 3, True
    last = None

    def __call__(self, examples: Sequence[Captioned]) -> np.ndarray:
        if any(e.key == self.last for e in examples):
            raise KeyboardInterrupt
        return np.stack([self.row(e.image) for e in examples])

    def row(self, image):
        colour = np.asarray(image, np.float64).mean(axis=(0, 1))
        return np.float32(colour / np.linalg.norm(colour))


load = functools.cache(efae_jax.load)  # loading takes longer than all the rest


@pytest.fixture
def loaded(monkeypatch):
    """A model is loaded once."""
    monkeypatch.setattr(command, "load", lambda source, **_: load(source))


@pytest.fixture
def embedders(loaded, monkeypatch):
    """The embedders above, whatever is asked for; a test may change them."""
    found = (Texts(), Images())
    monkeypatch.setattr(command, "make_embedders", lambda **_: found)
    return found


def made(kl, folder, out, **changes):
    options = {"test_fraction": FRACTION, "shards": 3, "batch_size": 2} | changes
    embed(kl, out, Settings(str(folder), **options))
    return Pairs(out)


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def plain(kl, folder, tmp_path_factory):
    """The folder that the tests below compare with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_embedders", lambda **_: (Texts(), Images()))
        return made(kl, folder, tmp_path_factory.mktemp("pairs") / "plain")


def latents_of(kl, folder, numbers):
    model, transform = load(kl), Transform((16, 16))
    x = [transform((folder / f"{i:02}.png").read_bytes(), Random(0)) for i in numbers]
    return model.normalise(model.encode(np.stack(x)))


# ---- what is written


def test_pairs_hold_what_model_and_embedders_give(kl, folder, plain):
    assert len(plain) == len(READABLE)
    records = [plain[i] for i in range(len(plain))]
    assert [r["key"] for r in records] == [f"{i:02}.png" for i in READABLE]
    assert [r["index"] for r in records] == READABLE
    assert [r["texts"] for r in records] == [texts_of(i) for i in READABLE]
    latents = np.stack([r["latent"] for r in records])
    assert latents.dtype == np.float32
    wanted = latents_of(kl, folder, READABLE)
    np.testing.assert_allclose(latents, wanted, rtol=1e-4, atol=1e-5)
    for record in records:
        for row, text in zip(record["captions"], record["texts"], strict=True):
            np.testing.assert_array_equal(row, Texts().row(text))
        image = shards.read_picture((folder / record["key"]).read_bytes())
        np.testing.assert_array_equal(record["image"], Images().row(image))
        assert record["captions"].dtype == record["image"].dtype == np.float32


def test_the_record_says_what_was_made_of_what(kl, folder, plain):
    s = plain.summary
    assert (s["images"], s["captions"]) == (len(READABLE), sum(1 + i % 3 for i in READABLE))
    assert s["held_out"] == sum(is_held_out(f"{i:02}.png", FRACTION) for i in READABLE)
    assert s["test_fraction"] == FRACTION
    assert s["text"] == {"name": "texts", "space": "space of texts", "dimension": 3}
    assert s["image"] == {"name": "images", "space": "space of images", "dimension": 3}
    assert s["embeddings"] == s["latents"]["shards"] == [3, 4, 5]
    assert s["latents"]["shape"] == [8, 8, 4]
    assert s["latents"]["normalised"]
    assert s["latents"]["model"]["sha256"] == load(kl).identity["sha256"]
    assert s["model_source"] == str(kl)
    assert s["data"]["source"] == str(folder)
    assert s["data"]["images"] == COUNT
    assert "least-squares" in s["style"]


def test_nothing_but_named_files_is_left(plain):
    shards = [f"0000{i}-of-00003" for i in range(3)]
    assert {path.name for path in plain.folder.iterdir()} == {
        "pairs.json", "pairs.npz", "latents.json", "settings.json", "embedding-settings.json",
        *(f"latents-{s}.array_record" for s in shards),
        *(f"latents-{s}.statistics.npz" for s in shards),
        *(f"embeddings-{s}.array_record" for s in shards),
        *(f"embeddings-{s}.indices.npy" for s in shards),
    }  # fmt: skip


def test_the_prediction_is_fitted_to_training_pairs_only(plain):
    t, i = [], []
    for record in (plain[i] for i in range(len(plain))):
        if not is_held_out(record["key"], FRACTION):
            t += list(record["captions"])
            i += [record["image"]] * len(record["captions"])
    A, b = lstsq(np.stack(t), np.stack(i))
    np.testing.assert_allclose(plain.prediction.matrix, A, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(plain.prediction.offset, b, rtol=1e-4, atol=1e-6)


def test_the_means_are_of_the_training_pairs(plain):
    """Each image counts once, however many captions it has."""
    records = [r for r in records_of(plain) if not is_held_out(r["key"], FRACTION)]
    text = np.stack([r["captions"].mean(axis=0) for r in records])
    style = np.stack([r["image"] for r in records])
    style = style - text @ plain.prediction.matrix - plain.prediction.offset
    np.testing.assert_allclose(plain.means["caption"], text.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(plain.means["style"], style.mean(axis=0), rtol=0, atol=1e-6)


def lstsq(t, i):
    """Of all least-squares solutions that of the smallest A, whatever the offset."""
    t, i = np.asarray(t, np.float64), np.asarray(i, np.float64)
    A = np.linalg.lstsq(t - t.mean(0), i - i.mean(0), rcond=1e-6)[0]
    return A, i.mean(0) - t.mean(0) @ A


def test_what_one_half_lacks_is_left_out_and_the_others_stay_together(
    kl, folder, plain, tmp_path, embedders, monkeypatch
):
    """Here the embedder cannot read images 0 and 10, which the encoder can."""
    original, bad = shards.read_picture, {(folder / f"{i}.png").read_bytes() for i in ("00", "10")}

    def read(image, **options):
        if image in bad:
            raise OSError("unreadable here")
        return original(image, **options)

    monkeypatch.setattr(shards, "read_picture", read)
    monkeypatch.setattr(shards, "BLOCK", 2)
    found = made(kl, folder, tmp_path / "pairs")
    assert [r["index"] for r in records_of(found)] == [i for i in READABLE if i not in (0, 10)]
    assert found.summary["embeddings"] == [2, 4, 4]
    assert found.summary["latents"]["shards"] == [3, 4, 5]
    there = {r["key"]: r for r in records_of(plain)}
    for record in records_of(found):
        for name in ("latent", "captions", "image"):
            np.testing.assert_array_equal(record[name], there[record["key"]][name])


def records_of(pairs):
    return [pairs[i] for i in range(len(pairs))]


def test_images_that_nothing_looks_at_may_be_damaged_for_the_embeddings(
    kl, folder, tmp_path, embedders
):
    """Then the encoder alone leaves them out."""
    embedders[1].needs_image = False
    embedders[1].row = lambda image: np.float32([1, 0, 0]) if image is None else None
    found = made(kl, folder, tmp_path / "pairs")
    assert [r["index"] for r in records_of(found)] == READABLE
    assert sum(found.summary["embeddings"]) == len(READABLE) + 1
    np.testing.assert_array_equal(found[5]["image"], [1, 0, 0])


def test_what_is_too_large_for_the_encoder_is_not_embedded(tmp_path, monkeypatch):
    """Without a look at Pillow's own limit, which the threads that read share."""
    root = folder_of_images(tmp_path / "images", [(20, 20)] * 2)
    Image.new("1", (9000, 9000)).save(root / "1.png")
    for i in range(2):
        (root / f"{i}.txt").write_text("a caption")
    before, limits, original = Image.MAX_IMAGE_PIXELS, set(), Image.open

    def opened(*args, **options):
        limits.add(Image.MAX_IMAGE_PIXELS)
        return original(*args, **options)

    monkeypatch.setattr(Image, "open", opened)
    source = open_captioned(str(root), size=(16, 16))
    made = EmbeddingShards(source, Texts(), Images(), {}, tmp_path, 1)
    made.run()
    assert made.indices()[0].tolist() == [0]
    assert limits | {Image.MAX_IMAGE_PIXELS} == {before}


# ---- from the command line


def test_the_built_in_images_by_the_command(kl, tmp_path, capsys):
    out, count = tmp_path / "pairs", 40
    given = ["embed", "--model", str(kl), "--data", "captioned_glyphs", "--num-images", str(count)]
    given += ["--text", "one_hot", "--image", "one_hot", "--out", str(out), "--batch-size", "2"]
    assert main([*given, "--test-fraction", "0.25"]) == 0
    pairs, printed = Pairs(out), capsys.readouterr().out
    assert f"40 latents of 8x8x4 with 200 captions, {pairs.summary['held_out']} of" in printed
    source = CaptionedGlyphs("train", count, (16, 16))
    assert len(pairs) == count
    t, i = [], []
    for number, record in enumerate(records_of(pairs)):
        f = source[number]["factors"]
        assert tuple(record["texts"]) == captions(number) == source[number]["captions"]
        shape, style = shape_vector(f), style_vector(f)
        np.testing.assert_array_equal(record["captions"], np.tile(shape, (5, 1)))
        both = np.concatenate([shape, style / np.linalg.norm(style)]) / np.sqrt(2)
        np.testing.assert_allclose(record["image"], both, rtol=1e-6, atol=1e-7)
        assert record["key"] == source.key(number)
        if not is_held_out(record["key"], 0.25):
            t.append(shape)
            i.append(both)
    model = load(kl)
    x = np.stack([np.asarray(source[number]["image"]) for number in range(count)])
    z = model.normalise(model.encode(x))
    np.testing.assert_allclose(
        np.stack([r["latent"] for r in records_of(pairs)]), z, rtol=1e-4, atol=1e-5
    )
    # One-hot captions and an offset leave A undetermined: of all solutions the smallest.
    A, b = lstsq(t, i)
    np.testing.assert_allclose(pairs.prediction.matrix, A, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pairs.prediction.offset, b, rtol=1e-4, atol=1e-6)
    # What is expected of a shape that was seen is the mean of its images.
    kinds = np.argmax(t, axis=1)
    for kind in set(kinds):
        expected = pairs.prediction.matrix[kind] + pairs.prediction.offset
        mean = np.mean([v for v, k in zip(i, kinds, strict=True) if k == kind], axis=0)
        np.testing.assert_allclose(expected, mean, atol=1e-6)


def test_embeddings_of_ones_own(kl, folder, tmp_path, capsys, loaded):
    rng = np.random.default_rng(0)
    text, image = rng.standard_normal((COUNT, 2, 5)), rng.standard_normal((COUNT, 5))
    counts = 1 + np.arange(COUNT) % 2
    keys = np.array([f"{i:02}.png" for i in range(COUNT)])
    file = tmp_path / "own.npz"
    np.savez(file, keys=keys, text=text, image=image, counts=counts)
    given = ["embed", "--model", str(kl), "--data", f"folder:{folder}", "--embeddings", str(file)]
    given += ["--test-fraction", str(FRACTION), "--batch-size", "2"]
    assert main([*given, "--out", str(tmp_path / "joint"), "--one-space"]) == 0
    pairs = Pairs(tmp_path / "joint")
    assert [r["index"] for r in records_of(pairs)] == READABLE
    for record in records_of(pairs):
        i = record["index"]
        rows = text[i, : counts[i]]
        np.testing.assert_allclose(
            record["captions"], rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6
        )
        np.testing.assert_allclose(record["image"], image[i] / np.linalg.norm(image[i]), rtol=1e-6)
    # In a joint space what an image has beyond its caption is CLIP's difference, to the bit.
    for name, wanted in zip(("matrix", "offset"), (np.eye(5), np.zeros(5)), strict=True):
        np.testing.assert_array_equal(getattr(pairs.prediction, name), wanted)
    assert pairs.summary["style"] == "the image's embedding less the caption's"
    capsys.readouterr()

    # The same numbers in two spaces are other embeddings.
    assert main([*given, "--out", str(tmp_path / "joint")]) == 2
    one_line(capsys, "holds embeddings made otherwise", "text.space")
    np.savez(file, keys=keys[1:], text=text[1:], image=image[1:])
    assert main([*given, "--out", str(tmp_path / "other")]) == 2
    one_line(capsys, "has no embeddings of '00.png'")


def one_line(capsys, *parts):
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    for part in parts:
        assert part in printed


def test_mistakes_are_one_line(kl, folder, tmp_path, capsys, loaded):
    out = tmp_path / "pairs"

    def refused(*parts, data=str(folder), **changes):
        options = {"--embeddings": "none.npz", **changes}
        given = ["--data", data, *(word for pair in options.items() for word in pair)]
        assert main(["embed", "--model", str(kl), "--out", str(out), *given]) == 2
        one_line(capsys, *parts)

    refused("--test-fraction 1.0: it must be between 0 and 1", **{"--test-fraction": "1"})
    refused("--test-fraction nan", **{"--test-fraction": "nan"})
    refused("0 of the 14 images would be held out", **{"--test-fraction": "1e-9"})
    assert not out.exists()
    refused("multiples of 2; see --size", **{"--size": "7"})
    refused("--embeddings and --text and --image exclude each other", **{"--text": "minilm"})
    (tmp_path / "file").write_text("")
    assert "--out" in error_of(made, kl, folder, tmp_path / "file")


def test_too_many_unreadable_images_end_the_run(kl, folder, tmp_path, embedders):
    with pytest.raises(RunError, match=r"1 unreadable images are more than --max-bad 0.*03\.png"):
        made(kl, folder, tmp_path / "pairs", max_bad=0)
    assert not any("embeddings-" in name for name in files(tmp_path / "pairs"))


# ---- stopped and started again


def test_the_same_command_goes_on_to_the_same_bytes(
    kl, folder, plain, tmp_path, embedders, monkeypatch, capsys
):
    out = tmp_path / "pairs"

    def stopped():
        given = {"model": kl, "data": folder, "out": out, "shards": 3, "batch-size": 2}
        given["test-fraction"] = FRACTION
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        assert main(["embed", *words]) == 130
        assert "the same command goes on" in capsys.readouterr().err
        there = files(out)
        complete = sorted(name for name in there if name.endswith(".array_record"))
        assert all(there[name] == wanted[name] for name in complete)  # nothing is half written
        assert not any("partial" in name for name in there)
        assert "pairs.json" not in there
        return complete

    wanted = files(plain.folder)
    embedders[1].last = "09.png"  # of the third shard
    assert [name[:16] for name in stopped()] == ["embeddings-00000", "embeddings-00001"]
    assert error_of(Pairs, out).count("holds no pairs.json") == 1
    written = (out / "embeddings-00000-of-00003.array_record").stat().st_mtime_ns

    embedders[1].last = None
    original = extract.write_shard

    def interrupted(path, records, form):
        if "00001" not in path.name:
            return original(path, records, form)

        def some():
            yield next(records)
            raise KeyboardInterrupt

        return original(path, some(), form)

    with monkeypatch.context() as patch:
        patch.setattr(extract, "write_shard", interrupted)
        assert [name[:16] for name in stopped()[-2:]] == ["embeddings-00002", "latents-00000-of"]
    embedders[1].last = "00.png"  # all embeddings are there: none is made again
    assert len(made(kl, folder, out)) == len(plain)
    assert files(out) == wanted
    assert (out / "embeddings-00000-of-00003.array_record").stat().st_mtime_ns == written


def test_processes_share_out_the_shards(folder, plain, tmp_path):
    source = open_captioned(str(folder), size=(16, 16))
    for process, count in ((1, 1), (0, 3)):
        made = EmbeddingShards(source, Texts(), Images(), {}, tmp_path, 3)
        made.run(process, 2)
        assert len(list(tmp_path.glob("*.array_record"))) == count
        if process:
            with pytest.raises(RunError, match="lacks 2 of 3 embedding shards"):
                made.indices()
    assert np.concatenate(made.indices()).tolist() == READABLE
    for name in ("embeddings-00001-of-00003.array_record", "embeddings-00002-of-00003.indices.npy"):
        assert files(tmp_path)[name] == files(plain.folder)[name]


def test_a_part_of_a_file_does_not_pass_for_it(kl, folder, plain, tmp_path, embedders, monkeypatch):
    """A shard without its indices, as no run leaves it, is made again."""
    out = tmp_path / "pairs"
    out.mkdir()
    for name, content in files(plain.folder).items():
        if name != "embeddings-00001-of-00003.indices.npy":
            (out / name).write_bytes(content)
    (out / "embeddings-00001-of-00003.array_record").write_bytes(b"half")
    seen = []
    embedders[1].row = lambda image: seen.append(image) or Images.row(None, image)
    made(kl, folder, out)
    assert len(seen) == 4  # of one shard
    assert files(out) == files(plain.folder)


def test_another_share_held_out_joins_anew(kl, folder, plain, tmp_path, embedders, monkeypatch):
    out = tmp_path / "pairs"
    out.mkdir()
    for name, content in files(plain.folder).items():
        (out / name).write_bytes(content)
    embedders[1].last = "00.png"  # no embedding is made again
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made(kl, folder, out, test_fraction=0.2)
    assert "holds no pairs.json" in error_of(Pairs, out)  # the old one would say 0.4
    found = made(kl, folder, out, test_fraction=0.2)
    assert found.summary["test_fraction"] == 0.2
    assert found.summary["held_out"] < plain.summary["held_out"]
    assert np.abs(found.prediction.matrix - plain.prediction.matrix).max() > 1e-3
    same = [name for name in files(out) if not name.startswith("pairs.")]
    assert all(files(out)[name] == files(plain.folder)[name] for name in same)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_what_was_made_otherwise_is_refused(kl, folder, plain, tmp_path, embedders):
    before = files(plain.folder)
    embedders[0].name = "others"
    message = error_of(made, kl, folder, plain.folder)
    assert "embeddings made otherwise (text.name: 'texts' there, 'others' given)" in message
    embedders[0].name = "texts"
    other = folder_of_images(tmp_path / "other", [(20, 20)] * COUNT)
    for i in range(COUNT):
        (other / f"{i}.txt").write_text("a caption")
    assert "data.keys" in error_of(made, kl, other, plain.folder)
    changed = save(tmp_path / "kl", conv_config(norm_eps=1e-5))
    message = error_of(made, changed, folder, plain.folder)
    assert "model.config.norm_eps: 1e-06 there, 1e-05 given" in message
    assert files(plain.folder) == before


def test_nothing_is_refused_for_the_sake_of_a_run_that_made_nothing(
    kl, folder, tmp_path, embedders
):
    embedders[1].last = "00.png"
    with pytest.raises(KeyboardInterrupt):
        made(kl, folder, tmp_path / "pairs")
    embedders[1].last, embedders[0].name = None, "others"
    assert made(kl, folder, tmp_path / "pairs", shards=1).summary["text"]["name"] == "others"


def test_few_captions_for_least_squares_are_warned_of(kl, folder, tmp_path, embedders, caplog):
    made(kl, folder, tmp_path / "few", shards=1, num_images=4, test_fraction=0.5)
    assert "captions are few to predict images from 3 numbers" in caplog.text


def test_latents_may_be_samples(kl, folder, plain, tmp_path, embedders):
    found = made(kl, folder, tmp_path / "pairs", sample=True, seed=5)
    assert (found.summary["latents"]["sample"], found.summary["latents"]["seed"]) == (True, 5)
    for ours, mode in zip(records_of(found), records_of(plain), strict=True):
        assert np.abs(ours["latent"] - mode["latent"]).max() > 0.01


# ---- what is in memory


def test_autoencoder_and_embedders_are_in_memory_one_after_the_other(
    kl, folder, tmp_path, monkeypatch
):
    weights, embedders, seen = [], [], []

    def watched(*args, **options):
        model = efae_jax.load(*args, **options)
        weights.append([weakref.ref(leaf) for leaf in jax.tree.leaves(model.params)])
        return model

    class Watching(Images):
        def __call__(self, examples):
            seen.append("embedding")
            assert [ref() for ref in weights[0]] == [None] * len(weights[0])
            return super().__call__(examples)

    def make(**_):
        found = Texts(), Watching()
        embedders.extend(weakref.ref(embedder) for embedder in found)
        return found

    def encode(self, *args):
        seen.append("encoding")
        assert [ref() for ref in embedders] == [None, None]
        return original(self, *args)

    original = extract.Extractor.run
    monkeypatch.setattr(command, "load", watched)
    monkeypatch.setattr(command, "make_embedders", make)
    monkeypatch.setattr(extract.Extractor, "run", encode)
    made(kl, folder, tmp_path / "pairs", shards=1)
    assert seen == ["embedding", "encoding"]
    assert len(weights) == 2


# ---- the prediction


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_least_squares_are_numpys(images, text, image, one_hot, seed):
    rng = np.random.default_rng(seed)
    fit, t, i = LeastSquares(text, image), [], []
    for number in range(images):
        rows = rng.standard_normal((1 + number % 3, text)) + 2
        if one_hot:
            rows = np.eye(text)[rng.integers(0, text, len(rows))]
        target = rng.standard_normal(image)
        fit.add(rows.astype(np.float32), target.astype(np.float32))
        t.append(rows.astype(np.float32))
        i += [target.astype(np.float32)] * len(rows)
    A, b = lstsq(np.concatenate(t), np.stack(i))
    found = fit.solve()
    size = max(np.abs(A).max(), 1)
    np.testing.assert_allclose(found.matrix, A, rtol=0, atol=2e-5 * size)
    np.testing.assert_allclose(found.offset, b, rtol=0, atol=1e-4 * size)
    assert found.matrix.dtype == found.offset.dtype == np.float32


def test_an_exact_relation_is_found_from_more_than_enough_and_from_too_few():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((4, 6)), rng.standard_normal(6)
    for count in (50, 3):
        fit, t = LeastSquares(4, 6), 100 + rng.standard_normal((count, 4))
        t[:, 0] *= 1e-2  # little tells, too
        for row in t:
            fit.add(row[None], row @ A + b)
        found = fit.solve()
        np.testing.assert_allclose(t @ found.matrix + found.offset, t @ A + b, atol=1e-4)
        if count == 50:
            np.testing.assert_allclose(found.matrix, A, atol=1e-6)
            np.testing.assert_allclose(found.offset, b, atol=1e-4)


def test_in_one_space_the_difference_is_left():
    prediction = same_space(4)
    rng = np.random.default_rng(0)
    t, i = rng.standard_normal((2, 7, 4)).astype(np.float32)
    np.testing.assert_array_equal(i - (t @ prediction.matrix + prediction.offset), i - t)


def test_summaries_are_json(plain):
    assert json.loads((plain.folder / "pairs.json").read_text()) == plain.summary
