"""Hub ids: which files are fetched, and one line for all that goes wrong. Nothing is downloaded."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors
from weights import error_of

from efae_jax.convert import hub, sources

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Response:
    """What an HTTP error carries."""

    headers: dict = {}  # noqa: RUF012
    request = None
    status_code = 404


def http(kind):
    return kind("it went wrong", response=Response())


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A repository of these files; returns what was downloaded."""

    def make(*files, fails=None, online=True):
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
            path.write_text("{}")
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
        (OSError("no route\nto host"), "the hub cannot be reached"),
    ],
)
def test_failures_are_one_line(repository, failure, expected):
    repository(fails=failure, online=False)
    assert expected in error_of(sources.read_source, "owner/name")


def test_what_is_in_the_cache_is_found_without_a_network(repository, tmp_path):
    repository(fails=OSError("no route to host"))
    assert hub.fetch("owner/name") == tmp_path / "owner" / "name"
