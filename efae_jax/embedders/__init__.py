"""Embeddings of images and of their captions, by networks of others, files, or known factors."""

from efae_jax.embedders.base import Captioned, ImageEmbedder, TextEmbedder
from efae_jax.embedders.chosen import CLIPS, IMAGES, ORIGINAL, TEXTS, make_embedders

__all__ = [
    "CLIPS",
    "IMAGES",
    "ORIGINAL",
    "TEXTS",
    "Captioned",
    "ImageEmbedder",
    "TextEmbedder",
    "make_embedders",
]
