"""The InceptionV3 whose features the Frechet inception distance (FID) is computed over.

It is the network of TensorFlow's 2015-12-05 archive, not torchvision's: average pools do not
count the padding, and the pooled branch of the last block takes maxima. Its weights come from
`efae_jax.convert.inception`; without them the numbers mean nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

SIDE = 299
BATCH_NORM_EPS = 1e-3

Conv = Callable[..., "ConvNorm"]


class InceptionV3(nnx.Module):
    """InceptionV3 (Szegedy et al. 2015, arXiv:1512.00567) up to its last average pool.

    Convolutions without bias, each followed by batch normalisation with running statistics and
    ReLU, in float32 at the highest precision that the device has: published distances need it.
    Submodules carry the names of the published weights.

    Args:
      rngs: draws the parameters.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(ConvNorm, rngs=rngs)
        self.Conv2d_1a_3x3 = conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, (3, 3), padding="VALID")
        self.Conv2d_2b_3x3 = conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = conv(80, 192, (3, 3), padding="VALID")
        self.Mixed_5b = BlockA(192, 32, conv)
        self.Mixed_5c = BlockA(256, 64, conv)
        self.Mixed_5d = BlockA(288, 64, conv)
        self.Mixed_6a = BlockB(288, conv)
        self.Mixed_6b = BlockC(128, conv)
        self.Mixed_6c = BlockC(160, conv)
        self.Mixed_6d = BlockC(160, conv)
        self.Mixed_6e = BlockC(192, conv)
        self.Mixed_7a = BlockD(conv)
        self.Mixed_7b = BlockE(1280, _average_pool, conv)
        self.Mixed_7c = BlockE(2048, _max_pool, conv)

    def __call__(self, x_BHWC: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """The 2048 features of the last average pool, over which the FID is computed.

        Args:
          x_BHWC: images as a protocol of `efae_jax.models.frechet_features` prepares them.
        """
        return self.taps(x_BHWC)[2048]

    def taps(self, x_BHWC: Float[Array, "B 299 299 3"]) -> dict[int, Float[Array, "B D"]]:
        """Features averaged over positions, by their number.

        64 and 192 after the first and the second max pool, 768 after Mixed_6e, 2048 at the end.
        """
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BHWC)))
        h = _max_pool(h, stride=2)
        taps = {64: _pooled(h)}
        h = _max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h)), stride=2)
        taps[192] = _pooled(h)
        h = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h))))
        h = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(h))))
        taps[768] = _pooled(h)
        taps[2048] = _pooled(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(h))))
        return taps


class ConvNorm(nnx.Module):
    """Convolution, batch normalisation with running statistics, ReLU.

    At stride 2 there is no padding; at stride 1 the size is kept, unless told otherwise.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: str | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            n_in,
            n_out,
            kernel,
            strides=stride,
            padding=padding or ("SAME" if stride == 1 else "VALID"),
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        self.bn = FrozenBatchNorm(n_out)

    def __call__(self, x_BhwC: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        return jax.nn.relu(self.bn(self.conv(x_BhwC)))


class FrozenBatchNorm(nnx.Module):
    """scale (x - mean) / sqrt(var + 1e-3) + bias, with the mean and variance of the training."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.ones(width))

    def __call__(self, x_BhwD: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        spread = self.scale[...] * jax.lax.rsqrt(self.var[...] + BATCH_NORM_EPS)
        return (x_BhwD - self.mean[...]) * spread + self.bias[...]


class BlockA(nnx.Module):
    """1x1; 5x5; two of 3x3; average pool: 224 channels and those of the pooled branch."""

    def __init__(self, n_in: int, n_pool: int, conv: Conv):
        self.branch1x1 = conv(n_in, 64, (1, 1))
        self.branch5x5_1 = conv(n_in, 48, (1, 1))
        self.branch5x5_2 = conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = conv(n_in, 64, (1, 1))
        self.branch3x3dbl_2 = conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = conv(96, 96, (3, 3))
        self.branch_pool = conv(n_in, n_pool, (1, 1))

    def __call__(self, x: Array) -> Array:
        return _joined(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average_pool(x)),
        )


class BlockB(nnx.Module):
    """3x3; two of 3x3; max pool: all at stride 2 in the end; 480 channels and its input's."""

    def __init__(self, n_in: int, conv: Conv):
        self.branch3x3 = conv(n_in, 384, (3, 3), stride=2)
        self.branch3x3dbl_1 = conv(n_in, 64, (1, 1))
        self.branch3x3dbl_2 = conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = conv(96, 96, (3, 3), stride=2)

    def __call__(self, x: Array) -> Array:
        return _joined(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            _max_pool(x, stride=2),
        )


class BlockC(nnx.Module):
    """1x1; 1x7 and 7x1; twice 7x1 and 1x7; average pool: 768 channels."""

    def __init__(self, width: int, conv: Conv):
        self.branch1x1 = conv(768, 192, (1, 1))
        self.branch7x7_1 = conv(768, width, (1, 1))
        self.branch7x7_2 = conv(width, width, (1, 7))
        self.branch7x7_3 = conv(width, 192, (7, 1))
        self.branch7x7dbl_1 = conv(768, width, (1, 1))
        self.branch7x7dbl_2 = conv(width, width, (7, 1))
        self.branch7x7dbl_3 = conv(width, width, (1, 7))
        self.branch7x7dbl_4 = conv(width, width, (7, 1))
        self.branch7x7dbl_5 = conv(width, 192, (1, 7))
        self.branch_pool = conv(768, 192, (1, 1))

    def __call__(self, x: Array) -> Array:
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _joined(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(twice)),
            self.branch_pool(_average_pool(x)),
        )


class BlockD(nnx.Module):
    """3x3; 1x7, 7x1 and 3x3; max pool: all at stride 2 in the end; 1280 channels."""

    def __init__(self, conv: Conv):
        self.branch3x3_1 = conv(768, 192, (1, 1))
        self.branch3x3_2 = conv(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1 = conv(768, 192, (1, 1))
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, (3, 3), stride=2)

    def __call__(self, x: Array) -> Array:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _joined(
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            _max_pool(x, stride=2),
        )


class BlockE(nnx.Module):
    """1x1; 1x3 beside 3x1; the same after a 3x3; a pool of either kind: 2048 channels."""

    def __init__(self, n_in: int, pool: Callable[[Array], Array], conv: Conv):
        self.pool = pool
        self.branch1x1 = conv(n_in, 320, (1, 1))
        self.branch3x3_1 = conv(n_in, 384, (1, 1))
        self.branch3x3_2a = conv(384, 384, (1, 3))
        self.branch3x3_2b = conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(n_in, 448, (1, 1))
        self.branch3x3dbl_2 = conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1))
        self.branch_pool = conv(n_in, 192, (1, 1))

    def __call__(self, x: Array) -> Array:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _joined(
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(self.pool(x)),
        )


def _joined(*branches_BhwC: Array) -> Array:
    return jnp.concatenate(branches_BhwC, axis=-1)


def _pooled(h_BhwD: Array) -> Array:
    return h_BhwD.mean(axis=(1, 2))


def _average_pool(x_BhwC: Array) -> Array:
    return nnx.avg_pool(x_BhwC, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x_BhwC: Array, stride: int = 1) -> Array:
    padding = "SAME" if stride == 1 else "VALID"
    return nnx.max_pool(x_BhwC, (3, 3), strides=(stride, stride), padding=padding)
