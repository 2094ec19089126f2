"""Exact equivariance without training: averages of a function over the group."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from efae_jax.groups.elements import Group, act_image
from efae_jax.groups.representations import act_latent


def _elements(
    group: Group, batch: int, key: Key[Array, ""] | None, subset: int | None
) -> Int[Array, "k B"]:
    """All elements for every example, or `subset` different random ones for each."""
    all_n = jnp.arange(group.order)
    if subset is None:
        return jnp.broadcast_to(all_n[:, None], (group.order, batch))
    return jax.vmap(lambda k: jax.random.permutation(k, all_n)[:subset], out_axes=1)(
        jax.random.split(key, batch)
    )


def _average(group: Group, key, subset: int | None, term: Callable) -> Callable:
    """fn'(*args) = mean over g of term(g_B, *args), the batch taken from the first argument."""
    if (key is None) != (subset is None):
        raise ValueError("symmetrisation over a random subset needs both `key` and `subset`")
    if subset is not None and not 1 <= subset <= group.order:
        raise ValueError(
            f"symmetrisation: subset {subset} of group {group.name!r}: allowed 1..{group.order}"
        )

    def averaged(*args):
        g_kB = _elements(group, args[0].shape[0], key, subset)
        return jax.vmap(lambda g_B: term(g_B, *args))(g_kB).mean(0)

    return averaged


def symmetrize_encoder(
    group: Group,
    matrices: np.ndarray | Float[Array, "n C C"],
    encode: Callable,
    key: Key[Array, ""] | None = None,
    subset: int | None = None,
) -> Callable:
    """E_G(x) = 1/|G| sum_g rho(g)^-1 E(g x), so that E_G(g x) = rho(g) E_G(x) whatever E is.

    The |G| evaluations are one batch, |G| times as large (`jax.vmap`). With `key` and `subset`
    every example's average is over that many different random elements: cheaper, unbiased, and
    equivariant only on the average. The draw is fixed by `key`: symmetrise anew for another.

    Args:
      group: the group.
      matrices: rho, [order, C, C].
      encode: x_BHWC -> z, with or without positions.
      key: for the random subset.
      subset: number of elements, 1 .. order; None for all, the exact form.

    Returns:
      A function with the signature of `encode`.
    """
    inverse = jnp.asarray(group.inverse)

    def term(g_B, x_BHWC):
        z = encode(act_image(group, g_B, x_BHWC))
        return act_latent(group, matrices, inverse[g_B], z)

    return _average(group, key, subset, term)


def symmetrize_decoder(
    group: Group,
    matrices: np.ndarray | Float[Array, "n C C"],
    decode: Callable,
    key: Key[Array, ""] | None = None,
    subset: int | None = None,
) -> Callable:
    """D_G(z, e) = 1/|G| sum_g g^-1 D(rho(g) z, g e), so that D_G(rho(g) z, g e) = g D_G(z, e).

    `decode` maps z, and optionally noise e_BHWC that a generative decoder starts from, to images.
    See `symmetrize_encoder` for the other arguments.
    """
    inverse = jnp.asarray(group.inverse)

    def term(g_B, z, *noise_BHWC):
        noise_BHWC = [act_image(group, g_B, e_BHWC) for e_BHWC in noise_BHWC]
        x_BHWC = decode(act_latent(group, matrices, g_B, z), *noise_BHWC)
        return act_image(group, inverse[g_B], x_BHWC)

    return _average(group, key, subset, term)


def symmetrize_velocity(
    group: Group,
    matrices: np.ndarray | Float[Array, "n C C"],
    velocity: Callable,
    key: Key[Array, ""] | None = None,
    subset: int | None = None,
) -> Callable:
    """v_G(x, t, z) = 1/|G| sum_g g^-1 v(g x, t, rho(g) z), equivariant in x and z together.

    Samples of the flow are equivariant too, when the noise that they start from is transformed
    along. A random subset stays the same over the steps of a solver, as `key` is the same.
    `velocity` maps (x_BHWC, t, z) to the shape of x_BHWC; t does not transform. See
    `symmetrize_encoder` for the other arguments.
    """
    inverse = jnp.asarray(group.inverse)

    def term(g_B, x_BHWC, t, z):
        gz = act_latent(group, matrices, g_B, z)
        v_BHWC = velocity(act_image(group, g_B, x_BHWC), t, gz)
        return act_image(group, inverse[g_B], v_BHWC)

    return _average(group, key, subset, term)
