"""The networks of the original EFAE: a vector encoder and a LLaMA-style diffusion transformer.

Their architecture is the published one, so that PyTorch weights can be exchanged
(`efae_jax.convert.efae`). How they start is `config.model.start`. "flax": kernels by Flax's
defaults; the modulations and the head at zero, so that a new transformer's blocks are the identity
and it predicts zero velocity (Peebles & Xie 2023, arXiv:2212.09748). "pytorch", as published:
all layers as PyTorch draws them (`starts.pytorch_start`), the head's last layer and the patches'
bias at zero; blocks do not start as the identity, and the latent starts a fifth as large.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LATENT_DIM = 256
_ENCODER_WIDTHS = (32, 64, 128, LATENT_DIM)
_SMALLEST_SIDE = 2 ** len(_ENCODER_WIDTHS)
_STEM_GROUPS = 32
_FREQUENCIES = 128


class OriginalEncoder(nnx.Module):
    """Four strided convolutions and the mean over positions: an image to 256 numbers.

    Convolutions are 4x4, stride 2, padding 1, with ReLU between them and none
    after the last.

    Args:
      channels: of the image.
      rngs: draws the parameters (float32).
      dtype: of the computation; the mean and the result are float32.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        sizes = (channels, *_ENCODER_WIDTHS)
        self.convs = nnx.List(
            nnx.Conv(sizes[i], sizes[i + 1], (4, 4), strides=2, padding=1, dtype=dtype, rngs=rngs)
            for i in range(len(_ENCODER_WIDTHS))
        )

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Encodes images in [-1, 1] to latents [B, 256].

        Raises:
          ValueError: a side below 16 pixels, of which the convolutions leave nothing.
        """
        height, width = x_BHWC.shape[1:3]
        if min(height, width) < _SMALLEST_SIDE:
            raise ValueError(
                f"image sides {height}x{width} are too small for the original encoder: "
                f"each must be at least {_SMALLEST_SIDE}"
            )
        h_BhwC = x_BHWC
        for i, conv in enumerate(self.convs):
            h_BhwC = conv(h_BhwC if i == 0 else jax.nn.relu(h_BhwC))
        return jnp.mean(h_BhwC.astype(jnp.float32), axis=(1, 2))


class OriginalDiT(nnx.Module):
    """Velocity field v(x, t, z): a diffusion transformer conditioned on a latent vector.

    A convolutional stem, patches to tokens, `depth` blocks modulated by time and
    latent, and a modulated linear head back to pixels. Parameters are float32;
    normalisations and the softmax are computed in float32 whatever `dtype` is.

    Args:
      channels: of the image.
      width: of the tokens, a multiple of 64 (the stem normalises width/2 channels in 32 groups).
      depth: number of blocks.
      heads: of the attention; must divide `width` into heads of even width.
      patch: side of a patch in pixels.
      latent_dim: numbers in the latent.
      rngs: draws the parameters.
      dtype: of the computation.
      remat: recompute each block in the backward pass instead of storing its inside.

    Raises:
      ValueError: a width or a number of heads that is not as above.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        latent_dim: int = LATENT_DIM,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
    ):
        if width < 1 or width % (2 * _STEM_GROUPS):
            raise ValueError(
                f"width {width} of the original DiT must be a multiple of {2 * _STEM_GROUPS}: "
                f"its stem normalises width/2 channels in {_STEM_GROUPS} groups"
            )
        if heads < 1 or width % (2 * heads):
            raise ValueError(
                f"{heads} heads do not divide width {width} into heads of even width; allowed: "
                + ", ".join(str(n) for n in range(1, width // 2 + 1) if width % (2 * n) == 0)
            )
        self.patch, self.latent_dim, self.remat = patch, latent_dim, remat
        condition = min(width, 1024)
        self.stem = Stem(channels, width // 2, rngs=rngs, dtype=dtype)
        self.patch_embed = nnx.Linear(patch**2 * (width // 2), width, dtype=dtype, rngs=rngs)
        self.time_in = nnx.Linear(2 * _FREQUENCIES, condition, dtype=dtype, rngs=rngs)
        self.time_out = nnx.Linear(condition, condition, dtype=dtype, rngs=rngs)
        self.latent_embed = nnx.Linear(latent_dim, condition, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            Block(width, heads, condition, rngs=rngs, dtype=dtype) for _ in range(depth)
        )
        self.head = Head(width, patch**2 * channels, condition, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x_BHWC: Float[Array, "B H W C"],
        t_B: Float[Array, " B"],
        z_BD: Float[Array, "B D"],
    ) -> Float[Array, "B H W C"]:
        """The velocity, float32, at time t in [0, 1] (1 is noise) of the noisy image x.

        Raises:
          ValueError: sides that `patch` does not divide; latents that are not [B, latent_dim].
        """
        batch, height, width, _ = x_BHWC.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"image sides {height}x{width} are not allowed with patch {self.patch}: each must "
                f"be a multiple of {self.patch}, for instance "
                f"{self._nearest(height)}x{self._nearest(width)}"
            )
        if z_BD.shape != (batch, self.latent_dim):
            raise ValueError(
                f"latents of shape {z_BD.shape} are not allowed: the original DiT takes "
                f"[batch, {self.latent_dim}], here {(batch, self.latent_dim)}"
            )
        c_BD = self.time_in(time_features(t_B))
        c_BD = self.time_out(jax.nn.silu(c_BD)) + self.latent_embed(z_BD)

        h_BTD = rearrange(
            self.stem(x_BHWC), "b (h p) (w q) c -> b (h w) (c p q)", p=self.patch, q=self.patch
        )
        h_BTD = self.patch_embed(h_BTD)
        for block in self.blocks:
            h_BTD = (_rematerialised(block) if self.remat else block)(h_BTD, c_BD)
        return rearrange(
            self.head(h_BTD, c_BD).astype(jnp.float32),
            "b (h w) (p q c) -> b (h p) (w q) c",
            h=height // self.patch,
            p=self.patch,
            q=self.patch,
        )

    def _nearest(self, side: int) -> int:
        return max(1, round(side / self.patch)) * self.patch


class Stem(nnx.Module):
    """Conv 5x5, SiLU, group norm, twice, at the image's own resolution."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.conv1 = nnx.Conv(channels, features, (5, 5), dtype=dtype, rngs=rngs)
        self.norm1 = _group_norm(features, rngs)
        self.conv2 = nnx.Conv(features, features, (5, 5), dtype=dtype, rngs=rngs)
        self.norm2 = _group_norm(features, rngs)

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h_BHWD = self.norm1(jax.nn.silu(self.conv1(x_BHWC)))
        return self.norm2(jax.nn.silu(self.conv2(h_BHWD)))


class Block(nnx.Module):
    """x + gate * attention(modulated norm(x)), then the same with a SwiGLU feed-forward."""

    def __init__(self, width: int, heads: int, condition: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.modulation = _zero_linear(condition, 6 * width, rngs, dtype)
        self.attention_norm = _layer_norm(width, rngs)
        self.attention = Attention(width, heads, rngs=rngs, dtype=dtype)
        self.feed_forward_norm = _layer_norm(width, rngs)
        self.feed_forward = SwiGLU(width, rngs=rngs, dtype=dtype)

    def __call__(
        self, h_BTD: Float[Array, "B T D"], c_BD: Float[Array, "B K"]
    ) -> Float[Array, "B T D"]:
        modulation_B6D = self.modulation(jax.nn.silu(c_BD))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation_B6D, 6, axis=-1)
        y_BTD = self.attention_norm(h_BTD) * (1 + scale1) + shift1
        h_BTD = h_BTD + gate1 * self.attention(y_BTD)
        y_BTD = self.feed_forward_norm(h_BTD) * (1 + scale2) + shift2
        return h_BTD + gate2 * self.feed_forward(y_BTD)


class Attention(nnx.Module):
    """Self-attention: q and k are normalised over the whole width, then rotated by position."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.heads = heads
        self.query = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.query_norm = _layer_norm(width, rngs)
        self.key_norm = _layer_norm(width, rngs)

    def __call__(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q_BTNH, k_BTNH, v_BTNH = (
            rearrange(y_BTD, "b t (n h) -> b t n h", n=self.heads)
            for y_BTD in (
                self.query_norm(self.query(h_BTD)),
                self.key_norm(self.key(h_BTD)),
                self.value(h_BTD),
            )
        )
        q_BTNH, k_BTNH = (rotary(y).astype(v_BTNH.dtype) for y in (q_BTNH, k_BTNH))
        o_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH)
        return self.out(rearrange(o_BTNH, "b t n h -> b t (n h)"))


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x); hidden width 8/3 of the width, up to a multiple of 256."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        hidden = 256 * math.ceil((8 * width // 3) / 256)
        self.gate = nnx.Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(h_BTD)) * self.up(h_BTD))


class Head(nnx.Module):
    """Layer norm without parameters, modulated by the condition, and a linear layer from zero."""

    def __init__(
        self, width: int, features: int, condition: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.modulation = _zero_linear(condition, 2 * width, rngs, dtype)
        self.norm = nnx.LayerNorm(
            width,
            epsilon=1e-6,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            dtype=jnp.float32,
            rngs=rngs,
        )
        self.linear = _zero_linear(width, features, rngs, dtype)

    def __call__(
        self, h_BTD: Float[Array, "B T D"], c_BD: Float[Array, "B K"]
    ) -> Float[Array, "B T F"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c_BD))[:, None], 2, axis=-1)
        return self.linear(self.norm(h_BTD) * (1 + scale) + shift)


def time_features(t_B: Float[Array, " B"]) -> Float[Array, "B 256"]:
    """[cos(t w_i), sin(t w_i)] with w_i = 10000^(-i/128), i = 0..127, in float32.

    t stays in [0, 1]: it is not scaled to 1000 steps.
    """
    frequencies = np.exp(-math.log(10000.0) * np.arange(_FREQUENCIES) / _FREQUENCIES)
    angles_BF = t_B.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles_BF), jnp.sin(angles_BF)], axis=-1)


def rotary(x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Rotary position embedding over the token index, in float32 (arXiv:2104.09864).

    Channels 2i and 2i+1 are the real and imaginary part of a number that token n
    turns by the angle n * 10000^(-2i/H).
    """
    tokens, head_width = x_BTNH.shape[1], x_BTNH.shape[3]
    frequencies = 10000.0 ** (-np.arange(0, head_width, 2) / head_width)
    angles_T1F = (np.arange(tokens)[:, None] * frequencies)[:, None]
    cos, sin = np.cos(angles_T1F).astype(np.float32), np.sin(angles_T1F).astype(np.float32)
    x_BTNH = x_BTNH.astype(jnp.float32)
    real, imag = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    turned = jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
    return turned.reshape(x_BTNH.shape)


def _rematerialised(block: Block):
    @jax.checkpoint
    def run(h_BTD: Array, c_BD: Array) -> Array:
        return block(h_BTD, c_BD)

    return run


# The two-pass variance: the one-pass form loses digits where the mean dwarfs the spread.
def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def _group_norm(features: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        features,
        num_groups=_STEM_GROUPS,
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )


def _zero_linear(inputs: int, outputs: int, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Linear:
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(inputs, outputs, kernel_init=zeros, dtype=dtype, rngs=rngs)
