"""How the energy of images and of latents is spread over spatial frequencies.

Latents with more energy at high frequencies than images have are harder to generate by diffusion
(Skorokhodov et al. 2025, "Improving the Diffusability of Autoencoders", arXiv 2502.14831).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def dct_matrix(size: int) -> Float[np.ndarray, "F N"]:
    """Orthonormal DCT-II: rows u of sqrt(2 / N) cos(pi u (n + 1/2) / N), row 0 over sqrt(2)."""
    u, n = np.arange(size)[:, None], np.arange(size)
    rows = np.sqrt(2 / size) * np.cos(np.pi * u * (n + 0.5) / size)
    rows[0] /= np.sqrt(2)
    return rows


def dct_energies(x_BhwC: Float[Array, "B h w C"]) -> Float[Array, "B h w"]:
    """Squares of the two-dimensional orthonormal DCT-II, summed over channels.

    Entry [u, v] is at u / h and v / w of the highest frequency that the grid can hold
    (1 / 2 per pixel); all together they sum to the sum of squares of the image.
    """
    rows, columns = (jnp.asarray(dct_matrix(n), x_BhwC.dtype) for n in x_BhwC.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("uh,bhwc->buwc", rows, x_BhwC, precision=highest)
    x = jnp.einsum("vw,buwc->buvc", columns, x, precision=highest)
    return jnp.square(x).sum(axis=-1)


class Spectrum:
    """Energies of a data set's coefficients, of images that come in parts, each seen once.

    Energies are summed over images before shares are taken: an image with little in it counts for
    little, where the mean of each image's own shares would count the rounding noise of a flat
    image as much as a photograph. The constant coefficient is left out everywhere.

    Args:
      height, width: of the grid, h and w.
    """

    def __init__(self, height: int, width: int):
        self.count = 0
        self.energy = np.zeros((height, width))

    def add(self, energies: Float[np.ndarray, "N h w"]) -> None:
        """Takes in what `dct_energies` gave.

        Raises:
          ValueError: for energies of another grid or that are not finite.
        """
        energies_Nhw = np.asarray(energies, np.float64)
        if energies_Nhw.shape[1:] != self.energy.shape:
            raise ValueError(
                f"spectrum: energies {energies_Nhw.shape} are not [N, "
                f"{', '.join(map(str, self.energy.shape))}]"
            )
        if not np.isfinite(energies_Nhw).all():
            raise ValueError("spectrum: energies that are not finite")
        self.count += len(energies_Nhw)
        self.energy = self.energy + energies_Nhw.sum(axis=0)

    def merge(self, other: Spectrum) -> None:
        """Takes in what another has seen."""
        self.count += other.count
        self.energy = self.energy + other.energy

    def _coefficients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies, and frequencies u / h and v / w, of all but the constant coefficient."""
        h, w = self.energy.shape
        u, v = (index.ravel()[1:] for index in np.indices((h, w)))
        return self.energy.ravel()[1:], u / h, v / w

    @property
    def high_frequency(self) -> float:
        """The share of the energy at max(u / h, v / w) >= 1/2, of all but the constant.

        It is what halving the resolution loses: about 3/4 for white noise, some percent for
        photographs. 0 where there is no energy.
        """
        energy, u, v = self._coefficients()
        total = energy.sum()
        return float(energy[np.maximum(u, v) >= 0.5].sum() / total) if total > 0 else 0.0

    def curve(self) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """Radial frequencies and the mean energy of a coefficient there.

        The frequency r = sqrt((u / h)^2 + (v / w)^2) is 1 at the highest that the grid can hold
        along an axis, the point at k / n, n = max(h, w), k = 1..n-1, being the mean over
        k - 1/2 <= n r < k + 1/2; the corners beyond are left out. Energies are divided by the mean
        over all but the constant coefficient: white noise is 1 everywhere, and grids and units of
        any size can be drawn together. 0 where there is no energy.
        """
        energy, u, v = self._coefficients()
        n = max(self.energy.shape)
        # A frequency between two rings belongs to the upper one, however it was rounded.
        ring = np.floor(n * np.hypot(u, v) + 0.5 + 1e-9).astype(int)
        rings = np.arange(1, n)  # each holds at least the coefficient on the longer axis
        sums = np.bincount(ring, energy, minlength=n)[1:n]
        level = sums / np.bincount(ring, minlength=n)[1:n]
        mean = energy.sum() / max(energy.size, 1)
        return rings / n, level / mean if mean > 0 else np.zeros(n - 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; `from_arrays` is the inverse."""
        return {"count": np.array(self.count), "energy": self.energy}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Spectrum:
        """What `arrays` gave."""
        made = cls(*arrays["energy"].shape)
        made.count, made.energy = int(arrays["count"]), arrays["energy"]
        return made


def spectrum_figures(latent: Spectrum, image: Spectrum) -> dict[str, float | dict[str, list]]:
    """high_frequency, high_frequency_image and spectrum, both curves, as plain floats."""
    frequency, level = latent.curve()
    image_frequency, image_level = image.curve()
    return {
        "high_frequency": latent.high_frequency,
        "high_frequency_image": image.high_frequency,
        "spectrum": {
            "frequency": frequency.tolist(),
            "latent": level.tolist(),
            "image_frequency": image_frequency.tolist(),
            "image": image_level.tolist(),
        },
    }
