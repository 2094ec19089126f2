"""A change of basis on the latent's channels, and the two embedders that find it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from efae_jax import groups
from efae_jax.models.functional import Net, Params

# How the matrix is kept orthogonal: by a term of the loss, or by what it is made of.
ORTHOGONALITIES = ("soft", "cayley", "expm")
EPS = 1e-5


class Block(nnx.Module):
    """Halves the sides and doubles the channels; then x + conv(GELU(conv(x))) at each position.

    Args:
      width: channels that come in.
      dtype: of the computation; parameters and norms are float32.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        wide = 2 * width
        self.down = nnx.Conv(
            width, wide, (3, 3), strides=2, padding=1, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = _norm(wide, rngs)
        self.expand = nnx.Conv(wide, 2 * wide, (1, 1), dtype=dtype, rngs=rngs)
        self.reduce = nnx.Conv(2 * wide, wide, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x_BhwC: Array) -> Array:
        x = self.norm(self.down(x_BhwC)).astype(x_BhwC.dtype)
        return x + self.reduce(jax.nn.gelu(self.expand(x), approximate=False))


class Embedder(nnx.Module):
    """Some channels of a latent to an embedding: strided blocks, mean over positions, a linear map.

    A latent without positions, [B,C], is taken for one of a single position.

    Args:
      channels: that it sees.
      dimension: of the embedding.
      width: channels before the first block, which doubles them, as every block does.
      blocks: their number.
      scaled: the last layer's output times D^-1/2. Embeddings are of length one, their D entries
        of size D^-1/2; the last layer then works in numbers of size one, without which
        Adam takes some hundred times as many steps. It is no other network: the factor can go
        into the layer's weights (`Disentangler.finished`).
      dtype: of the computation; parameters and norms are float32.
    """

    def __init__(
        self,
        channels: int,
        dimension: int,
        width: int = 4,
        blocks: int = 3,
        *,
        scaled: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.factor = dtype, _factor(dimension, scaled)
        last = width * 2**blocks
        self.conv_in = nnx.Conv(channels, width, (1, 1), dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width * 2**i, dtype=dtype, rngs=rngs) for i in range(blocks)])
        self.norm = _norm(last, rngs)
        self.out = nnx.Linear(last, dimension, dtype=dtype, rngs=rngs)

    def __call__(self, u: Float[Array, "B h w C"] | Float[Array, "B C"]) -> Float[Array, "B D"]:
        u = u[:, None, None] if u.ndim == 2 else u
        h = self.conv_in(u.astype(self.dtype))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h.mean(axis=(1, 2), keepdims=True))[:, 0, 0]
        return self.out(h.astype(self.dtype)).astype(jnp.float32) * self.factor


class Disentangler:
    """u = W z on channels: the first `semantic` of u, and the others, the style channels.

    Two embedders see one part each. W is near to orthogonal by the loss ("soft"; the basis is Q
    of its QR decomposition), or orthogonal at every step (`groups.orthogonal`, of a square of
    free numbers). Either starts as the identity: the raw channels.

    The tree of parameters is {"transform": {"matrix" or "free"}, "semantic", "style"}.

    Args:
      channels: of the latent, C.
      semantic: how many of them are semantic, 1 to C - 1.
      text, image: dimensions of the two embeddings.
      width, blocks, scaled: of the embedders.
      orthogonality: of `ORTHOGONALITIES`.
      dtype: of the embedders' computation.

    Raises:
      ValueError: for another number of semantic channels, or another orthogonality.
    """

    def __init__(
        self,
        channels: int,
        semantic: int,
        text: int,
        image: int,
        *,
        width: int = 4,
        blocks: int = 3,
        scaled: bool = False,
        orthogonality: str = "soft",
        dtype: jnp.dtype = jnp.float32,
    ):
        if not 1 <= semantic < channels:
            raise ValueError(
                f"disentangler: {semantic} semantic of {channels} channels; allowed are 1 to "
                f"{channels - 1}"
            )
        if orthogonality not in ORTHOGONALITIES:
            raise ValueError(
                f"disentangler: orthogonality {orthogonality!r} is not one of "
                f"{', '.join(ORTHOGONALITIES)}"
            )
        self.channels, self.semantic, self.orthogonality = channels, semantic, orthogonality
        self.factors = {"semantic": _factor(text, scaled), "style": _factor(image, scaled)}
        options = {"width": width, "blocks": blocks, "scaled": scaled, "dtype": dtype}
        self.embedders = {
            "semantic": Net(lambda rngs: Embedder(semantic, text, rngs=rngs, **options)),
            "style": Net(lambda rngs: Embedder(channels - semantic, image, rngs=rngs, **options)),
        }

    def init(self, key: PRNGKeyArray) -> Params:
        """Embedders drawn at random, and the identity."""
        if self.orthogonality == "soft":
            transform = {"matrix": jnp.eye(self.channels)}
        else:
            transform = {"free": jnp.zeros((self.channels, self.channels))}
        keys = jax.random.split(key, len(self.embedders))
        nets = zip(self.embedders.items(), keys, strict=True)
        return {"transform": transform, **{name: net.init(key) for (name, net), key in nets}}

    def matrix(self, params: Params) -> Float[Array, "C C"]:
        """W as it is trained."""
        if self.orthogonality == "soft":
            return params["transform"]["matrix"]
        return groups.orthogonal(params["transform"]["free"], self.orthogonality)

    def basis(self, params: Params) -> Float[Array, "C C"]:
        """Q, the orthogonal matrix that is the result."""
        W = self.matrix(params)
        return groups.qr_basis(W) if self.orthogonality == "soft" else W

    def finished(self, params: Params) -> Params:
        """The parameters as the published program has them: the matrix Q, unscaled embedders."""
        found = {"transform": {"matrix": self.basis(params)}}
        for name, factor in self.factors.items():
            out = jax.tree.map(lambda v, f=factor: v * f, params[name]["out"])
            found[name] = {**params[name], "out": out}
        return found

    def embed(
        self, params: Params, u: Float[Array, "B ... C"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B I"]]:
        """The embeddings of u's semantic and of its style channels."""
        parts = {"semantic": u[..., : self.semantic], "style": u[..., self.semantic :]}
        return tuple(self.embedders[name](params[name], part) for name, part in parts.items())


def change_channels(matrix: Float[Array, "K C"], z: Float[Array, "... C"]) -> Float[Array, "... K"]:
    """u = W z at every position; z = W^T u with the transposed matrix of an orthogonal one."""
    # Full precision: accelerators would round the factors, and with them what is orthogonal.
    return jnp.einsum("kc,...c->...k", matrix, z, precision=jax.lax.Precision.HIGHEST)


def build_disentangler(config: Any, dtype: jnp.dtype = jnp.float32) -> Disentangler:
    """The disentangler that `config.model` and `config.data` describe.

    Raises:
      ValueError: one line, for what does not fit.
    """
    model, data = config.model, config.data
    return Disentangler(
        data.latent[-1],
        model.semantic,
        data.text,
        data.image,
        width=model.width,
        blocks=model.blocks,
        scaled=model.scaled,
        orthogonality=model.orthogonality,
        dtype=dtype,
    )


def _factor(dimension: int, scaled: bool) -> float:
    return dimension**-0.5 if scaled else 1.0


def _norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Over positions and channels together, in float32; scale and bias per channel."""
    return nnx.GroupNorm(
        width, num_groups=1, epsilon=EPS, use_fast_variance=False, dtype=jnp.float32, rngs=rngs
    )
