"""Softmax attention by the fastest implementation that the device has for its sizes."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Implementation = Literal["xla", "cudnn"]

# cuDNN's fused attention, as `jax.nn.dot_product_attention` documents and checks it: half
# precision, heads of at most 128 channels (256 from Hopper on), a multiple of 8, Ampere or newer.
CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
CUDNN_LARGEST_HEAD, CUDNN_HEAD_MULTIPLE = 128, 8
CUDNN_CAPABILITY = (8, 0)


def attention(
    q_BLHD: Float[Array, "B L H D"], k_BSHD: Float[Array, "B S H D"], v_BSHD: Array
) -> Float[Array, "B L H D"]:
    """softmax(q k^T / sqrt(D)) v for every head.

    Which implementation computes it is decided when the program is traced, for the first of
    JAX's default devices. cuDNN's never holds the L x S weights in memory, forwards or backwards.
    """
    implementation = choose_implementation(cuda_capability(), q_BLHD.dtype, q_BLHD.shape[-1])
    return jax.nn.dot_product_attention(q_BLHD, k_BSHD, v_BSHD, implementation=implementation)


def choose_implementation(
    capability: tuple[int, int] | None, dtype: Any, head_width: int
) -> Implementation:
    """ "cudnn" where its limits allow, else "xla".

    Args:
      capability: of a CUDA device, (9, 0) for Hopper; None for anything else.
      dtype: of q, k and v.
      head_width: D.
    """
    fits = (
        capability is not None
        and capability >= CUDNN_CAPABILITY
        and dtype in CUDNN_DTYPES
        and head_width <= CUDNN_LARGEST_HEAD
        and head_width % CUDNN_HEAD_MULTIPLE == 0
    )
    return "cudnn" if fits else "xla"


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the first default device; None where it is not CUDA's."""
    if jax.default_backend() != "gpu":
        return None
    name = str(getattr(jax.devices()[0], "compute_capability", ""))
    major, _, minor = name.partition(".")
    if not (major.isdigit() and minor.isdigit()):  # ROCm's are called gfx90a and the like
        return None
    return int(major), int(minor)
