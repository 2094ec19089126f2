"""Hub ids: which files are fetched, and one line for all that goes wrong. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

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


class Response:
    """What an HTTP error carries."""

    headers: dict = {}  # noqa: RUF012
    request = None
    status_code = 404


def http(kind, code=404):
    response = Response()
    response.status_code = code
    return kind("it went wrong", response=response)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A repository of these files; returns what was downloaded."""

    def make(*files, fails=None, online=True, content=b"{}"):
        asked = []

        def check(url):
            if fails is not None:
                raise fails
            if url not in files:
                raise http(errors.RemoteEntryNotFoundError)

        def download(name, file, local_files_only=False):
            if local_files_only and not online:
                raise errors.LocalEntryNotFoundError("not in the cache")
            asked.append((name, file))
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return str(path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda name, file: file)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", check)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stabilityai/sd-vae-ft-ema", True),
        ("fal/AuraEquiVAE/vae_epoch_3_step_49501_bf16.pt", True),
        ("a.b/c-d_e", True),
        ("model.pt", False),
        ("/absolute/path", False),
        ("./runs/model", False),
        ("../runs", False),
        ("~/runs", False),
        ("a b/c", False),
        ("owner/", False),
    ],
)
def test_the_form_of_an_id(text, expected):
    assert hub.is_id(text) is expected


def test_only_config_and_weights_are_fetched(repository, tmp_path):
    asked = repository("config.json", WEIGHTS, "README.md", "diffusion_pytorch_model.bin")
    assert hub.fetch("owner/name") == tmp_path / "owner" / "name"
    assert asked == [("owner/name", "config.json"), ("owner/name", WEIGHTS)]


def test_of_a_pipeline_the_autoencoder_is_fetched(repository, tmp_path):
    asked = repository("model_index.json", "vae/config.json", f"vae/{WEIGHTS}")
    assert hub.fetch("owner/name") == tmp_path / "owner" / "name" / "vae"
    assert asked == [("owner/name", "vae/config.json"), ("owner/name", f"vae/{WEIGHTS}")]


def test_a_file_of_a_repository(repository, tmp_path):
    asked = repository("weights/vae.pt")
    assert hub.fetch("owner/name/weights/vae.pt") == tmp_path / "owner/name/weights/vae.pt"
    assert asked == [("owner/name", "weights/vae.pt")]


def test_a_path_that_is_there_is_no_id(repository, tmp_path, monkeypatch):
    asked = repository("config.json", WEIGHTS)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "holds neither config.json" in error_of(sources.read_source, "owner/name")
    assert not asked


@pytest.mark.parametrize(
    ("files", "source", "expected"),
    [
        ((), "owner/name", "no config.json, not in `vae` either; name a file: owner/name/FILE"),
        (("config.json",), "owner/name", f"does not hold config.json with {WEIGHTS}"),
        (("config.json", WEIGHTS), "owner/name/a.pt", "does not hold a.pt"),
    ],
)
def test_files_that_are_not_there_are_named(repository, files, source, expected):
    repository(*files)
    message = error_of(sources.read_source, source)
    assert message.startswith(f"{source}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (http(errors.RepositoryNotFoundError), "no such path here, and no such repository"),
        (http(errors.GatedRepoError), "hf auth login"),
        (http(errors.HfHubHTTPError), "the hub fails: it went wrong"),
        (http(errors.HfHubHTTPError, 503), "the hub fails: it went wrong"),
        (OSError("no route\nto host"), "the hub cannot be reached"),
    ],
)
def test_failures_are_one_line(repository, failure, expected):
    repository(fails=failure, online=False)
    assert expected in error_of(sources.read_source, "owner/name")


@pytest.mark.parametrize("failure", [OSError("no route to host"), http(errors.HfHubHTTPError, 503)])
def test_what_is_in_the_cache_is_found_without_a_network(repository, failure, tmp_path):
    repository(fails=failure)
    assert hub.fetch("owner/name") == tmp_path / "owner" / "name"


def test_what_the_hub_refuses_is_not_taken_from_the_cache(repository):
    asked = repository(fails=http(errors.GatedRepoError, 403))
    error_of(hub.fetch, "owner/name")
    assert not asked


def test_of_taesds_two_files_the_other_one_is_fetched_too(repository):
    weights = safetensors.numpy.save({"0.weight": np.zeros((1, 1))})
    files = ("a/taef2_encoder.pth", "a/taef2_decoder.pth")
    for asks in (files, files[::-1]):
        asked = repository(*files, content=weights)
        source = sources.read_source(f"owner/name/{asks[0]}")
        assert asked == [("owner/name", file) for file in asks]
        assert source.tensors.keys() == {"encoder.0.weight", "decoder.0.weight"}
    repository(files[0], content=weights)
    message = error_of(sources.read_source, f"owner/name/{files[0]}")
    assert message.endswith(f"the repository does not hold {files[1]}")


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


def test_a_folder_of_the_hub_is_called_by_its_id(repository, monkeypatch):
    repository("config.json", WEIGHTS)
    monkeypatch.setattr(sources.files, "read_state_dict", lambda path: {})
    assert sources.read_source("owner/taesdxl").name == "owner/taesdxl"
