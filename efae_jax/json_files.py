"""JSON files, read with one line for whatever is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from efae_jax.errors import UserError
from efae_jax.paths import printable


def parse(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
      ValueError: in words that say what the content is instead.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 (byte {error.start:,})") from error
    except json.JSONDecodeError as error:
        if not content.strip():
            raise ValueError("it is empty") from error
        where = f"line {error.lineno:,}, column {error.colno:,}"
        raise ValueError(f"it is no JSON ({where}: {error.msg.lower()})") from error
    except RecursionError as error:
        raise ValueError("it is no JSON that is meant (nested too deep)") from error


def read(path: str | os.PathLike[str], wanted: str) -> Any:
    """The value in a file.

    Args:
      wanted: what the file should be, for the message.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      UserError: it cannot be read, or is no JSON.
    """
    try:
        return parse(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {printable(str(path))}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{printable(str(path))} is not {wanted}: {error}") from error


def read_object(path: str | os.PathLike[str], wanted: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none.

    Raises:
      UserError: it cannot be read, or is no JSON object.
    """
    try:
        value = read(path, wanted)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(value, dict):
        kind = {"NoneType": "null", "list": "a list", "str": "a text"}.get(type(value).__name__)
        raise UserError(
            f"{printable(str(path))} is not {wanted}: it holds {kind or 'a number'}, not an object"
        )
    return value
