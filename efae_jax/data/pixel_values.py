"""Images of more than 8 bits a channel as 8-bit grey, by the range that their file states.

| mode | range |
|---|---|
| 16 bits | 0 to 65535, or what a TIFF's BitsPerSample (12) or MaxSampleValue says |
| whole numbers of 32 bits, or signed ones | a TIFF's SMinSampleValue to SMaxSampleValue |
| floats | the same, else 0 to 1 |

What lies far outside, and whole numbers whose range nothing states, is refused: to clip it would
give another image. TIFF 6.0, sections 8 and 19; PFM has floats where 1 is white.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from efae_jax.data.bad_image import BadImageError

# TIFF tags
_BITS, _PHOTOMETRIC, _MIN, _MAX, _FORMAT, _SMIN, _SMAX = 258, 262, 280, 281, 339, 340, 341
_WHITE_IS_ZERO = 0
_OVERSHOOT = 0.25  # of the range: bright spots and ringing are clipped, other units refused


def is_deep(img: Image.Image) -> bool:
    """Whether an image has whole numbers of 16 or 32 bits, or floats."""
    return img.mode.startswith("I") or img.mode == "F"


def to_eight_bits(img: Image.Image) -> Image.Image:
    """Grey of 8 bits.

    Raises:
      BadImageError: numbers outside the range, not finite, or of no stated range.
    """
    values = np.asarray(img, np.float64)
    low, high = _range(img)
    if not np.isfinite(values).all():
        raise BadImageError("numbers that are not finite: the image has nan or infinity")
    scaled = (values - low) / (high - low)
    outside = _OVERSHOOT if img.mode == "F" else 0
    if scaled.min() < -outside or scaled.max() > 1 + outside:
        raise BadImageError(
            f"numbers of no known range: they run from {values.min():g} to {values.max():g}, where "
            f"{low:g} to {high:g} is {_source(img)}; a TIFF's SMinSampleValue and SMaxSampleValue "
            "can state others"
        )
    if _tags(img).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns 8 bits only
        scaled = 1 - scaled
    return Image.fromarray(np.clip(np.rint(255 * scaled), 0, 255).astype(np.uint8))


def _tags(img: Image.Image) -> Any:
    return getattr(img, "tag_v2", None) or {}


def _range(img: Image.Image) -> tuple[float, float]:
    tags = _tags(img)
    bits, kind = _first(tags.get(_BITS, 16)), _first(tags.get(_FORMAT, 1))
    low = _first(tags.get(_SMIN, tags.get(_MIN, 0)))
    stated = tags.get(_SMAX, tags.get(_MAX))
    if stated is not None:
        high = _first(stated)
        if not low < high:
            raise BadImageError(f"a stated range of numbers that is none: {low:g} to {high:g}")
        return float(low), float(high)
    if img.mode == "F":
        return 0.0, 1.0
    if tags and (kind != 1 or bits > 16):
        raise BadImageError(
            f"whole numbers of no stated range: {bits} bits, "
            f"{'signed' if kind == 2 else 'unsigned'}; a TIFF's SMinSampleValue and "
            "SMaxSampleValue can state it"
        )
    return 0.0, float(2 ** min(bits, 16) - 1)


def _source(img: Image.Image) -> str:
    return "usual for floats" if img.mode == "F" else "stated"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
