"""Weights on the Hugging Face hub: repositories by id or address, online or from the cache.

Only the files that a model needs are fetched. huggingface_hub keeps them in its cache, which
answers where the network or the server fails.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from efae_jax.convert.places import Place
from efae_jax.errors import UserError
from efae_jax.paths import printable

# The name that diffusers gives a model's description.
CONFIG = "config.json"
# A fraction of a minute: where there is no network, the cache should answer soon.
_TIMEOUT = 10
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[^/\0][^\0]*)?")
_NO_MODELS = ("datasets", "spaces", "docs", "blog", "papers", "collections", "api", "settings")


@dataclasses.dataclass(frozen=True)
class Address:
    """Where something is on the hub.

    Attributes:
      repository: "owner/name".
      inside: a file or folder there; "" for the root.
      revision: a branch, tag or commit; None for the main one.
    """

    repository: str
    inside: str = ""
    revision: str | None = None


def is_id(source: str) -> bool:
    """Whether it has the form of a hub id, "owner/name", or of a file there, "owner/name/file"."""
    return _ID.fullmatch(source) is not None and ".." not in source.split("/")


def is_url(source: str) -> bool:
    """Whether it is an address of the web or of the hub, and no path."""
    return re.match(r"(?i)(https?|hf)://", source) is not None


def parse(source: str) -> Address | None:
    """What an id, an address of a page or file of the hub, or hf://owner/name names.

    None where it is neither: a path.

    Raises:
      UserError: an address that names no model of the hub.
    """
    if is_url(source):
        url = urlsplit(source)
        # A host is not case-sensitive; of hf://owner/name, it is the owner.
        parts = [unquote(part) for part in url.path.split("/") if part]
        if url.scheme.lower() == "hf":
            parts = [url.netloc, *parts]
        elif (url.hostname or "").lower() not in _HOSTS:
            raise UserError(
                f"{printable(source)}: weights are not read from there; download the file first, "
                "and give its path (addresses of huggingface.co are understood)"
            )
        if parts[:1] == ["models"]:
            parts = parts[1:]
        return _of_parts(source, parts)
    if not is_id(source):
        return None
    owner, name, *inside = source.rstrip("/").split("/", 2)
    return Address(f"{owner}/{name}", inside[0] if inside else "")


def _of_parts(source: str, parts: list[str]) -> Address:
    wanted = "https://huggingface.co/OWNER/NAME, /OWNER/NAME/resolve/main/FILE or hf://OWNER/NAME"
    if len(parts) < 2 or parts[0] in _NO_MODELS:
        raise UserError(f"{printable(source)} is no model of the hub; allowed: {wanted}")
    owner, name, *rest = parts
    name, _, revision = name.partition("@")
    if not is_id("/".join([owner, name, *rest])):
        raise UserError(f"{printable(source)} is no model of the hub; allowed: {wanted}")
    if rest and not source.lower().startswith("hf:"):
        if rest[0] not in ("resolve", "blob", "raw", "tree") or len(rest) < 2:
            raise UserError(f"{printable(source)} is no model, file or folder; allowed: {wanted}")
        _, revision, *rest = rest
    revision = None if revision in ("", "main") else revision
    return Address(f"{owner}/{name}", "/".join(rest), revision)


def fetch(source: str) -> Path:
    """The file of a hub id, "owner/name/file", here.

    Raises:
      UserError: no such repository or file, no access to it, or no network.
    """
    address = parse(source)
    if address is None or not address.inside:
        raise UserError(f"{source}: no such file; one of the hub is named {source}/FILE")
    place = repository(address, source)
    if address.inside not in place.names:
        raise UserError(f"{source}: {place.lacks(address.inside)}")
    return place.file(address.inside)


def repository(address: Address, source: str) -> Place:
    """A repository's files: what the hub lists or, where it cannot be reached, the cache holds.

    Args:
      address: of it.
      source: what the user named, for errors.

    Raises:
      UserError: no such repository, no access to it, or neither a network nor a cached file.
    """
    # It takes a while to import, and only ids of the hub need it.
    import huggingface_hub as hub

    where = {"revision": address.revision} if address.revision else {}
    try:
        info = hub.HfApi().model_info(address.repository, timeout=_TIMEOUT, **where)
    except Exception as error:
        if _is_answer(error):
            raise _problem(source, error) from error
        return _cached(address, source, error)
    names = frozenset(file.rfilename for file in info.siblings or ())

    def file(name: str) -> Path:
        try:
            return Path(hub.hf_hub_download(address.repository, name, **where))
        except Exception as error:
            if not _is_answer(error):
                options = {"local_files_only": True, **where}
                try:
                    return Path(hub.hf_hub_download(address.repository, name, **options))
                except Exception:
                    raise _problem(source, error) from error
            raise _problem(source, error) from error

    return Place(source, names, file, "the repository", Path(address.repository))


def _cached(address: Address, source: str, error: Exception) -> Place:
    """What the cache holds of a repository that cannot be reached."""
    import huggingface_hub as hub

    options: dict[str, Any] = {"revision": address.revision} if address.revision else {}
    try:
        root = Path(hub.snapshot_download(address.repository, local_files_only=True, **options))
        found = [p for p in root.rglob("*") if p.is_file()]
    except Exception:
        raise _problem(source, error) from error
    names = frozenset(p.relative_to(root).as_posix() for p in found)
    get: Callable[[str], Path] = lambda name: root / PurePosixPath(name)  # noqa: E731
    return Place(source, names, get, "the hub cannot be reached, and its cache here", root)


def _is_answer(error: Exception) -> bool:
    """Whether the hub has answered; a server that fails or is too busy is as good as none."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError) or error.response is None:
        return False
    return error.response.status_code < 500 and error.response.status_code != 429


def _problem(source: str, error: Exception) -> UserError:
    """One line for a dozen kinds of failures of networks, servers and disks."""
    from huggingface_hub import errors

    code = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        problem = "access must be asked for on its page on the hub; then log in: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem = "the repository has no such branch, tag or commit"
    elif isinstance(error, errors.RepositoryNotFoundError):
        problem = "no such path here, and no such repository on the hub (or it is private)"
    elif code is not None:
        problem = f"no such path here, and the hub fails (HTTP status {code}); try again later"
    elif isinstance(error, errors.HFValidationError):
        problem = "no such path here, and no id that the hub allows"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        problem = "no space is left for the hub's cache (HF_HOME names another place)"
    elif isinstance(error, PermissionError):
        problem = "the hub's cache cannot be written (HF_HOME names another place)"
    else:
        problem = "no such path here, and the hub cannot be reached; nothing of it is in the cache"
    return UserError(f"{printable(source)}: {problem}")
