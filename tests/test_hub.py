"""Hub ids and addresses: which files are fetched, online or from the cache; one line for failures.

Nothing is downloaded: a stand-in for huggingface_hub lists and gives the files of a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors
from weights import error_of

from efae_jax.convert import hub, sources, taesd
from efae_jax.convert.model import Options, Source
from efae_jax.models.taesd import VARIANTS

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = {"encoder.mid_block.x": np.zeros(1, np.float32)}
MODEL = safetensors.numpy.save(NAMES)
HALF = safetensors.numpy.save({"0.weight": np.zeros((1, 3, 1, 1), np.float32)})
OTHER_HALF = safetensors.numpy.save({"1.weight": np.zeros((1, 4, 1, 1), np.float32)})
KL = json.dumps({"_class_name": "AutoencoderKL"}).encode()


def http(kind, code=404):
    response = SimpleNamespace(status_code=code, headers={}, request=None)
    return kind("it went wrong", response=response)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A repository of these files; returns what was downloaded.

    With `fails`, the hub answers so and only `cached` files are there.
    """

    def make(files, fails=None, cached=(), download_fails=None):
        asked = []
        root = tmp_path / "hub"
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(files[name])

        def info(self, repository, revision=None, timeout=None):
            if fails is not None:
                raise fails
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in files])

        def download(repository, name, revision=None, local_files_only=False):
            assert repository == "owner/name"
            if local_files_only and name not in cached:
                raise errors.LocalEntryNotFoundError("not in the cache")
            if download_fails is not None and not local_files_only:
                raise download_fails
            asked.append(name if revision is None else f"{revision}:{name}")
            return str(root / name)

        def snapshot(repository, revision=None, local_files_only=False):
            assert local_files_only
            if not cached:
                raise errors.LocalEntryNotFoundError("not in the cache")
            for name in files.keys() - set(cached):
                (root / name).unlink()
            return str(root)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return asked

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stabilityai/sd-vae-ft-ema", True),
        ("fal/AuraEquiVAE/vae_epoch_3_step_49501_bf16.pt", True),
        ("owner/name/a folder/file (1).pt", True),
        ("a.b/c-d_e", True),
        ("model.pt", False),
        ("/absolute/path", False),
        ("./runs/model", False),
        ("../runs", False),
        ("owner/name/../../x", False),
        ("~/runs", False),
        ("a b/c", False),
        ("owner/", False),
    ],
)
def test_the_form_of_an_id(text, expected):
    assert hub.is_id(text) is expected


@pytest.mark.parametrize(
    ("text", "inside", "revision"),
    [
        ("owner/name", "", None),
        ("owner/name/vae/", "vae", None),
        ("https://huggingface.co/owner/name", "", None),
        ("https://huggingface.co/owner/name/", "", None),
        ("HTTPS://HuggingFace.co/owner/name", "", None),
        ("http://hf.co/owner/name/tree/main", "", None),
        ("https://huggingface.co/owner/name/tree/main/vae", "vae", None),
        ("https://huggingface.co/owner/name/tree/fp16/vae", "vae", "fp16"),
        ("https://huggingface.co/owner/name/blob/main/a/x.ckpt", "a/x.ckpt", None),
        ("https://huggingface.co/owner/name/resolve/main/x.pt?download=true", "x.pt", None),
        ("https://huggingface.co/owner/name/resolve/refs%2Fpr%2F1/x.pt", "x.pt", "refs/pr/1"),
        ("https://huggingface.co/owner/name/raw/0123abc/a%20b.pt", "a b.pt", "0123abc"),
        ("hf://owner/name", "", None),
        ("hf://owner/name/vae/x.pt", "vae/x.pt", None),
        ("hf://owner/name@fp16/vae", "vae", "fp16"),
        ("hf://models/owner/name", "", None),
    ],
)
def test_addresses_are_ids(text, inside, revision):
    assert hub.parse(text) == hub.Address("owner/name", inside, revision)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/owner/name/x.safetensors",
        "https://civitai.com/api/download/models/1",
        "https://github.com/owner/name",
        "https://huggingface.co/owner",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/discussions/1",
        "https://",
        "hf://",
        "hf://datasets/owner/name",
        "s3://bucket/x.safetensors",
    ],
)
def test_other_addresses_are_refused_as_they_were_given(text):
    message = error_of(sources.read_source, text)
    assert message.startswith(text)
    assert "download the file first" in message or "allowed: https://huggingface.co/" in message


FLUX = {
    "README.md": b"",
    "model_index.json": b"{}",
    "flux1-dev.safetensors": b"",
    "transformer/config.json": b"{}",
    f"transformer/{WEIGHTS}": b"",
    "vae/config.json": KL,
    f"vae/{WEIGHTS}": MODEL,
}
ANOTHER = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
# files of a repository, what is named there, what is fetched
CASES = {
    "plain": ({"config.json": KL, WEIGHTS: MODEL, "README.md": b""}, "", ["config.json", WEIGHTS]),
    "pickle too": (
        {"config.json": KL, WEIGHTS: MODEL, "diffusion_pytorch_model.bin": b""},
        "",
        ["config.json", WEIGHTS],
    ),
    "fp16 alone": (
        {"config.json": KL, "diffusion_pytorch_model.fp16.safetensors": MODEL},
        "",
        ["config.json", "diffusion_pytorch_model.fp16.safetensors"],
    ),
    "bin alone": (
        {"config.json": KL, "diffusion_pytorch_model.bin": MODEL},
        "",
        ["config.json", "diffusion_pytorch_model.bin"],
    ),
    "pipeline": (FLUX, "", ["vae/config.json", f"vae/{WEIGHTS}"]),
    "folder": (FLUX, "/vae", ["vae/config.json", f"vae/{WEIGHTS}"]),
    "file": (FLUX, f"/vae/{WEIGHTS}", ["vae/config.json", f"vae/{WEIGHTS}"]),
    "deep folder": (
        {"a/b/config.json": KL, f"a/b/{WEIGHTS}": MODEL},
        "/a/b",
        ["a/b/config.json", f"a/b/{WEIGHTS}"],
    ),
    "another's config": (
        {**FLUX, "config.json": ANOTHER, "model.safetensors": b""},
        "",
        ["config.json", "vae/config.json", f"vae/{WEIGHTS}"],
    ),
    "file at the root": (
        {"config.json": KL, WEIGHTS: MODEL},
        f"/{WEIGHTS}",
        ["config.json", WEIGHTS],
    ),
}


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_the_same_online_and_from_the_cache(repository, case, online):
    """Of a cache that holds no more than what was fetched, the same is found."""
    files, inside, expected = CASES[case]
    asked = repository(files, fails=None if online else OSError("no route"), cached=expected)
    source = sources.read_source(f"owner/name{inside}")
    assert source.tensors.keys() == NAMES.keys()
    assert source.config == {"_class_name": "AutoencoderKL"}
    assert source.name == f"owner/name{inside}"
    assert sorted(set(asked)) == (sorted(expected) if online else [])


@pytest.mark.parametrize("case", CASES)
def test_a_folder_here_is_searched_like_a_repository(case, tmp_path):
    files, inside, _ = CASES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source = sources.read_source(f"{tmp_path}{inside}")
    assert source.tensors.keys() == NAMES.keys()
    assert source.config == {"_class_name": "AutoencoderKL"}


def test_of_another_model_no_weights_are_fetched(repository):
    asked = repository({"config.json": ANOTHER, "model.safetensors": b""})
    message = error_of(sources.read_source, "owner/name")
    assert "config.json is of ['LlamaForCausalLM'], which is no autoencoder" in message
    assert asked == ["config.json"]


def test_a_revision_is_asked_for(repository):
    asked = repository({"x.safetensors": MODEL})
    sources.read_source("https://huggingface.co/owner/name/blob/fp16/x.safetensors")
    assert asked == ["fp16:x.safetensors"]


def test_a_path_that_is_there_is_no_id(repository, tmp_path, monkeypatch):
    asked = repository({"config.json": KL, WEIGHTS: MODEL})
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "holds neither config.json" in error_of(sources.read_source, "owner/name")
    assert not asked


@pytest.mark.parametrize(
    ("files", "inside", "expected"),
    [
        ({}, "", "name the file: the repository does not hold config.json; no weights are there"),
        ({"a/b.ckpt": b""}, "", "weights there: a/b.ckpt"),
        (
            {"config.json": KL},
            "",
            f"holds config.json, but no weights beside it: neither {WEIGHTS}",
        ),
        (
            {"config.json": KL, WEIGHTS: b""},
            "/a.pt",
            f"does not hold a.pt; weights there: {WEIGHTS}",
        ),
        ({WEIGHTS: b""}, "/vae", "does not hold vae"),
    ],
)
def test_files_that_are_not_there_are_named(repository, files, inside, expected):
    repository(files)
    message = error_of(sources.read_source, f"owner/name{inside}")
    assert message.startswith("owner/name")
    assert expected in message


FAILURES = [
    (http(errors.RepositoryNotFoundError), "no such path here, and no such repository"),
    (http(errors.RevisionNotFoundError), "no such branch"),
    (http(errors.GatedRepoError, 403), "hf auth login"),
    (http(errors.HfHubHTTPError, 503), "the hub fails (HTTP status 503)"),
    (http(errors.HfHubHTTPError, 429), "the hub fails (HTTP status 429)"),
    (errors.HFValidationError("x"), "no id that the hub allows"),
    (OSError("no route\nto host"), "the hub cannot be reached"),
    (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached"),
    (ValueError("x"), "the hub cannot be reached"),
]


@pytest.mark.parametrize(("failure", "expected"), FAILURES)
@pytest.mark.parametrize("listed", [False, True])
def test_failures_are_one_line(repository, failure, expected, listed):
    files = {"config.json": KL, WEIGHTS: MODEL}
    repository(files, **{"download_fails" if listed else "fails": failure})
    message = error_of(sources.read_source, "owner/name")
    assert message.startswith("owner/name: ")
    assert expected in message


def test_what_the_hub_refuses_is_not_taken_from_the_cache(repository):
    asked = repository(
        {"config.json": KL, WEIGHTS: MODEL},
        fails=http(errors.GatedRepoError, 403),
        cached=("config.json", WEIGHTS),
    )
    error_of(sources.read_source, "owner/name")
    assert not asked


def test_a_network_that_fails_between_files(repository):
    files = {"config.json": KL, WEIGHTS: MODEL}
    repository(files, download_fails=OSError("gone"), cached=files)
    assert sources.read_source("owner/name").tensors.keys() == NAMES.keys()


def test_of_a_cache_without_the_weights_the_message_says_so(repository):
    repository({"config.json": KL, WEIGHTS: MODEL}, fails=OSError(), cached=("config.json",))
    message = error_of(sources.read_source, "owner/name")
    assert "hub cannot be reached, and its cache here does not hold" in message


@pytest.mark.parametrize("endings", [(".pth", ".pth"), (".safetensors", ".pth")])
def test_of_taesds_two_files_the_other_one_is_fetched_too(repository, endings):
    files = {
        f"a/taef2_encoder{endings[0]}": HALF,
        f"a/taef2_decoder{endings[1]}": OTHER_HALF,
    }
    for named in files:
        asked = repository(files)
        source = sources.read_source(f"owner/name/{named}")
        assert sorted(asked) == sorted(files)
        assert source.tensors.keys() == {"encoder.0.weight", "decoder.1.weight"}
    assert sources.read_source("owner/name/a").tensors.keys() == source.tensors.keys()


def test_one_half_of_taesd_is_read_alone(repository):
    repository({"taesd_encoder.pth": HALF})
    for inside in ("", "/taesd_encoder.pth"):
        source = sources.read_source(f"owner/name{inside}")
        assert source.tensors.keys() == {"encoder.0.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/taesdxl", "taesdxl"),
        ("owner/taesd", "taesd"),
        ("owner/taesdxl/taesd_encoder.pth", "taesd"),
        ("owner/taesd/taesdxl_encoder.pth", "taesdxl"),
        ("owner/TAESDXL/diffusion.pth", "taesdxl"),
        ("taesdxl_encoder.pth", "taesdxl"),
    ],
)
def test_the_variant_comes_from_the_id_or_the_file(name, expected):
    source = Source(Path("snapshots/0123"), {}, None, None, Path("none"), name)
    assert taesd.choose_variant(VARIANTS["taesd"], source, Options()) == (expected, [])
