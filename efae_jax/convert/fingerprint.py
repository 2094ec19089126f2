"""Which file a pretrained network was read from, so that figures of others can be told apart."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from efae_jax.errors import UserError

log = logging.getLogger(__name__)
# Names of published weights end in the start of their sha256, as torch.hub checks it:
# pt_inception-2015-12-05-6726825d.pth.
_STATED = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


def identify(path: str | Path) -> dict[str, str]:
    """{"file": its name, "sha256": of its content}; warns where the name states another sha256.

    Raises:
      UserError: a file that cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    stated = _STATED.search(path.name)
    if stated and not digest.startswith(stated[1]):
        log.warning(
            "%s is another file than its name says: the sha256 of its content begins with %s, "
            "that of the published one with %s",
            path,
            digest[: len(stated[1])],
            stated[1],
        )
    return {"file": path.name, "sha256": digest}
