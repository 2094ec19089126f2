"""Evaluations as CSV: one row each, in flat columns."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax.report.records import Record, figure

_MODEL = ("kind", "source", "step", "sha256")
_MORE = ("parameters", "factor", "latent_shape", "group", "representation", "dtype")
_DATA = ("source", "path", "split", "size", "keys", "unreadable")
_QUALITY = ("psnr", "ssim", "lpips", "frechet")
_LATENT = (
    "mean_abs_correlation",
    "high_frequency",
    "high_frequency_image",
    "intrinsic_dimension",
    "intrinsic_dimension_images",
)
_VELOCITY = ("value", "per_dimension", "classes", "images")


def csv_row(record: Record) -> dict[str, Any]:
    """{column: value} of one evaluation, None where a figure is missing.

    Columns are the same for every model that was evaluated under the same transformations
    by the same version; those of transformations are `r90_psnr`, those of the latent's
    channels their mean: `latent_std_mean`.
    """
    model, data, latent = record["model"], record["data"], record["latent"]
    row: dict[str, Any] = {"name": record["name"]}
    row |= {key: model.get(key) for key in _MODEL}
    row["images"] = record.get("images")
    row |= {f"data_{key}": _flat(data.get(key)) for key in _DATA}
    row |= {"protocol": record["protocol"].get("name"), "frechet_features": record.get("frechet")}
    row |= {key: figure(record, "reconstruction", key) for key in _QUALITY}
    row |= {
        f"{kind}_error": figure(record, "errors", kind) for kind in ("rotation", "flip", "scale")
    }
    for part in record["transformations"]:
        row |= {f"{part['name']}_{key}": figure(part, key) for key in ("error", *_QUALITY)}
    for key in ("mean", "std", "excess_kurtosis"):
        row[f"latent_{key}_mean"] = _mean(latent.get(key))
    row |= {key: figure(record, "latent", key) for key in _LATENT}
    velocity = "velocity_irreducible_variance"
    for key in _VELOCITY:
        name = velocity if key == "value" else f"{velocity}_{key}"
        row[name] = figure(record, "latent", velocity, key)
    row |= {key: _flat(model.get(key)) for key in _MORE}
    row |= {key: record.get(key) for key in ("seconds", "device", "devices")}
    row |= {f"version_{key}": value for key, value in record["versions"].items()}
    return row


def write_csv(records: Sequence[Record], path: Path) -> None:
    """One row a record under one heading, UTF-8; cells of missing figures are empty.

    Floats are written so that reading gives the same number.
    """
    rows = [csv_row(record) for record in records]
    heading = list(dict.fromkeys(key for row in rows for key in row))
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, heading, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _flat(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else value


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if values else None
