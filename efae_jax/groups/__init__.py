"""Finite groups of image symmetries, their actions, bases of latents, scaling, symmetrisation.

Pure functions of arrays: nothing here knows of models, configuration or the rest of the package.
"""

from efae_jax.groups.bases import (
    block_leakage,
    is_block_diagonal,
    orthogonality_error,
    qr_basis,
)
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
    "block_leakage",
    "change_basis",
    "group",
    "is_block_diagonal",
    "orthogonal",
    "orthogonality_error",
    "qr_basis",
    "random_elements",
    "representation",
    "scale",
    "symmetrize_decoder",
    "symmetrize_encoder",
    "symmetrize_velocity",
]
