"""Peak signal-to-noise ratio and structural similarity, per image, on pixels in [-1, 1]."""

from __future__ import annotations

import dm_pix
import jax.numpy as jnp
from jaxtyping import Array, Float

RANGE = 2.0
WINDOW = 11  # of SSIM, pixels


def psnr(a_BHWC: Float[Array, "B H W C"], b_BHWC: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """10 log10(2^2 / mean (a - b)^2) in dB, of images clipped to [-1, 1].

    The mean square is kept above 1e-10 (106 dB), so that equal images give a number.
    """
    error = jnp.square(jnp.clip(a_BHWC, -1, 1) - jnp.clip(b_BHWC, -1, 1))
    mse_B = jnp.maximum(error.mean(axis=(1, 2, 3)), 1e-10)
    return 10 * jnp.log10(RANGE**2 / mse_B)


def ssim(a_BHWC: Float[Array, "B H W C"], b_BHWC: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Structural similarity of images clipped to [-1, 1] (Wang et al. 2004).

    Gaussian window of 11 pixels (the image's shorter side, where that is less), sigma 1.5,
    k1 = 0.01, k2 = 0.03, data range 2; mean over the positions where the window fits
    and over channels.
    """
    window = min(WINDOW, *a_BHWC.shape[1:3])
    return dm_pix.ssim(
        jnp.clip(a_BHWC, -1, 1) + 1,  # the constants assume values from 0 to the range
        jnp.clip(b_BHWC, -1, 1) + 1,
        max_val=RANGE,
        filter_size=window,
    )
