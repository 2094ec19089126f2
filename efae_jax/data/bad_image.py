"""Why an image cannot be used, in words that say what to do."""

from __future__ import annotations

from PIL import UnidentifiedImageError

from efae_jax.paths import printable


class BadImageError(Exception):
    """An image that cannot be used; the message is "kind: detail", or the kind alone."""


_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPB": "a large Photoshop file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
}


def looks_like(content: bytes) -> str:
    """What content that is no image begins as, in words."""
    for start, words in _STARTS.items():
        if content.startswith(start):
            return words
    if content[4:8] == b"ftyp":
        brand = content[8:12].decode("latin-1")
        return "HEIF (pillow-heif converts it)" if brand[:2] in ("he", "mi", "ms") else "a video"
    head = content[:1000].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")) or b"<html" in head:
        return "a web page"
    if b"<svg" in head:
        return "SVG"
    if not content.strip(b"\0"):
        return "zeros"
    return f"a file that begins with {content[:8]!r}"


def reason_of(error: Exception) -> str:
    """One line, "kind: detail", for whatever reading an image raised.

    Decoders meet damage with errors of every kind; the kind counts how often it happened, the
    detail is told of the first.
    """
    detail = printable(" ".join(str(error).split()))
    name = type(error).__name__
    match error:
        case BadImageError():
            return detail
        case UnidentifiedImageError():
            return "no image that Pillow reads here"
        case FileNotFoundError():
            return "gone since the files were listed"
        case PermissionError():
            return "permission denied"
        case MemoryError():
            return "too large for the machine's memory"
        case OSError() if "truncated" in detail or "broken data stream" in detail:
            return f"damaged or cut short: {detail}"
        case OSError() if error.strerror:
            return f"{error.strerror}: {name}"
    # Captions and other readers of this package say in full what is wrong.
    if name.endswith("Error") and type(error).__module__.startswith("efae_jax"):
        return f"{name}: {detail}" if ": " not in detail else detail
    return f"damaged ({name}): {detail}" if detail else f"damaged ({name})"
