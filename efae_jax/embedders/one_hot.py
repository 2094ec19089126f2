"""Embeddings of the built-in images out of what is known of them; no network looks at anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from efae_jax.data.captioned_glyphs import captioned_factors, shape_vector, style_vector
from efae_jax.data.glyphs import Factors
from efae_jax.embedders.base import Captioned, unit_rows
from efae_jax.errors import UserError


class OneHotTexts:
    """The same for every caption of an image: its shape as a one-hot vector."""

    name = "one_hot"
    space = "one_hot shape"

    def __init__(self) -> None:
        self.dimension = len(shape_vector(captioned_factors(0)))

    def __call__(self, examples: Sequence[Captioned]) -> list[Float32[np.ndarray, "k D"]]:
        """See `TextEmbedder`.

        Raises:
          UserError: an example whose factors are not known.
        """
        return [np.tile(_shape(_known(e)), (len(e.captions), 1)) for e in examples]


class OneHotImages:
    """The shape as a one-hot vector, then the style, each of length sqrt(1/2)."""

    name = "one_hot"
    space = "one_hot shape and style"
    needs_image = False

    def __init__(self) -> None:
        f = captioned_factors(0)
        self.dimension = len(shape_vector(f)) + len(style_vector(f))

    def __call__(self, examples: Sequence[Captioned]) -> Float32[np.ndarray, "N D"]:
        """See `ImageEmbedder`.

        Raises:
          UserError: an example whose factors are not known.
        """
        found = [_known(example) for example in examples]
        rows = [np.concatenate([_shape(f), _style(f)], axis=1) for f in found]
        return unit_rows(np.concatenate([np.zeros((0, self.dimension)), *rows]), self.name)


def _known(example: Captioned) -> Factors:
    if example.factors is None:
        raise UserError(
            f"one_hot embeddings are of the built-in images; what {example.key} shows is not "
            "known: give --clip, or other --text and --image"
        )
    return example.factors


def _shape(f: Factors) -> Float32[np.ndarray, "1 K"]:
    return unit_rows(shape_vector(f)[None], OneHotTexts.name)


def _style(f: Factors) -> Float32[np.ndarray, "1 S"]:
    return unit_rows(style_vector(f)[None], OneHotImages.name)
