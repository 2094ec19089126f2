"""Models with semantic and style channels, and the runs that find such a basis."""

from efae_jax.disentangled.model import Disentangled, read_basis

__all__ = ["Disentangled", "read_basis"]
