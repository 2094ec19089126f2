"""Why an image cannot be used, in words that say what to do."""

from __future__ import annotations

from PIL import UnidentifiedImageError

from efae_jax.paths import printable


class BadImageError(Exception):
    """An image that cannot be used; the message is "kind: detail", or the kind alone."""


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
