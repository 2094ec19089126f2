"""PyTorch models of others: where their files are, which these are, how they are loaded."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from efae_jax.convert import hub
from efae_jax.errors import UserError

# What of a repository is needed; older ones have PICKLES instead of safetensors.
FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
PICKLES = "pytorch_model*.bin"


def need(module: str, what: str, install: str) -> ModuleType:
    """An optional library.

    Args:
      module: to import.
      what: needs it.
      install: arguments of pip.

    Raises:
      UserError: when it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # the latter of libraries that do not fit the machine
        raise UserError(
            f"{what} needs {module} ({one_line(error)}): pip install {install}"
        ) from error


def one_line(error: Exception) -> str:
    """What an error of another library says, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns whatever fails while a model is loaded and tried into a line that names it.

    Raises:
      UserError: instead of any other exception.
    """
    try:
        yield
    except UserError:
        raise
    # Networks, servers, disks, and models of kinds that no library knows yet.
    except Exception as error:
        raise UserError(f"{name} cannot be loaded: {one_line(error)}") from error


def device() -> str:
    """Where PyTorch computes: on a GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def locate(source: str) -> tuple[Path, str]:
    """The folder with a model's files, and what tells this model from others.

    Args:
      source: a folder, or OWNER/NAME on the hub, whose files are fetched into its cache.

    Returns:
      the folder and "NAME sha256:..." of a folder's own files, or "OWNER/NAME@commit".

    Raises:
      UserError: neither, or it cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return path, f"{path.resolve().name} sha256:{digest(path)}"
    if path.exists() or source.count("/") != 1 or not hub.is_id(source):
        raise UserError(f"{source}: no such folder, and no OWNER/NAME of the hub either")
    hub.fetch(f"{source}/{hub.CONFIG}")  # it says in plain words what is wrong
    with loading(source):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=list(FILES)))
        if not any(folder.glob(FILES[-1])):
            snapshot_download(source, allow_patterns=[*FILES, PICKLES])
    return folder, f"{source}@{folder.name[:12]}"


def digest(path: Path) -> str:
    """16 hexadecimal digits of the sha256 of a file, or of a model's files in a folder."""
    whole = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and any(fnmatch(name, p) for p in (*FILES, PICKLES)):
                whole.update(f"{name} {_sha256(file)}\n".encode())
        return whole.hexdigest()[:16]
    return _sha256(path)[:16]


def load_transformer(folder: Path, name: str, unused: tuple[str, ...] = ()) -> Any:
    """The model of a folder, by transformers, in float32 and for inference.

    Args:
      name: for messages.
      unused: prefixes of parameters that may be missing.

    Raises:
      UserError: when weights are missing, which transformers would draw at random.
    """
    import torch
    import transformers

    with _quiet(transformers):
        model, info = transformers.AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unused)):
        raise UserError(f"{name} lacks {len(missing)} weights of its model, such as {missing[0]}")
    return model.eval().to(device())


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without its bars and its report on weights; what matters of that becomes an error here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
