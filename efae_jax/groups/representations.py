"""Orthogonal representations of the groups, and the action on latents that they give."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import expm
from jaxtyping import Array, Float, Int

from efae_jax.groups.elements import Group, act_image, check_indices


class Block(NamedTuple):
    """Channels start .. stop - 1 of a representation transform among themselves, as `name` says."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Representation:
    """A direct sum of named orthogonal representations of a group on `channels` channels.

    Attributes:
      group: the group.
      spec: the text it was made from, such as "12*trivial + 2*sign_h + 2*sign_v".
      matrices: [order, C, C] float32, rho(g) for every element; rho(a) rho(b) = rho(a b).
      blocks: the summands, every copy for itself, in the order of the channels.
    """

    group: Group
    spec: str
    matrices: np.ndarray
    blocks: tuple[Block, ...]

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.matrices.shape[-1]

    @property
    def is_diagonal(self) -> bool:
        """Whether every rho(g) only changes signs of channels."""
        return _is_diagonal(self.matrices)


def _is_diagonal(matrices: np.ndarray) -> bool:
    return not (matrices * (1 - np.eye(matrices.shape[-1]))).any()


def _rotation(quarter_turns: np.ndarray) -> np.ndarray:
    cos, sin = np.array([1, 0, -1, 0]), np.array([0, 1, 0, -1])
    c, s = cos[quarter_turns % 4], sin[quarter_turns % 4]
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def _summands(group: Group) -> dict[str, np.ndarray]:
    """Every named representation of the group: name -> [order, size, size] integers."""
    t, h, v = (1 - 2 * group.bits.astype(int)).T  # the sign of each bit
    named = {"trivial": np.ones(group.order, int)}
    flips = {"z2_h": {"": h}, "z2_v": {"": v}, "z2xz2": {"_h": h, "_v": v}}
    for suffix, sign in flips.get(group.name, {}).items():
        named["sign" + suffix] = sign
        real_imaginary = np.stack([named["trivial"], sign], -1)
        named["conjugate" + suffix] = real_imaginary[:, :, None] * np.eye(2, dtype=int)
    if group.name == "z2xz2":
        named["sign_hv"] = h * v
    elif group.name == "c4":
        turns = np.arange(4)
        named |= {"freq0": named["trivial"], "freq1": _rotation(turns), "freq2": (-1) ** turns}
        named["sign"] = named["freq2"]
    elif group.name == "d4":
        # A2 tells mirrors from rotations; B1 is +1 on the mirrors h and v, B2 on t and a.
        named |= {"A1": named["trivial"], "A2": t * h * v, "B1": t, "B2": h * v, "E": group.plane}
    # regular: g takes the channel of b to the channel of g b.
    named["regular"] = np.eye(group.order, dtype=int)[group.table].swapaxes(1, 2)
    return {name: m.reshape(group.order, *m.shape[1:] or (1, 1)) for name, m in named.items()}


def _parse(group: Group, spec: str) -> list[tuple[str, np.ndarray]]:
    summands = _summands(group)
    terms = []
    for text in spec.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+)\s*\*\s*)?(\w+)\s*(?:\(([-\d,\s]+)\))?\s*", text)
        copies, name, arguments = match.groups() if match else (None, None, None)
        if name == "rope" and group.name == "c4" and arguments:
            try:
                frequencies = [int(k) for k in arguments.split(",")]
            except ValueError:
                raise ValueError(f"representation {spec!r}: rope needs whole numbers") from None
            term = [(f"rope({k})", _rotation(k * np.arange(4))) for k in frequencies]
        elif name in summands and arguments is None:
            term = [(name, summands[name])]
        else:
            rope = ["rope(k,...)"] if group.name == "c4" else []
            raise ValueError(
                f"representation {spec!r} of group {group.name!r}: {text.strip()!r} is not one of "
                f"{', '.join([*summands, *rope])}, alone or as 'copies*name', joined by '+'"
            )
        terms += term * int(copies or 1)
    if not terms:
        raise ValueError(f"representation {spec!r} has no channels: at least one is needed")
    return terms


def representation(group: Group, spec: str) -> Representation:
    """The representation that `spec` describes, channels in the order of the text.

    `spec` joins terms "name" or "copies*name" by "+". Names (channels in brackets):

    - any group: trivial (1); regular (order: g takes the channel of b to that of g b);
    - z2_h, z2_v: sign (1); conjugate (2: real, imaginary part, the flip conjugates);
    - z2xz2: sign_h, sign_v, sign_hv (1 each: sign_h is -1 on h and on r180, sign_hv on h and on
      v); conjugate_h, conjugate_v (2 each);
    - c4: freq0 = trivial (1), freq1 (2: rotation by k * 90 degrees), freq2 = sign (1);
      rope(k1,k2,...) (2 for each: rotation of the pair by k_i quarter turns per quarter turn of
      the image, as rotary position embeddings do);
    - d4: A1 = trivial, A2 (-1 on mirrors), B1 (+1 on h, v, r180), B2 (+1 on t, a, r180) (1 each),
      E (2: a vector (row, column) in the plane).

    Example, Z2 x Z2 on 16 channels:
    representation(group("z2xz2"), "12*trivial + 2*sign_h + 2*sign_v").

    Raises:
      ValueError: a name that the group does not have, or no channel at all.
    """
    terms = _parse(group, spec)
    stops = np.cumsum([m.shape[-1] for _, m in terms])
    matrices = np.zeros((group.order, stops[-1], stops[-1]), np.float32)
    blocks = []
    for (name, m), stop in zip(terms, stops.tolist(), strict=True):
        start = stop - m.shape[-1]
        matrices[:, start:stop, start:stop] = m
        blocks.append(Block(name, start, stop))
    matrices.setflags(write=False)
    return Representation(group, spec, matrices, tuple(blocks))


def act_latent(
    group: Group,
    matrices: np.ndarray | Float[Array, "n C C"],
    g_B: Int[Array, " B"],
    z: Float[Array, "B h w C"] | Float[Array, "B C"],
) -> Float[Array, "B h w C"] | Float[Array, "B C"]:
    """(g z)(p) = rho(g) z(g^-1 p): permutes positions as `act_image`, then rho(g) on channels.

    Args:
      group: the group.
      matrices: rho, [order, C, C]. A NumPy array is looked at when the program is built: where it
        is diagonal, the action costs one multiplication. A JAX array may depend on parameters.
      g_B: index of each example's element.
      z: latents with positions, or vectors; the result keeps shape and type.

    Raises:
      ValueError: `matrices` are not one C x C matrix per element, or see `act_image`.
    """
    if z.ndim not in (2, 4):
        raise ValueError(f"latents: got shape {z.shape}, need [batch, (height, width,) channels]")
    channels = z.shape[-1]
    if matrices.shape != (group.order, channels, channels):
        raise ValueError(
            f"latents have {channels} channels, but the matrices of group {group.name!r} are "
            f"{matrices.shape}: need {(group.order, channels, channels)}"
        )
    check_indices(group, g_B, z.shape[0])
    if z.ndim == 4:
        z = act_image(group, g_B, z)
    if isinstance(matrices, np.ndarray) and _is_diagonal(matrices):
        signs_nC = jnp.asarray(np.diagonal(matrices, axis1=1, axis2=2), z.dtype)
        return z * signs_nC[g_B].reshape(z.shape[0], *[1] * (z.ndim - 2), channels)
    # Full precision: accelerators would round the factors, and the group law with them.
    out = jnp.einsum(
        "bij,b...j->b...i", jnp.asarray(matrices)[g_B], z, precision=jax.lax.Precision.HIGHEST
    )
    return out.astype(z.dtype)


def orthogonal(free_CxC: Float[Array, "C C"], kind: str = "cayley") -> Float[Array, "C C"]:
    """An orthogonal matrix Q, Q^T Q = 1, from an unconstrained one; differentiable; 0 gives 1.

    With the skew part A = (F - F^T) / 2: Q = (1 + A)^-1 (1 - A) for 'cayley' (every rotation that
    has no eigenvalue -1), Q = exp(A) for 'expm' (every rotation). One step Q (3 - Q^T Q) / 2
    afterwards squares what rounding has left of Q^T Q - 1, which large A would let grow.

    Raises:
      ValueError: the matrix is not square, or another kind.
    """
    if free_CxC.ndim != 2 or free_CxC.shape[0] != free_CxC.shape[1]:
        raise ValueError(f"orthogonal: got shape {free_CxC.shape}, need a square matrix")
    if kind not in ("cayley", "expm"):
        raise ValueError(f"orthogonal: unknown kind {kind!r}: allowed are cayley, expm")
    skew = (free_CxC - free_CxC.T) / 2
    one = jnp.eye(len(skew), dtype=skew.dtype)
    with jax.default_matmul_precision("highest"):
        Q = jnp.linalg.solve(one + skew, one - skew) if kind == "cayley" else expm(skew)
        return Q @ (3 * one - Q.T @ Q) / 2


def change_basis(
    matrices: np.ndarray | Float[Array, "n C C"], Q: Float[Array, "C C"]
) -> Float[Array, "n C C"]:
    """Q rho(g) Q^T for every g: the same representation in another orthonormal basis.

    The group law holds for every orthogonal Q, so that Q may be learned (see `orthogonal`).
    """
    return jnp.einsum("ij,njk,lk->nil", Q, matrices, Q, precision=jax.lax.Precision.HIGHEST)
