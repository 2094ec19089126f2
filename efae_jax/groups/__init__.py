"""Finite groups of image symmetries, their actions on images and latents, scaling, symmetrisation.

Pure functions of arrays: nothing here knows of models, configuration or the rest of the package.
"""

from efae_jax.groups.elements import GROUPS, Group, act_image, group, random_elements
from efae_jax.groups.representations import (
    Block,
    Representation,
    act_latent,
    change_basis,
    orthogonal,
    representation,
)
from efae_jax.groups.scaling import RESAMPLINGS, scale
from efae_jax.groups.symmetrize import (
    symmetrize_decoder,
    symmetrize_encoder,
    symmetrize_velocity,
)

__all__ = [
    "GROUPS",
    "RESAMPLINGS",
    "Block",
    "Group",
    "Representation",
    "act_image",
    "act_latent",
    "change_basis",
    "group",
    "orthogonal",
    "random_elements",
    "representation",
    "scale",
    "symmetrize_decoder",
    "symmetrize_encoder",
    "symmetrize_velocity",
]
