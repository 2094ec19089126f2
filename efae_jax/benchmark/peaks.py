"""What a device can do at most: its maker's figure, or the best matrix product measured."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dense TFLOP/s in the units that matrix products run on, without sparsity: (device_kind, bfloat16
# with float32 sums, float32 inputs as JAX multiplies them by default: TF32 on tensor cores,
# bfloat16 passes on a TPU's MXU). The first pattern that is found decides.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    # NVIDIA H200 and H100 datasheets, "with sparsity" halved.
    (r"H200", 989.5, 494.5),
    (r"H100 (PCIe|NVL)", 756.5, 378.0),
    (r"H100", 989.5, 494.5),
    # NVIDIA A100 Tensor Core GPU datasheet.
    (r"A100", 312.0, 156.0),
    # NVIDIA L4 and L40S datasheets, "with sparsity" halved.
    (r"\bL40S", 362.0, 183.0),
    (r"\bL4\b", 121.0, 60.0),
    # NVIDIA Ada and Ampere GA102 whitepapers, the tables of GeForce cards: FP32 accumulate.
    (r"RTX 4090(?! (D|Laptop))", 165.2, 82.6),
    (r"RTX 3090(?! Ti)", 71.0, 35.6),
    # NVIDIA V100 datasheet. No bfloat16: its float32 units do the work.
    (r"V100-PCI", 14.0, 14.0),
    (r"V100", 15.7, 15.7),
    # Google Cloud TPU documentation, "System architecture", peak compute per chip (bf16).
    (r"TPU v6 lite|TPU v6e", 918.0, 918.0),
    (r"TPU v5 lite|TPU v5e", 197.0, 197.0),
    (r"TPU v5", 459.0, 459.0),
    (r"TPU v4(?! lite)", 275.0, 275.0),
)


class Peak(NamedTuple):
    """Operations per second of one device (of all cores, on a CPU), and where that is from."""

    flops: float
    source: str


def known_peak(device_kind: str, dtype: str) -> Peak | None:
    """The maker's figure for a `device_kind` of JAX and "bfloat16" or "float32"."""
    for pattern, bfloat16, float32 in _PEAKS:
        if re.search(pattern, device_kind):
            teraflops = bfloat16 if dtype == "bfloat16" else float32
            return Peak(teraflops * 1e12, "of the maker's dense peak")
    return None


def peak_of(device: Any, dtype: str, side: int = 2048) -> Peak:
    """The maker's figure, or for a CPU or a device not in the table the best product measured.

    Args:
      device: of JAX.
      dtype: of the computation.
      side: of the square matrices, where one is measured.
    """
    peak = known_peak(device.device_kind, dtype)
    return peak or Peak(_measure(device, dtype, side), "of the best matrix product measured here")


def _measure(device: Any, dtype: str, side: int) -> float:
    a = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
