"""`python -m efae_jax lerp`: some channels of one image's latent moved towards another's."""

from efae_jax.lerp.command import lerp

__all__ = ["lerp"]
