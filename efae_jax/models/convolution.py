"""Convolutions whose kernel's gradient is a sum of matrix products where that is faster.

XLA computes the gradient of a kernel as a convolution of the input with the output's gradient,
a "kernel" as large as the image. On a CPU it does so at a fifth to a half of the speed of the
convolution itself where the image is large; the same sum as one matrix product per tap of the
kernel is two to three times faster there. Forward passes, and gradients of inputs, XLA computes
well, and no accelerator needs this.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

# Output positions from which on the products won on 2 cores of an AMD EPYC (AVX-512), at 3 to
# 512 channels: 128x128 and 256x256 did, 64x64 and 32x32 did not.
LEAST_POSITIONS = 128 * 128

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any
) -> Float[Array, "B h w D"]:
    """`jax.lax.conv_general_dilated`, for `nnx.Conv(conv_general_dilated=convolve)`.

    Args:
      x, kernel: [B, H, W, C] and [p, q, C, D].
      strides, padding: as there.
      options: of `conv_general_dilated`; those of a plain NHWC convolution.
    """
    shape = jax.eval_shape(
        lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, **options), x, kernel
    ).shape
    if not by_products(jax.default_backend(), shape, x.dtype, options):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pairs = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(x, kernel, tuple(strides), pairs)


def by_products(
    backend: str, shape: Sequence[int], dtype: Any, options: dict[str, Any] | None = None
) -> bool:
    """Whether the kernel's gradient is to be computed by matrix products.

    Args:
      backend: of JAX.
      shape: [B, h, w, D] of the output.
      dtype: of the computation.
      options: of `conv_general_dilated`; anything but a plain convolution is left to XLA.
    """
    options = options or {}
    plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    positions = shape[1] * shape[2] if len(shape) == 4 else 0
    return backend == "cpu" and plain and dtype == jnp.float32 and positions >= LEAST_POSITIONS


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve(x_BHWC: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_BHWC, kernel, strides, padding, dimension_numbers=numbers)


# A rule for tangents rather than for gradients: forward mode works as well, and the transpose of
# `_products` with respect to the kernel is what gradients then take.
@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _(strides: Any, padding: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _convolve(x, kernel, strides, padding)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(_convolve(dx, kernel, strides, padding))
    if not isinstance(dkernel, SymbolicZero):
        parts.append(_products(x, dkernel, strides, padding))
    return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)


def _products(x_BHWC: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    """The convolution as a sum over the kernel's taps of (shifted x) @ (the tap's matrix)."""
    p, q, _, _ = kernel.shape
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *padding, (0, 0)))
    (high, wide), (down, right) = x_BHWC.shape[1:3], strides
    total = 0
    for i in range(p):
        for j in range(q):
            part = x_BHWC[:, i : high - p + i + 1 : down, j : wide - q + j + 1 : right]
            batch, height, width, channels = part.shape
            total += part.reshape(-1, channels) @ kernel[i, j]
    return total.reshape(batch, height, width, -1)
