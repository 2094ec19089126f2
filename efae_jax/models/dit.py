"""A diffusion transformer as velocity field, conditioned on a latent position by position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efae_jax.models.attention import attention
from efae_jax.models.layers import (
    LatentGrid,
    TimeEmbedding,
    layer_norm,
    modulate,
    precondition,
    zero_linear,
)


def rotary_angles(rows: int, columns: int, head_width: int) -> Float[np.ndarray, "L F"]:
    """Angles of a two-axis rotary embedding for a grid of tokens.

    The first half of the channel pairs turns with the row, the second half with the
    column, each with frequencies 100^(-i/n) (Heo et al. 2024, arXiv:2403.13298).

    Args:
      rows, columns: the grid; tokens are flattened row by row.
      head_width: channels of a head, a multiple of 4.
    """
    per_axis = head_width // 4
    frequencies = 100.0 ** (-np.arange(per_axis) / per_axis)
    row_L = np.repeat(np.arange(rows), columns)
    column_L = np.tile(np.arange(columns), rows)
    return np.concatenate([row_L[:, None] * frequencies, column_L[:, None] * frequencies], axis=-1)


Turns = tuple[Float[Array, "L 1 F"], Float[Array, "L 1 F"]]


def turns(angles_LF: Float[np.ndarray, "L F"]) -> Turns:
    """Cosines and sines of the angles, as `rotate` takes them.

    They are made here and not in the program, where XLA would merge their formulas into the
    loops over examples, heads and layers: 6% of a training step on a CPU.
    """
    return tuple(f(angles_LF)[:, None].astype(np.float32) for f in (np.cos, np.sin))


def rotate(x_BLHD: Float[Array, "B L H D"], turns: Turns) -> Array:
    """Turns channel pairs (i, i + D/2) by the token's angles; dot products see differences only."""
    cos, sin = turns
    a, b = jnp.split(x_BLHD, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BLHD.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with rotary embedding and RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.q_norm = nnx.RMSNorm(width // heads, dtype=dtype, rngs=rngs)
        self.k_norm = nnx.RMSNorm(width // heads, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, turns: Turns) -> Array:
        batch, length, _ = x_BLD.shape
        # Tokens in one axis: XLA's CPU backend has faster code for layers on [N, D] than on
        # [B, L, D].
        qkv_ND = self.qkv(rearrange(x_BLD, "b l d -> (b l) d"))
        q, k, v = rearrange(qkv_ND, "(b l) (n h d) -> n b l h d", b=batch, n=3, h=self.heads)
        q, k = rotate(self.q_norm(q), turns), rotate(self.k_norm(k), turns)
        y_BLHD = attention(q, k, v)
        y_ND = self.out(rearrange(y_BLHD, "b l h d -> (b l) (h d)"))
        return rearrange(y_ND, "(b l) d -> b l d", l=length)


class Block(nnx.Module):
    """Transformer block whose norms and residuals are modulated by a vector per example.

    Adaptive layer norm with zero-initialised gates (Peebles & Xie 2022, arXiv:2212.09748):
    the block starts as the identity.
    """

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.modulation = zero_linear(width, 6 * width, dtype=dtype, rngs=rngs)
        self.norm_attention = layer_norm(width, rngs=rngs)
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm_mlp = layer_norm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, c_BD: Array, turns: Turns) -> Array:
        m_B1D = jnp.split(self.modulation(jax.nn.silu(c_BD))[:, None], 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = m_B1D
        h = modulate(self.norm_attention(x_BLD), shift_a, scale_a).astype(x_BLD.dtype)
        x_BLD = x_BLD + gate_a * self.attention(h, turns)
        h = modulate(self.norm_mlp(x_BLD), shift_m, scale_m).astype(x_BLD.dtype)
        h_ND = self.mlp_out(jax.nn.gelu(self.mlp_in(rearrange(h, "b l d -> (b l) d"))))
        return x_BLD + gate_m * rearrange(h_ND, "(b l) d -> b l d", b=x_BLD.shape[0])


class DiT(nnx.Module):
    """Velocity field v(x_t, t, z) on images of any side that the patch size divides.

    Tokens are patches of x_t. A spatial latent z[B,h,w,C] is laid over the grid of
    tokens: each latent position conditions the tokens of its own cell, by addition. A
    vector z[B,C] joins the time embedding, which modulates every block.

    Args:
      channels: of the images.
      width, depth, heads: of the transformer; width / heads must be a multiple of 4.
      patch: side of a patch in pixels.
      latent_channels: C.
      factor: image side / latent side; None for a vector latent. `factor` must be a
        multiple of `patch` or the other way round.
      data_std: standard deviation of the pixels, for the preconditioning.
      dtype: of the computation; parameters and norms are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
      ValueError: when sizes do not fit, naming those that do.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        latent_channels: int,
        factor: int | None,
        *,
        data_std: float = 0.5,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if width % heads or width // heads % 4:
            raise ValueError(
                f"DiT width {width} with {heads} heads: width / heads must be a multiple of 4"
            )
        self.patch, self.head_width = patch, width // heads
        self.data_std, self.dtype, self.remat = data_std, dtype, remat
        self.patches = nnx.Linear(patch * patch * channels, width, dtype=dtype, rngs=rngs)
        self.time = TimeEmbedding(width, dtype=dtype, rngs=rngs)
        self.spatial = factor is not None
        if self.spatial:
            self.latent = LatentGrid(latent_channels, width, factor, patch, dtype=dtype, rngs=rngs)
        else:
            self.latent = nnx.Linear(latent_channels, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)])
        self.head_modulation = zero_linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.head_norm = layer_norm(width, rngs=rngs)
        self.head = zero_linear(width, patch * patch * channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], t_B: Float[Array, " B"], z: Float[Array, "B ..."]
    ) -> Float[Array, "B H W C"]:
        _, height, width, _ = x_BHWC.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(
                f"DiT: image {height}x{width}, but patch {p} needs sides that are multiples of {p}"
            )
        rows, columns = height // p, width // p
        x_BLD = rearrange(x_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        x_BLD = self.patches(x_BLD.astype(self.dtype))
        c_BD = self.time(t_B)
        if self.spatial:
            x_BLD = x_BLD + rearrange(self.latent(z, height, width), "b h w d -> b (h w) d")
        else:
            c_BD = c_BD + self.latent(z.astype(self.dtype))
        tables = turns(rotary_angles(rows, columns, self.head_width))
        for block in self.blocks:
            apply = jax.checkpoint(block.__call__) if self.remat else block
            x_BLD = apply(x_BLD, c_BD, tables)
        shift, scale = jnp.split(self.head_modulation(jax.nn.silu(c_BD))[:, None], 2, axis=-1)
        out = self.head(modulate(self.head_norm(x_BLD), shift, scale).astype(self.dtype))
        out = rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=p, q=p)
        return precondition(out, x_BHWC, t_B, self.data_std)
