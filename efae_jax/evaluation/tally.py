"""All sums of an evaluation, as they stand after some of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efae_jax.evaluation.transformations import Transformation
from efae_jax.metrics.frechet import FeatureStatistics
from efae_jax.metrics.intrinsic_dimension import FirstPoints
from efae_jax.metrics.latent_moments import LatentMoments
from efae_jax.metrics.spectrum import Spectrum
from efae_jax.metrics.streaming import ChannelStatistics
from efae_jax.metrics.velocity_variance import ClassLatents

PLAIN = "plain"  # the images as they are, among the names of transformations
FEATURES = ("decoded", "target")


class Tally:
    """Sums over images, in float64; not the images, but for the latents of some.

    Attributes:
      count, unreadable: images.
      sums: {transformation: {figure: sum}}.
      features: {transformation: {"decoded", "target": statistics}}.
      moments, channels, points, classes: of the latents.
      spectra: {"latent", "image"}; empty for latents without positions.
      shown: the latents of the images that are shown.

    Args:
      transformations: that are looked at.
      latent: shape of a latent.
      image: (height, width) of the decoded images.
      features: how many an image has.
      labelled: whether the images have classes.
    """

    def __init__(
        self,
        transformations: Sequence[Transformation],
        latent: Sequence[int],
        image: Sequence[int],
        *,
        features: int,
        labelled: bool,
    ):
        self.count = self.unreadable = 0
        self._labelled = labelled
        self.sums: dict[str, dict[str, float]] = {PLAIN: {}} | {t.name: {} for t in transformations}
        # What was turned back is compared with the images as they are.
        sides = {PLAIN: FEATURES} | {
            t.name: FEATURES if t.scale is not None else ("decoded",) for t in transformations
        }
        self.features = {
            name: {side: FeatureStatistics(features) for side in there}
            for name, there in sides.items()
        }
        self.moments, self.channels = LatentMoments(latent[-1]), ChannelStatistics(latent[-1])
        self.points, self.classes = FirstPoints(), ClassLatents()
        self.spectra: dict[str, Spectrum] = {}
        if len(latent) == 3:
            self.spectra = {"latent": Spectrum(*latent[:2]), "image": Spectrum(*image)}
        self.shown: list[np.ndarray] = []

    def add_images(self, found: Mapping[str, Any], mask: np.ndarray, show: int) -> None:
        """Takes a batch's latents in.

        Args:
          found: what `Programs.plain` gave, on the host.
          mask: which images count.
          show: of how many images the latents are kept in `shown`.
        """
        z = found["latent"][mask]
        self.count += len(z)
        for statistics in (self.moments, self.channels, self.points):
            statistics.add(z)
        if self._labelled:
            self.classes.add(z, found["label"][mask])
        for name, energies in found["energy"].items():
            self.spectra[name].add(energies[mask])
        self.shown += list(z[: show - len(self.shown)])

    def add_figures(self, name: str, figures: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """Takes a batch's figures in: of a transformation, or `PLAIN`."""
        for figure, values in figures.items():
            if figure in FEATURES:
                self.features[name][figure].add(values[mask])
            else:
                total = float(values[mask].astype(np.float64).sum())
                self.sums[name][figure] = self.sums[name].get(figure, 0.0) + total

    def mean(self, name: str, figure: str) -> float | None:
        """Over the images; None where the figure could not be had."""
        total = self.sums[name].get(figure)
        return None if total is None else total / self.count

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to be stored; `load` is the inverse."""
        flat = {"count": np.array(self.count), "unreadable": np.array(self.unreadable)}
        for name, figures in self.sums.items():
            flat |= {f"sums/{name}/{k}": np.array(v) for k, v in figures.items()}
        for path, part in self._parts().items():
            flat |= {f"{path}/{k}": v for k, v in part.arrays().items()}
        return flat | {f"shown/{i}": z for i, z in enumerate(self.shown)}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `arrays` of a tally made alike gave."""
        self.count, self.unreadable = int(arrays["count"]), int(arrays["unreadable"])
        for name in self.sums:
            self.sums[name] = {k: float(v) for k, v in _below(arrays, f"sums/{name}").items()}
        for path, part in self._parts().items():
            restored = type(part).from_arrays(_below(arrays, path))
            part.__dict__.update(restored.__dict__)
        shown = _below(arrays, "shown")
        self.shown = [shown[str(i)] for i in range(len(shown))]

    def _parts(self) -> dict[str, Any]:
        parts = {
            "moments": self.moments,
            "channels": self.channels,
            "points": self.points,
            "classes": self.classes,
        }
        parts |= {f"spectra/{name}": part for name, part in self.spectra.items()}
        for name, sides in self.features.items():
            parts |= {f"features/{name}/{side}": part for side, part in sides.items()}
        return parts


def _below(arrays: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    start = f"{path}/"
    return {k.removeprefix(start): arrays[k] for k in arrays if k.startswith(start)}
