"""The subgroups of the symmetries of the square that are used here, and their action on images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Every symmetry of the square is "transpose?, then flip left-right?, then flip top-bottom?".
_BITS = {
    "e": (0, 0, 0),  # identity
    "h": (0, 1, 0),  # mirror left-right: flips the axis W
    "v": (0, 0, 1),  # mirror top-bottom: flips the axis H
    "r180": (0, 1, 1),
    "t": (1, 0, 0),  # mirror at the main diagonal: exchanges H and W
    "r90": (1, 0, 1),  # counter-clockwise, as jnp.rot90(x, k=1, axes=(1, 2))
    "r270": (1, 1, 0),
    "a": (1, 1, 1),  # mirror at the other diagonal
}


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A finite group of symmetries of the square; its elements are numbered 0 .. order - 1.

    Attributes:
      name: the key in `GROUPS`.
      elements: names of the elements, the identity first: 'e', 'h' and 'v' (mirror left-right,
        top-bottom), 'r90', 'r180', 'r270' (counter-clockwise), 't' and 'a' (mirror at the main
        and at the other diagonal).
      bits: [order, 3] bool, whether an element transposes, then flips W, then flips H.
      plane: [order, 2, 2] int, the element as a signed permutation of (row, column) vectors.
      table: [order, order] int, table[a, b] = index of the product a b, in which b acts first.
      inverse: [order] int, index of the inverse.

    Groups compare and hash by identity, so that they may be static arguments of `jax.jit`.
    """

    name: str
    elements: tuple[str, ...]
    bits: np.ndarray
    plane: np.ndarray
    table: np.ndarray
    inverse: np.ndarray

    @property
    def order(self) -> int:
        """Number of elements, |G|."""
        return len(self.elements)

    @property
    def needs_square(self) -> bool:
        """Whether some element exchanges the two image axes."""
        return bool(self.bits[:, 0].any())


def _make_group(name: str, elements: tuple[str, ...]) -> Group:
    bits = np.array([_BITS[element] for element in elements], bool)
    transpose, flip_w, flip_h = np.array([[0, 1], [1, 0]]), np.diag([1, -1]), np.diag([-1, 1])
    one = np.eye(2, dtype=int)
    plane = np.stack(
        [
            (flip_h if v else one) @ (flip_w if h else one) @ (transpose if t else one)
            for t, h, v in bits
        ]
    )
    products = np.einsum("aij,bjk->abik", plane, plane)
    # The plane matrices tell all elements apart, so a product is found by comparing with each.
    table = (products[:, :, None] == plane).all((-2, -1)).argmax(-1)
    inverse = (table == 0).argmax(1)
    for array in (bits, plane, table, inverse):
        array.setflags(write=False)
    return Group(name, elements, bits, plane, table, inverse)


GROUPS = {
    name: _make_group(name, elements)
    for name, elements in {
        "trivial": ("e",),
        "z2_h": ("e", "h"),
        "z2_v": ("e", "v"),
        "z2xz2": ("e", "h", "v", "r180"),
        "c4": ("e", "r90", "r180", "r270"),
        "d4": ("e", "r90", "r180", "r270", "h", "v", "t", "a"),
    }.items()
}


def group(name: str) -> Group:
    """The group called `name`; a ValueError that lists the names if there is none."""
    if name not in GROUPS:
        raise ValueError(f"unknown group {name!r}: allowed are {', '.join(GROUPS)}")
    return GROUPS[name]


def check_indices(group: Group, g_B: Int[Array, " B"], batch: int) -> None:
    """Raises a ValueError unless `g_B` is one integer for each of `batch` examples."""
    if jnp.shape(g_B) != (batch,) or not jnp.issubdtype(jnp.result_type(g_B), jnp.integer):
        raise ValueError(
            f"group elements: got shape {jnp.shape(g_B)} of {jnp.result_type(g_B)}, need one "
            f"integer in 0..{group.order - 1} for each of the {batch} examples"
        )


def random_elements(
    group: Group, keys_B: PRNGKeyArray, *, identity: bool = True
) -> Int[Array, " B"]:
    """An element for every key, all of them equally likely: its index in the group.

    Args:
      group: the group.
      keys_B: random keys.
      identity: whether it is among them; it is the only element of the trivial group anyway.
    """
    least = 0 if identity or group.order == 1 else 1
    return jax.vmap(lambda key: jax.random.randint(key, (), least, group.order))(keys_B)


def act_image(
    group: Group, g_B: Int[Array, " B"], x_BHWC: Float[Array, "B H W C"]
) -> Float[Array, "B H W C"]:
    """(g x)(p) = x(g^-1 p): permutes the pixels of every example by its own element.

    A left action: act(a, act(b, x)) = act(a b, x). There is no branch: each of the three bits
    (transpose, flip W, flip H) is one select per example, and bits that no element of the group
    has cost nothing.

    Args:
      group: the group.
      g_B: index of each example's element, in 0 .. order - 1 (not checked: it may be traced).
      x_BHWC: images, or anything else with two positional axes in their place.

    Raises:
      ValueError: the group has rotations by 90 degrees or transpositions and H != W, or the
        shapes do not fit.
    """
    if x_BHWC.ndim != 4:
        raise ValueError(f"images: got shape {x_BHWC.shape}, need [batch, height, width, channels]")
    batch, height, width, _ = x_BHWC.shape
    check_indices(group, g_B, batch)
    if group.needs_square and height != width:
        raise ValueError(
            f"group {group.name!r} turns or transposes images, which needs square ones: "
            f"got height {height}, width {width}"
        )
    bits_B3 = jnp.asarray(group.bits)[g_B]
    steps = (lambda x: x.swapaxes(1, 2), lambda x: x[:, :, ::-1], lambda x: x[:, ::-1])
    for bit, step in enumerate(steps):
        if group.bits[:, bit].any():
            x_BHWC = jnp.where(bits_B3[:, bit, None, None, None], step(x_BHWC), x_BHWC)
    return x_BHWC
