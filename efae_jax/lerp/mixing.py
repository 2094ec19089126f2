"""Latents between two, channel by channel: which are made, and what they decode to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from efae_jax.api import Model
from efae_jax.basis import Basis
from efae_jax.logs import track

MOST_PAIRED = 32  # channels: their pairs are 496
PIXELS = 2**20  # decoded at a time
SEED = 0  # of the noise that a flow decoder starts from
RECONSTRUCTIONS = ("reconstruction", "target-reconstruction")
PARTS = ("semantic", "style")


def mixtures(basis: Basis, alpha: float) -> dict[str, Float[np.ndarray, "C C"]]:
    """For every mixture the matrix A of n + A (n' - n), on channels, in a diffusion model's units.

    Of the original n and the target n', it takes alpha n' + (1 - alpha) n on some channels and
    n on the others: A = alpha Q^T M Q, with M the channels' diagonal of ones and zeros. "semantic"
    and "style" are the channels of the basis Q; "raw-i" one channel of the latent as the model
    has it, and "raw-i-j" a pair of them, while there are at most `MOST_PAIRED` channels. The
    two `RECONSTRUCTIONS` are A = 0 and A = 1.
    """
    Q, one = basis.matrix.astype(np.float64), np.eye(basis.channels)
    found = dict(zip(RECONSTRUCTIONS, (0 * one, one), strict=True))
    rows = np.split(Q, [basis.semantic])
    found |= {name: alpha * part.T @ part for name, part in zip(PARTS, rows, strict=True)}
    chosen = [(i,) for i in range(basis.channels)]
    if basis.channels <= MOST_PAIRED:
        chosen += combinations(range(basis.channels), 2)
    return found | {raw_name(*c): alpha * np.diag(one[list(c)].sum(0)) for c in chosen}


def raw_name(*channels: int) -> str:
    """Of the mixture on one raw channel or on a pair."""
    return "-".join(["raw", *map(str, channels)])


def decode_mixtures(
    model: Model,
    z: Float[np.ndarray, "h w C"] | Float[np.ndarray, " C"],
    target: Float[np.ndarray, "h w C"] | Float[np.ndarray, " C"],
    matrices: Mapping[str, Float[np.ndarray, "C C"]],
    image_shape: tuple[int, int, int],
) -> Iterator[tuple[str, Float[np.ndarray, "H W c"]]]:
    """The images of the mixtures of two latents, by name, in batches of one size.

    Args:
      model: whose latents they are, in its own units. A flow decoder starts from the same noise
        for all.
      z, target: of the original and of the target.
      matrices: from `mixtures`.
      image_shape: of what is decoded: [H, W, c].
    """
    n, target = (np.asarray(model.normalise(np.asarray(x, np.float64))) for x in (z, target))
    size = max(1, min(16, len(matrices), PIXELS // (image_shape[0] * image_shape[1])))
    noise = None
    if model.is_flow:
        one = jax.random.normal(jax.random.key(SEED), image_shape)
        noise = jnp.broadcast_to(one, (size, *image_shape))
    names = list(matrices)
    starts = range(0, len(names), size)
    done = track(starts, len(names), "decoding", " images", size=lambda i: len(names[i : i + size]))
    for start in done:
        chosen = names[start : start + size]
        # The last batch is filled up: every batch runs the same program.
        filled = [matrices[name] for name in chosen + chosen[:1] * (size - len(chosen))]
        mixed = np.stack([n + (target - n) @ A.T for A in filled])
        decoded = np.asarray(model.decode(np.float32(model.denormalise(mixed)), noise=noise))
        yield from zip(chosen, decoded, strict=False)
