"""Peak signal-to-noise ratio and structural similarity, per image.

`psnr` and `ssim` clip pixels to [-1, 1] and know their range, 2. `psnr_uint8` and
`ssim_torchmetrics` are the choices of most published evaluations of latent autoencoders: PSNR of
the 8-bit files, SSIM as torchmetrics computes it, of the pair's own range or of a fixed one.
"""

from __future__ import annotations

import dm_pix
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

RANGE = 2.0
LEAST_MSE = 1e-10  # of pixels in [-1, 1]: 106 dB
WINDOW = 11  # of SSIM, pixels
SIGMA = 1.5
K1, K2 = 0.01, 0.03
LEAST_RANGE = 1e-6


def psnr(a_BHWC: Float[Array, "B H W C"], b_BHWC: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """10 log10(2^2 / mean (a - b)^2) in dB, of images clipped to [-1, 1].

    The mean square is kept above 1e-10 (106 dB), so that equal images give a number.
    """
    error = jnp.square(jnp.clip(a_BHWC, -1, 1) - jnp.clip(b_BHWC, -1, 1))
    mse_B = jnp.maximum(error.mean(axis=(1, 2, 3)), LEAST_MSE)
    return 10 * jnp.log10(RANGE**2 / mse_B)


def to_uint8_truncated(x_BHWC: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """clamp(127.5 x + 128, 0, 255) without its fraction: [-1, 1] to 8 bits.

    The added half makes it the nearest level of 127.5 (x + 1), halves going up; level p, read as
    p / 127.5 - 1, comes back as p.
    """
    # XLA's programs for CPUs leave the conversion out where floats are made of the levels in the
    # same loop, such as a mean's; the fraction would count.
    return jnp.floor(jnp.clip(127.5 * x_BHWC + 128, 0, 255)).astype(jnp.uint8)


def psnr_uint8(
    a_BHWC: UInt8[Array, "B H W C"], b_BHWC: UInt8[Array, "B H W C"]
) -> Float[Array, " B"]:
    """10 log10(255^2 / mean (a - b)^2) in dB, of images in 8 bits.

    Equal images would give infinity, and the mean over images with them: the mean square is
    kept above (255 / 2)^2 1e-10, as in `psnr`, which gives 106 dB. One level in one value of an
    image of 512 x 512 x 3 is 107 dB.
    """
    error = jnp.square(a_BHWC.astype(jnp.float32) - b_BHWC.astype(jnp.float32))
    mse_B = jnp.maximum(error.mean(axis=(1, 2, 3)), (255 / RANGE) ** 2 * LEAST_MSE)
    return 10 * jnp.log10(255**2 / mse_B)


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


def ssim_torchmetrics(
    a_BHWC: Float[Array, "B H W C"],
    b_BHWC: Float[Array, "B H W C"],
    data_range: tuple[float, float] | None = None,
) -> Float[Array, " B"]:
    """Structural similarity as torchmetrics computes it, of each pair by itself.

    That is torchmetrics' structural_similarity_index_measure (1.4.2 and later): Gaussian window of
    11 pixels, sigma 1.5, c1 = (0.01 L)^2, c2 = (0.03 L)^2, mean over all positions, the images
    being continued by reflection, and over channels. Before 1.4.2 the mean was over the positions
    where the window fits. Values are not shifted to start at 0, so that luminances near 0 count for
    little in images of [-1, 1].

    Sides below 6, which torchmetrics refuses, are reflected more than once. Two flat images
    (L = 0), for which it gives NaN, are compared by luminance alone: 1 where they are equal.

    Args:
      data_range: (low, high), to which values are clipped, L = high - low; torchmetrics' default
        unless given: nothing is clipped, L = max(max a - min a, max b - min b).
    """
    axes = (1, 2, 3)
    if data_range is None:
        range_a, range_b = (x.max(axis=axes) - x.min(axis=axes) for x in (a_BHWC, b_BHWC))
        range_B = jnp.maximum(jnp.maximum(range_a, range_b), LEAST_RANGE)
    else:
        a_BHWC, b_BHWC = (jnp.clip(x, *data_range) for x in (a_BHWC, b_BHWC))
        range_B = jnp.full(len(a_BHWC), data_range[1] - data_range[0])
    range_B111 = range_B[:, None, None, None]
    # Variances do not change by a shift, and the difference of squares that gives them keeps
    # more digits about the mean.
    shift_a, shift_b = (x.mean(axis=(1, 2), keepdims=True) for x in (a_BHWC, b_BHWC))
    a, b = _continued(a_BHWC - shift_a), _continued(b_BHWC - shift_b)
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a = jnp.maximum(_blurred(a * a) - mean_a**2, 0)
    variance_b = jnp.maximum(_blurred(b * b) - mean_b**2, 0)
    covariance = _blurred(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + shift_a, mean_b + shift_b
    c1, c2 = (K1 * range_B111) ** 2, (K2 * range_B111) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(axis=axes)


def _continued(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H+10 W+10 C"]:
    """The image with a border of half a window, mirrored at its outermost pixels."""
    half = WINDOW // 2
    return jnp.pad(x_BHWC, ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect")


def _blurred(x_BHWC: Float[Array, "B H+10 W+10 C"]) -> Float[Array, "B H W C"]:
    """Weighted by the Gaussian window, where it fits."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights = (weights / weights.sum()).tolist()
    height, width = (side - WINDOW + 1 for side in x_BHWC.shape[1:3])
    # Sums of shifted images rather than a convolution, which accelerators round to 16 bits.
    x = sum(w * x_BHWC[:, i : i + height] for i, w in enumerate(weights))
    return sum(w * x[:, :, i : i + width] for i, w in enumerate(weights))
