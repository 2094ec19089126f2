"""Features of the classification networks that perceptual losses look through.

Only the convolutions are here. Their pretrained weights come from
`efae_jax.convert.perceptual`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
FEW = 4  # positions a side
ALEXNET_WIDTHS = ((64,), (192,), (384,), (256,), (256,))

# In units of images in [-1, 1]: close to the mean and deviation of ImageNet's channels.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def scale_input(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W 3"]:
    """(x - shift) / scale per colour, float32: LPIPS' scaling of images in [-1, 1].

    Grey images, of one channel, are taken as equal red, green and blue.

    Raises:
      ValueError: neither 1 nor 3 channels.
    """
    channels = x_BHWC.shape[-1]
    if channels not in (1, 3):
        raise ValueError(
            f"images of {channels} channels have no perceptual features: 1 (grey) or 3 (colour)"
        )
    return (x_BHWC.astype(jnp.float32) - _SHIFT) / _SCALE


class VGG16(nnx.Module):
    """The 13 convolutions of VGG16 (Simonyan & Zisserman 2014, arXiv:1409.1556).

    Stage s = 1..5 has 2, 2, 3, 3, 3 convolutions 3x3 of 64, 128, 256, 512, 512 channels,
    each followed by ReLU; a max-pooling by 2 leads from one to the next.

    Args:
      stages: how many; what comes later is neither stored nor computed.
      rngs: draws the parameters (float32, He normal).
      dtype: of the computation.
    """

    def __init__(self, stages: int = 5, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.widths, self.dtype = VGG16_WIDTHS[:stages], dtype
        self.smallest_side = 2 ** (stages - 1)
        sizes = [3, *(width for stage in self.widths for width in stage)]
        self.convs = nnx.List(
            _conv(sizes[i], sizes[i + 1], 3, 1, 1, rngs, dtype) for i in range(len(sizes) - 1)
        )

    def __call__(self, x_BHWC: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w D"]]:
        """The outputs of each stage's last ReLU: relu1_2, 2_2, 3_3, 4_3, 5_3, as far as built.

        Stage s has sides floor(side / 2^(s-1)); the type is `dtype`.

        Args:
          x_BHWC: images after `scale_input`.

        Raises:
          ValueError: a side that is pooled away.
        """
        _require_side(x_BHWC, self.smallest_side)
        h, taps, convs = x_BHWC.astype(self.dtype), [], iter(self.convs)
        for stage in self.widths:
            if taps:
                h = nnx.max_pool(h, (2, 2), strides=(2, 2))
            for _ in stage:
                h = jax.nn.relu(_convolve(next(convs), h))
            taps.append(h)
        return taps


class AlexNet(nnx.Module):
    """The five convolutions of AlexNet in its one-tower form (Krizhevsky 2014, arXiv:1404.5997).

    11x11/4, pool, 5x5, pool, 3x3, 3x3, 3x3, each with ReLU; pooling takes the maximum of
    3x3 at stride 2.

    Args:
      rngs: draws the parameters (float32, He normal).
      dtype: of the computation.
    """

    smallest_side = 31

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.dtype = dtype
        shapes = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        sizes = [3, *(width for (width,) in ALEXNET_WIDTHS)]
        self.convs = nnx.List(
            _conv(sizes[i], sizes[i + 1], *shape, rngs, dtype) for i, shape in enumerate(shapes)
        )

    def __call__(self, x_BHWC: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w D"]]:
        """The outputs of the five ReLUs, in `dtype`.

        Args:
          x_BHWC: images after `scale_input`.

        Raises:
          ValueError: a side below 31, of which pooling leaves nothing.
        """
        _require_side(x_BHWC, self.smallest_side)
        h, taps = x_BHWC.astype(self.dtype), []
        for i, conv in enumerate(self.convs):
            if i in (1, 2):
                h = nnx.max_pool(h, (3, 3), strides=(2, 2))
            h = jax.nn.relu(conv(h))
            taps.append(h)
        return taps


def pooled(h_BhwD: Float[Array, "B h w D"]) -> Float[Array, "B D"]:
    """A tap's mean over positions, float32."""
    return h_BhwD.astype(jnp.float32).mean(axis=(1, 2))


def _conv(
    n_in: int, n_out: int, kernel: int, stride: int, padding: int, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Conv:
    return nnx.Conv(
        n_in,
        n_out,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        kernel_init=nnx.initializers.he_normal(),
        dtype=dtype,
        rngs=rngs,
    )


def _convolve(conv: nnx.Conv, h_BhwD: Array) -> Array:
    """conv(h), of 3x3 with padding 1; of a few positions as one product of matrices.

    XLA's convolution of 2x2 positions takes 30 times as long as the product on a CPU.
    """
    height, width = h_BhwD.shape[1:3]
    if max(height, width) > FEW:
        return conv(h_BhwD)
    h = jnp.pad(h_BhwD, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [h[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    kernel = conv.kernel[...].astype(h.dtype)
    return jnp.concatenate(parts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1]) + conv.bias[
        ...
    ].astype(h.dtype)


def _require_side(x_BHWC: Array, smallest: int) -> None:
    height, width = x_BHWC.shape[1:3]
    if min(height, width) < smallest:
        raise ValueError(
            f"image sides {height}x{width} are too small for perceptual features: each must be "
            f"at least {smallest}"
        )
