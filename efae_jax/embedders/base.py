"""What an embedder takes and gives, and the batches in which networks see texts and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from efae_jax.data.glyphs import Factors
from efae_jax.errors import RunError

REMEMBERED = 4096  # texts


class Captioned(NamedTuple):
    """An example of a captioned source.

    Attributes:
      key: its name inside the source.
      image: RGB, upright; None where the embedder needs none.
      captions: at least one.
      factors: what the image shows and how it looks, where it is a built-in one.
    """

    key: str
    image: Image.Image | None
    captions: tuple[str, ...]
    factors: Factors | None = None


class TextEmbedder(Protocol):
    """Embeddings of captions.

    Attributes:
      name: what tells these embeddings from others, for the record.
      space: embeddings of equal spaces live in one joint space, as those of CLIP's two towers.
      dimension: D of an embedding.
    """

    name: str
    space: str
    dimension: int

    def __call__(self, examples: Sequence[Captioned]) -> list[Float32[np.ndarray, "k D"]]:
        """For each example as many rows as captions, each of unit length."""


class ImageEmbedder(Protocol):
    """Embeddings of images.

    Attributes:
      name, space, dimension: as of `TextEmbedder`.
      needs_image: whether it looks at `Captioned.image`.
    """

    name: str
    space: str
    dimension: int
    needs_image: bool

    def __call__(self, examples: Sequence[Captioned]) -> Float32[np.ndarray, "N D"]:
        """One row of unit length for each example."""


def row_norms(x_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """|x| of every row, in float64."""
    return np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64))


def unit_rows(x_ND: Float[np.ndarray, "N D"], name: str) -> Float32[np.ndarray, "N D"]:
    """x / |x| of every row.

    Raises:
      RunError: a row that is zero or not finite; says that `name` made it.
    """
    norms_N = row_norms(x_ND)
    if not np.isfinite(norms_N).all() or not norms_N.all():
        raise RunError(f"{name} gives an embedding that is zero or not finite")
    return np.divide(x_ND, norms_N[:, None], out=np.empty(x_ND.shape, np.float32), casting="unsafe")


class TextBatches:
    """A `TextEmbedder` made of a function of texts; a text that comes again is not computed again.

    Args:
      name, space, dimension: of the embedder.
      embed: maps at most `batch_size` texts to as many rows, of any length.
      batch_size: of texts.
    """

    def __init__(
        self,
        name: str,
        space: str,
        dimension: int,
        embed: Callable[[list[str]], Float[np.ndarray, "N D"]],
        batch_size: int,
    ):
        self.name, self.space, self.dimension = name, space, dimension
        self._embed, self._batch_size = embed, batch_size
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, examples: Sequence[Captioned]) -> list[Float32[np.ndarray, "k D"]]:
        """See `TextEmbedder`.

        Raises:
          RunError: an embedding that is zero or not finite.
        """
        texts = dict.fromkeys(caption for example in examples for caption in example.captions)
        if len(self._known) + len(texts) > REMEMBERED:
            self._known = {text: self._known[text] for text in texts if text in self._known}
        # Texts of similar lengths share a batch, so that little of it is padding.
        new = sorted((text for text in texts if text not in self._known), key=len)
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            rows = unit_rows(self._embed(batch), self.name)
            self._known |= zip(batch, rows, strict=True)
        return [np.stack([self._known[text] for text in e.captions]) for e in examples]


class ImageBatches:
    """An `ImageEmbedder` made of a function of images.

    Args:
      name, space, dimension: of the embedder.
      embed: maps at most `batch_size` RGB images to as many rows, of any length.
      batch_size: of images.
    """

    needs_image = True

    def __init__(
        self,
        name: str,
        space: str,
        dimension: int,
        embed: Callable[[list[Image.Image]], Float[np.ndarray, "N D"]],
        batch_size: int,
    ):
        self.name, self.space, self.dimension = name, space, dimension
        self._embed, self._batch_size = embed, batch_size

    def __call__(self, examples: Sequence[Captioned]) -> Float32[np.ndarray, "N D"]:
        """See `ImageEmbedder`.

        Raises:
          RunError: an embedding that is zero or not finite.
        """
        images = [example.image for example in examples]
        rows = [
            unit_rows(self._embed(images[start : start + self._batch_size]), self.name)
            for start in range(0, len(images), self._batch_size)
        ]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *rows])
