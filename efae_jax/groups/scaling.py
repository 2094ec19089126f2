"""Scaling of images and latents: resampling of their positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Method of `jax.image.resize`, and whether the kernel widens when the sides shrink.
_KINDS = {
    "bilinear": ("bilinear", False),
    "bilinear_antialiased": ("bilinear", True),
    "bicubic": ("bicubic", True),
}
RESAMPLINGS = tuple(_KINDS)


def scale(
    x_BHWC: Float[Array, "B H W C"], sides: tuple[int, int], kind: str = "bilinear"
) -> Float[Array, "B h w C"]:
    """The same picture on other sides; pixels are squares, the outermost edges stay.

    It is no group action: there is no inverse, and scaling twice is only about scaling by the
    product. It commutes exactly with flips, and with rotations if the sides turn along.

    Args:
      x_BHWC: images or latents.
      sides: (h, w).
      kind: "bilinear" without antialiasing, as `torch.nn.functional.interpolate` with
        align_corners=False; "bilinear_antialiased" and "bicubic" (a = -0.5), whose kernels
        widen by the factor that the sides shrink, as there with antialias=True.

    Raises:
      ValueError: another kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"resampling {kind!r} does not exist; allowed: {', '.join(RESAMPLINGS)}")
    if tuple(sides) == x_BHWC.shape[1:3]:
        return x_BHWC
    method, antialias = _KINDS[kind]
    shape = (x_BHWC.shape[0], *sides, x_BHWC.shape[3])
    x = jax.image.resize(x_BHWC.astype(jnp.float32), shape, method, antialias=antialias)
    return x.astype(x_BHWC.dtype)
