"""The transformations under which a model is looked at: rotations, flips, scalings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efae_jax import groups
from efae_jax.methods.base import Autoencoder, Params
from efae_jax.pictures import LABELS

SCALES = (0.25, 0.5, 0.75)


class Transformation(NamedTuple):
    """One of them.

    Attributes:
      name: "r90", "h", "s0.5", ...
      kind: "rotation", "flip" or "scale".
      label: for people.
      scale: of the sides; None unless it is a scaling.
    """

    name: str
    kind: str
    label: str
    scale: float | None = None


ALL = (
    *(Transformation(n, "rotation", LABELS[n]) for n in ("r90", "r180", "r270")),
    *(Transformation(n, "flip", LABELS[n]) for n in ("h", "v")),
    *(Transformation(f"s{s:g}", "scale", f"scale {s:g}", s) for s in SCALES),
)


def possible(
    model: Autoencoder, image: Sequence[int], latent: Sequence[int]
) -> tuple[list[Transformation], dict[str, str]]:
    """Those that a model's latents can take, and why not the others, by name.

    Args:
      model: the autoencoder.
      image: (height, width) of what the decoder returns.
      latent: shape of a latent: (h, w, C), or (C,) without positions.
    """
    found, why = [], {}
    for t in ALL:
        if len(latent) == 1 and (t.scale is not None or t.name not in model.group.elements):
            why[t.name] = "the latent has no positions, and the model's group does not have it"
        elif t.scale is None and t.name in ("r90", "r270") and image[0] != image[1]:
            why[t.name] = "rotations by 90 degrees need square images"
        elif t.scale is not None and any(n * t.scale % 1 for n in (*image, *latent[:2])):
            why[t.name] = (
                f"{t.scale:g} of a latent of {latent[0]}x{latent[1]} has no whole positions"
            )
        else:
            found.append(t)
    return found, why


class Action:
    """Rotations and flips, by name, on images and on a model's latents.

    An element of the model's group acts on the channels by its representation; the others
    permute positions only.

    Args:
      model: the autoencoder.
      square: whether images are; if not, rotations by 90 degrees are left out.
      positions: whether latents have them; if not, only the model's own group acts.
    """

    def __init__(self, model: Autoencoder, square: bool, positions: bool):
        self._model = model
        self.group = groups.group("d4" if square else "z2xz2") if positions else model.group

    def index(self, name: str) -> int:
        """Of an element, for the other methods."""
        return self.group.elements.index(name)

    def image(self, g: Int[Array, ""], x: Float[Array, "B H W c"]) -> Float[Array, "B H W c"]:
        """g x, the same g for every example."""
        return groups.act_image(self.group, jnp.full(len(x), g), x)

    def latent(
        self, params: Params, g: Int[Array, ""], z: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """g z."""
        own = self._model.matrices(params)
        names, one = self._model.group.elements, np.eye(z.shape[-1], dtype=np.float32)
        # The identity's is known without the parameters, and without their rounding.
        acting = set(names) - {"e"}
        every = [own[names.index(e)] if e in acting else one for e in self.group.elements]
        # NumPy's matrices are known to the program, and diagonal ones cost little.
        stack: Any = np.stack if isinstance(own, np.ndarray) else jnp.stack
        return groups.act_latent(self.group, stack(every), jnp.full(len(z), g), z)
