"""How much of the velocity field's target a flow on given latents cannot know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Rounds of the flip-flop iteration: within 0.1% of its end where (n - 1) C is well above h w.
ROUNDS = 5
SMALL = 1e-10  # eigenvalues below this part of the largest are 0


class VelocityIrreducibleVariance(NamedTuple):
    """Means over classes of I_k and of I_k / d, of how many classes and images.

    determined: every class has more images than its covariance needs, (n - 1) C > h w and
    (n - 1) h w > C. Where it is not, the figure is too low, and compares only with figures of
    latents of the same shape on the same images.
    """

    value: float
    per_dimension: float
    classes: int
    images: int
    determined: bool


def irreducible_variance(z_NSC: Float[np.ndarray, "N S C"]) -> float:
    """I = (pi / 2) sum_i sqrt(lambda_i) of one class's latents, S positions of C channels.

    The path x_t = (1 - t) noise + t z, with standard normal noise and Gaussian z, has the velocity
    v = z - noise, of which a model that sees x_t alone cannot know the part
    E |v - E[v | x_t]|^2 = sum_i lambda_i / ((1 - t)^2 + t^2 lambda_i), lambda_i the eigenvalues of
    the covariance of z; I is the integral over t. (Zhong et al. 2026, arXiv 2606.03578, eq. 5.)

    d = S C is too many dimensions for a covariance of N images. As there it is taken as
    Sigma_S (x) Sigma_C, between positions and between channels, found by the flip-flop iteration
    for the likelihood's maximum (Dutilleul 1999): Sigma_C = mean of X^T Sigma_S^-1 X over images
    X [S, C] about their mean, then Sigma_S = mean of X Sigma_C^-1 X^T, and again, from
    Sigma_S = 1. Directions without variance are left out of the inverses. The product is scaled to
    the total variance (with N - 1); its eigenvalues are products, so that
    sum_i sqrt(lambda_i) = sum sqrt(eig Sigma_S) sum sqrt(eig Sigma_C).

    Raises:
      ValueError: for fewer than two latents.
    """
    if len(z_NSC) < 2:
        raise ValueError(f"irreducible variance needs two latents or more; there are {len(z_NSC)}")
    x_NSC = np.asarray(z_NSC, np.float64)
    x_NSC = x_NSC - x_NSC.mean(axis=0)
    variance = np.square(x_NSC).sum() / (len(x_NSC) - 1)
    if variance == 0:
        return 0.0
    by_channel = x_NSC.reshape(-1, x_NSC.shape[2])
    for _ in range(ROUNDS):
        channels, whiten_C = _eigenvalues(by_channel)
        by_position = np.swapaxes(x_NSC @ whiten_C, 1, 2).reshape(-1, x_NSC.shape[1])
        positions, whiten_S = _eigenvalues(by_position)
        by_channel = (whiten_S.T @ x_NSC).reshape(-1, x_NSC.shape[2])
    scale = variance / (positions.sum() * channels.sum())
    roots = np.sqrt(positions).sum() * np.sqrt(channels).sum()
    return float(np.pi / 2 * np.sqrt(scale) * roots)


def _eigenvalues(
    x_ND: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, "D R"]]:
    """Those of x^T x that are not 0, and W with W W^T = its (pseudo-)inverse."""
    wide = (
        x_ND.shape[0] < x_ND.shape[1]
    )  # then x x^T is the smaller matrix, of the same eigenvalues
    values, vectors = np.linalg.eigh(x_ND @ x_ND.T if wide else x_ND.T @ x_ND)
    kept = values > SMALL * values[-1]
    values, vectors = values[kept], vectors[:, kept] / np.sqrt(values[kept])
    return values, x_ND.T @ vectors / np.sqrt(values) if wide else vectors


class ClassLatents:
    """Latents of some classes, kept until there is enough to say how they vary within a class.

    The covariances of the flip-flop iteration need the latents themselves, and for up to
    2 h w / C images of a class these are smaller than a covariance of its positions. Kept are
    those of the first classes met, until the memory is full: which they are depends on the order
    of the images alone, not on how the batches are cut.

    Args:
      classes: the most classes kept.
      memory: bytes of float32 latents kept at most.
    """

    def __init__(self, classes: int = 100, memory: int = 2**27):
        self.classes, self.memory = classes, memory
        self._latents: dict[int, list[np.ndarray]] = {}
        self._order: list[int] = []

    def add(self, z: Float[np.ndarray, "N ..."], labels: Int[np.ndarray, " N"]) -> None:
        """Takes latents in, [N, h, w, C] or [N, C], with their classes."""
        z = np.asarray(z, np.float32)
        for latent, label in zip(z, map(int, labels), strict=True):
            if (len(self._order) + 1) * latent.nbytes > self.memory:
                return
            if label in self._latents or len(self._latents) < self.classes:
                self._latents.setdefault(label, []).append(latent.copy())
                self._order.append(label)

    def merge(self, other: ClassLatents) -> None:
        """Takes in what another has kept, after its own."""
        arrays = other.arrays()
        self.add(arrays["latents"], arrays["labels"])

    def velocity_irreducible_variance(
        self, std: Float[np.ndarray, " C"] | Sequence[float]
    ) -> VelocityIrreducibleVariance:
        """`irreducible_variance` of each class with two images or more, averaged over classes.

        It depends on the scale of the latents beside the noise's, which is 1.

        Args:
          std: by which channels are divided: those of all images (`LatentMoments`), as in the
            paper and as latents are fed to a diffusion model; ones for the latents' own units.
            A channel of std 0 is left as it is.

        Raises:
          ValueError: where no class has two images.
        """
        scale = np.where(np.asarray(std) > 0, std, 1.0)
        values, images, size, determined = [], 0, 0, True
        for latents in self._latents.values():
            n = len(latents)
            if n < 2:
                continue
            z_NSC = np.stack(latents).reshape(n, -1, latents[0].shape[-1]) / scale
            _, positions, channels = z_NSC.shape
            determined &= (n - 1) * channels > positions and (n - 1) * positions > channels
            values.append(irreducible_variance(z_NSC))
            images, size = images + n, positions * channels
        if not values:
            raise ValueError("velocity irreducible variance: no class has two images")
        value = float(np.mean(values))
        return VelocityIrreducibleVariance(value, value / size, len(values), images, determined)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; `from_arrays` is the inverse."""
        queues = {label: iter(latents) for label, latents in self._latents.items()}
        latents = [next(queues[label]) for label in self._order]
        return {
            "classes": np.array(self.classes),
            "memory": np.array(self.memory),
            "labels": np.array(self._order, np.int64),
            "latents": np.stack(latents) if latents else np.zeros((0, 0), np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ClassLatents:
        """What `arrays` gave."""
        made = cls(int(arrays["classes"]), int(arrays["memory"]))
        made.add(arrays["latents"], arrays["labels"])
        return made
