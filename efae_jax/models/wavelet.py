"""The one-level wavelet transform that may stand before an encoder."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Float

LOW = (-0.1768, 0.3536, 1.0607, 0.3536, -0.1768, 0.0)
HIGH = (0.0, 0.0, 0.3536, -0.7071, 0.3536, 0.0)


def wavelet(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 4*C"]:
    """Low- and high-pass filtered by 6 taps in both directions, at half the side.

    Correlation with stride 2, zeros around. Channel 4 c + f of the result is colour c under
    filter f of ll, lh, hl, hh: the first letter acts along the width, the second along the
    height.
    """
    channels = x_BHWC.shape[-1]
    filters = [np.outer(height, width) for width in (LOW, HIGH) for height in (LOW, HIGH)]
    kernel_HWIO = np.stack(filters, axis=-1)[:, :, None].astype(np.float32)
    return jax.lax.conv_general_dilated(
        x_BHWC,
        np.tile(kernel_HWIO, channels).astype(x_BHWC.dtype),
        window_strides=(2, 2),
        padding=((2, 2), (2, 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
