"""Weights on the Hugging Face hub: only the files that an autoencoder needs are fetched."""

from __future__ import annotations

import re
from pathlib import Path

from efae_jax.errors import UserError

# diffusers' names; of the weights, only the first is fetched.
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# A folder of the repository that holds the autoencoder of a whole pipeline.
SUBFOLDERS = ("", "vae/")


def is_id(source: str) -> bool:
    """Whether it has the form of a hub id, "owner/name", or of a file there, "owner/name/file"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w./-]+)?", source) is not None


def fetch(source: str) -> Path:
    """The folder that holds config.json and weights of a hub id, or the file that is named.

    Both are kept in huggingface_hub's cache, which answers where the network or the server
    fails. Of a pipeline, the folder `vae` is taken.

    Raises:
      UserError: no such repository or file, no access to it, or no network.
    """
    # It takes a while to import, and only ids of the hub need it.
    from huggingface_hub import errors

    owner, name, *file = source.split("/", 2)
    repository = f"{owner}/{name}"
    try:
        if file:
            return _download(repository, file[0])
        for folder in SUBFOLDERS:
            try:
                config = _download(repository, folder + CONFIG)
            except errors.RemoteEntryNotFoundError:
                continue
            _download(repository, folder + WEIGHTS[0])
            return config.parent
        problem = (
            f"the repository holds no {CONFIG}, not in `vae` either; name a file: {source}/FILE"
        )
    except errors.GatedRepoError:
        problem = "access must be asked for on its page on the hub; then log in: hf auth login"
    except errors.RepositoryNotFoundError:
        problem = "no such path here, and no such repository on the hub (or it is private)"
    except errors.RemoteEntryNotFoundError:
        wanted = file[0] if file else f"{CONFIG} with {WEIGHTS[0]}"
        problem = f"the repository does not hold {wanted}"
    except errors.LocalEntryNotFoundError:
        problem = "no such path here, and the hub cannot be reached"
    # A dozen kinds of failures of networks, servers and disks.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        problem = f"no such path here, and the hub fails: {reason}"
    raise UserError(f"{source}: {problem}")


def _download(repository: str, file: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        # Once: the download itself would try for half a minute where there is no network.
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file))
    except Exception as error:
        # The hub's answer about this file; a server that fails is as good as none.
        answer = isinstance(error, errors.HfHubHTTPError)
        if answer and error.response.status_code < 500:
            raise
        try:
            return Path(hub.hf_hub_download(repository, file, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            if answer:
                raise error from None
            raise
    return Path(hub.hf_hub_download(repository, file))
