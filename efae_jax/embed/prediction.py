"""The image embedding that a caption lets expect, by least squares."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from efae_jax.data.pairs import Prediction

# Directions of captions with less than this part of the largest variance tell nothing.
CUTOFF = 1e-9


class LeastSquares:
    """A and b that minimise sum |i - A^T t - b|^2 over captions t and their images i.

    Sums in float64; of all solutions that of the smallest A. With A = 1, b = 0 instead, what is
    left of i is CLIP's difference i - t.

    Args:
      text, image: dimensions of the embeddings.

    Attributes:
      count: captions seen.
    """

    def __init__(self, text: int, image: int):
        self.count = self._images = 0
        self._mean_captions, self._mean_images = np.zeros(text), np.zeros(image)
        self._sum_t, self._sum_i = np.zeros(text), np.zeros(image)
        self._tt, self._ti = np.zeros((text, text)), np.zeros((text, image))

    def add(self, captions_KT: Float[np.ndarray, "K T"], image_I: Float[np.ndarray, " I"]) -> None:
        """Takes an image with its captions in."""
        t, i = np.asarray(captions_KT, np.float64), np.asarray(image_I, np.float64)
        self.count, self._images = self.count + len(t), self._images + 1
        self._mean_captions += t.mean(axis=0)
        self._mean_images += i
        self._sum_t += t.sum(axis=0)
        self._sum_i += len(t) * i
        self._tt += t.T @ t
        self._ti += np.outer(t.sum(axis=0), i)

    def means(self, prediction: Prediction) -> dict[str, np.ndarray]:
        """Means over the images: of each one's mean caption embedding, and of their styles.

        Args:
          prediction: beyond which an image's embedding is its style.
        """
        n = max(self._images, 1)
        caption, image = self._mean_captions / n, self._mean_images / n
        style = image - caption @ prediction.matrix - prediction.offset
        return {"caption": caption.astype(np.float32), "style": style.astype(np.float32)}

    def solve(self) -> Prediction:
        """The prediction, in float32."""
        n = max(self.count, 1)
        mean_t, mean_i = self._sum_t / n, self._sum_i / n
        covariance = self._tt / n - np.outer(mean_t, mean_t)
        mixed = self._ti / n - np.outer(mean_t, mean_i)
        matrix = np.linalg.pinv(covariance, rcond=CUTOFF, hermitian=True) @ mixed
        offset = mean_i - mean_t @ matrix
        return Prediction(matrix.astype(np.float32), offset.astype(np.float32))


def same_space(dimension: int) -> Prediction:
    """A = 1, b = 0: for captions and images of one space."""
    return Prediction(np.eye(dimension, dtype=np.float32), np.zeros(dimension, np.float32))
