"""What every autoencoder does with its latents: clamp, units, and the action of a group."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from efae_jax import groups
from efae_jax.models.functional import Params
from efae_jax.models.latent import Normalisation


class ActedLatent:
    """A group that acts on images and latents, the latents' clamp and their units.

    Args:
      representation: of the group, on the C channels.
      clamp: limit of a latent's absolute value, or None.
      normalisation: to the units of a diffusion model; none unless given.

    Attributes:
      has_encoder, has_decoder: whether there are parameters for it.
    """

    has_encoder = has_decoder = True

    def __init__(
        self,
        representation: groups.Representation,
        clamp: float | None = None,
        normalisation: Normalisation | None = None,
    ):
        units = Normalisation() if normalisation is None else normalisation
        units.check(representation.channels)
        self.group, self.representation = representation.group, representation
        self.clamp, self.normalise, self.denormalise = clamp, units.normalise, units.denormalise

    def clip(self, z: Array | np.ndarray) -> Any:
        """Latents within the clamp, on the device or the host as they are."""
        return z if self.clamp is None else z.clip(-self.clamp, self.clamp)

    def matrices(self, params: Params) -> Float[Array, "G C C"]:
        """rho(g) for every element."""
        del params
        return self.representation.matrices

    def act(
        self, params: Params, g_B: Int[Array, " B"], z: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """rho(g) z, with one element (its index in the group) per example."""
        return groups.act_latent(self.group, self.matrices(params), g_B, z)

    def act_image(
        self, g_B: Int[Array, " B"], x: Float[Array, "B H W c"]
    ) -> Float[Array, "B H W c"]:
        """g x: the same elements acting on images."""
        return groups.act_image(self.group, g_B, x)
