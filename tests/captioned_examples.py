"""Captioned examples, and what all their embeddings have in common."""

import numpy as np

from efae_jax.data.captioned_glyphs import captioned_factors
from efae_jax.data.glyphs import draw
from efae_jax.embedders import Captioned


def saying(*captions, key="k"):
    return Captioned(key, None, captions)


def glyph(index, captions=("a thing",), side=32):
    f = captioned_factors(index)
    return Captioned(str(index), draw(f, (side, side)), tuple(captions), f)


def assert_unit(rows, dimension):
    assert rows.dtype == np.float32
    assert rows.shape[1:] == (dimension,)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
