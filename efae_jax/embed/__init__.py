"""`python -m efae_jax embed`: captioned images to latents with embeddings (`data.pairs`)."""

from efae_jax.embed.command import embed

__all__ = ["embed"]
