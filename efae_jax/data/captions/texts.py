"""Captions out of the texts that people keep them in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MAX_CAPTIONS = 5
JSON_FIELDS = ("caption", "captions", "text")


class CaptionError(Exception):
    """A record without a usable caption; the message says why."""


def clean(texts: Iterable[str]) -> tuple[str, ...]:
    """The first five that are not empty, with single spaces between words; () for none."""
    # Half of a surrogate pair, which JSON allows, cannot be written as UTF-8.
    whole = (text.encode("utf-8", "replace").decode() for text in texts)
    stripped = (" ".join(text.split()) for text in whole)
    return tuple(text for text in stripped if text)[:MAX_CAPTIONS]


def usable(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """The cleaned captions, at least one.

    Raises:
      CaptionError: where there is none.
    """
    captions = clean(texts)
    if not captions:
        raise CaptionError(f"no caption: {where} is empty")
    return captions


def captions_of_text(data: bytes, where: str) -> tuple[str, ...]:
    """The lines of a text file, in UTF-8.

    Raises:
      CaptionError: for another encoding, and for an empty file.
    """
    try:
        return usable(data.decode("utf-8-sig").splitlines(), where)
    except UnicodeDecodeError as error:
        raise CaptionError(f"no caption: {where} is not UTF-8") from error


def captions_of_json(data: bytes, where: str) -> tuple[str, ...]:
    """The string or strings of the first field there is of JSON_FIELDS.

    Raises:
      CaptionError: for what is no JSON of that kind, and for empty ones.
    """
    try:
        fields = json.loads(data)
    except ValueError as error:  # of JSON and of its encoding
        raise CaptionError(f"no caption: {where} is no JSON") from error
    found = [fields[name] for name in JSON_FIELDS if isinstance(fields, dict) and name in fields]
    if not found:
        raise CaptionError(f"no caption: {where} has none of {', '.join(JSON_FIELDS)}")
    return usable(strings(found[0], where), where)


def strings(value: Any, where: str) -> list[str]:
    """A string, a list of strings or nothing, as a list of strings.

    Raises:
      CaptionError: for anything else.
    """
    texts = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise CaptionError(f"no caption: {where} holds something else than strings")
    return list(texts)


def record(image: Any, captions: tuple[str, ...]) -> dict[str, Any]:
    """A record of an image of which nothing but its captions is known."""
    return {"image": image, "label": 0, "captions": captions, "factors": None}
