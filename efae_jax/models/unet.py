"""A convolutional UNet as velocity field, conditioned on a latent at each of its resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from efae_jax.models.layers import (
    LatentGrid,
    TimeEmbedding,
    group_norm,
    modulate,
    precondition,
    zero_conv,
)


class ConditionedBlock(nnx.Module):
    """Residual block; a vector modulates its inner norm, a latent is added at each position.

    h = conv(SiLU(norm(x))) + latent; x + conv(SiLU(norm(h) (1 + scale(c)) + shift(c))),
    the last convolution starting at zero. With n_latent = 0 there is no latent to add.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_latent: int,
        n_vector: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.spatial = n_latent > 0
        if self.spatial:
            self.latent = nnx.Conv(n_latent, n_out, (1, 1), dtype=dtype, rngs=rngs)
        self.norm1 = group_norm(n_in, rngs=rngs)
        self.conv1 = nnx.Conv(n_in, n_out, (3, 3), dtype=dtype, rngs=rngs)
        self.vector = nnx.Linear(n_vector, 2 * n_out, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(n_out, rngs=rngs, affine=False)
        self.conv2 = zero_conv(n_out, n_out, 3, dtype=dtype, rngs=rngs)
        self.project = n_in != n_out
        if self.project:
            self.skip = nnx.Conv(n_in, n_out, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array, z_BHWC: Array | None, c_BD: Array) -> Array:
        dtype = x_BHWC.dtype
        h = self.conv1(jax.nn.silu(self.norm1(x_BHWC)).astype(dtype))
        if self.spatial:
            h = h + self.latent(z_BHWC)
        shift, scale = jnp.split(self.vector(jax.nn.silu(c_BD))[:, None, None], 2, axis=-1)
        h = self.conv2(jax.nn.silu(modulate(self.norm2(h), shift, scale)).astype(dtype))
        return h + (self.skip(x_BHWC) if self.project else x_BHWC)


class UNet(nnx.Module):
    """Velocity field v(x_t, t, z) on images of any side that stem * 2^(levels - 1) divides.

    A patchifying convolution, levels of residual blocks with strided convolutions down
    and nearest-neighbour upsampling back, skip connections between equal resolutions.
    A spatial latent is laid over the finest level (`LatentGrid`) and averaged for the
    coarser ones; a vector latent joins the time embedding, which modulates every block.

    Args:
      channels: of the images.
      widths: one per level, multiples of 8.
      blocks: residual blocks per level, on the way down and on the way up.
      stem: side of the patches that the first convolution takes.
      latent_channels: C.
      factor: image side / latent side, or None for a vector latent.
      data_std, dtype, remat: as for `DiT`.

    Raises:
      ValueError: when sizes do not fit, naming those that do.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        stem: int,
        latent_channels: int,
        factor: int | None,
        *,
        data_std: float = 0.5,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stem_size = stem
        self.multiple = stem * 2 ** (len(widths) - 1)
        self.data_std, self.dtype, self.remat = data_std, dtype, remat
        n_vector = 4 * widths[0]
        self.spatial = factor is not None
        if self.spatial:
            n_latent = widths[0]
            self.latent = LatentGrid(
                latent_channels, n_latent, factor, stem, dtype=dtype, rngs=rngs
            )
        else:
            n_latent = 0
            self.latent = nnx.Linear(latent_channels, n_vector, dtype=dtype, rngs=rngs)

        def block(n_in: int, n_out: int) -> ConditionedBlock:
            return ConditionedBlock(n_in, n_out, n_latent, n_vector, dtype=dtype, rngs=rngs)

        self.time = TimeEmbedding(n_vector, dtype=dtype, rngs=rngs)
        self.stem = nnx.Conv(
            channels, widths[0], (stem, stem), strides=stem, dtype=dtype, rngs=rngs
        )
        self.encoder, self.down = nnx.List([]), nnx.List([])
        skips, width = [widths[0]], widths[0]
        for level, w in enumerate(widths):
            if level:
                self.down.append(nnx.Conv(width, width, (3, 3), strides=2, dtype=dtype, rngs=rngs))
                skips.append(width)
            self.encoder.append(nnx.List([]))
            for _ in range(blocks):
                self.encoder[level].append(block(width, w))
                width = w
                skips.append(w)
        self.middle = block(width, width)
        self.decoder, self.up = nnx.List([]), nnx.List([])
        for level, w in reversed(list(enumerate(widths))):
            stage = nnx.List([])
            for _ in range(blocks + 1):
                stage.append(block(width + skips.pop(), w))
                width = w
            self.decoder.append(stage)
            if level:
                self.up.append(nnx.Conv(width, width, (3, 3), dtype=dtype, rngs=rngs))
        self.norm = group_norm(width, rngs=rngs)
        self.head = zero_conv(width, stem * stem * channels, 3, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], t_B: Float[Array, " B"], z: Float[Array, "B ..."]
    ) -> Float[Array, "B H W C"]:
        _, height, width, _ = x_BHWC.shape
        m = self.multiple
        if height % m or width % m:
            raise ValueError(
                f"UNet: image {height}x{width}, but its levels need sides that are multiples of {m}"
            )
        c_BD = self.time(t_B)
        latents: dict[int, Array] = {}
        if self.spatial:
            latents = self._latents(z, height, width)
        else:
            c_BD = c_BD + self.latent(z.astype(self.dtype))
        p = self.stem_size

        def run(block: ConditionedBlock, h: Array) -> Array:
            call = jax.checkpoint(block.__call__) if self.remat else block
            return call(h, latents.get(h.shape[1]), c_BD)

        h = self.stem(x_BHWC.astype(self.dtype))
        skips = [h]
        for level, stage in enumerate(self.encoder):
            if level:
                h = self.down[level - 1](h)
                skips.append(h)
            for block in stage:
                h = run(block, h)
                skips.append(h)
        h = run(self.middle, h)
        for level, stage in enumerate(self.decoder):
            for block in stage:
                h = run(block, jnp.concatenate([h, skips.pop()], axis=-1))
            if level < len(self.up):
                h = self.up[level](repeat(h, "b h w c -> b (h p) (w q) c", p=2, q=2))
        out = self.head(jax.nn.silu(self.norm(h)).astype(self.dtype))
        out = rearrange(out, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        return precondition(out, x_BHWC, t_B, self.data_std)

    def _latents(self, z: Array, height: int, width: int) -> dict[int, Array]:
        """The spatial latent at every level, by the number of rows."""
        finest = self.latent(z, height, width)
        return {
            finest.shape[1] // k: reduce(finest, "b (h p) (w q) d -> b h w d", "mean", p=k, q=k)
            for k in (2**level for level in range(len(self.encoder)))
        }
