"""Statistics of features, for a Frechet distance, in files that pytorch-fid reads and writes.

An npz with `mu` and `sigma`, the mean and the covariance (divided by N - 1). This package adds
`count`, `protocol` and `about` (JSON); where there is no `protocol`, it is pytorch-fid's.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from efae_jax.convert import files, layout
from efae_jax.errors import UserError
from efae_jax.metrics.frechet import FeatureStatistics


@dataclasses.dataclass(frozen=True)
class SavedStatistics:
    """What a file holds; `metrics.frechet.frechet_distance` takes it.

    Attributes:
      mean, covariance: of the features, float64.
      count: of the images; None where the file does not say.
      about: the images, as whoever saved them described them; empty where the file does not say.
    """

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None
    about: dict[str, Any]


def save_statistics(
    path: str | os.PathLike[str],
    statistics: FeatureStatistics,
    protocol: str,
    about: Mapping[str, Any],
) -> None:
    """Writes statistics as `read_statistics` reads them, whole or not at all.

    Args:
      path: of a new file.
      statistics: of at least 2 images.
      protocol: of the features, a name of `models.frechet_features.PROTOCOLS`.
      about: which images they are of, plain values.

    Raises:
      UserError: fewer images, a file that is there already, or a disk that refuses.
    """
    if statistics.count < 2:
        raise UserError(
            f"cannot write {path}: {statistics.count} images have no statistics; at least 2"
        )
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=statistics.mean,
        sigma=statistics.covariance,
        count=statistics.count,
        protocol=protocol,
        about=json.dumps(about),
    )
    files.write_new(path, buffer.getvalue())


def read_statistics(path: str | os.PathLike[str], protocol: str, size: int) -> SavedStatistics:
    """Statistics that `save_statistics` or pytorch-fid wrote; other arrays are not looked at.

    Args:
      protocol, size: which features are wanted, and how many.

    Raises:
      UserError: no such file, a damaged one, or statistics of other features.
    """
    arrays = files.read_state_dict(path)
    if missing := {"mu", "sigma"} - arrays.keys():
        names = " and ".join(sorted(missing))
        raise UserError(f"{path} holds no statistics of features, for want of {names}")
    found = str(arrays["protocol"]) if "protocol" in arrays else "pytorch-fid"
    if found != protocol:
        raise UserError(
            f"{path} holds statistics of {layout.printable(found)}'s features, which do not "
            f"compare with {protocol}'s"
        )
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(
            f"{path} holds mu {mean.shape} and sigma {covariance.shape}; {protocol} has "
            f"{size} features"
        )
    for name in ("mu", "sigma"):
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} must be finite numbers")
    try:
        count = int(arrays["count"]) if "count" in arrays else None
        about = dict(json.loads(str(arrays.get("about", "{}"))))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: count must be a number, and about a JSON object") from error
    return SavedStatistics(mean.astype(np.float64), covariance.astype(np.float64), count, about)
