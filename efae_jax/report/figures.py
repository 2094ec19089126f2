"""The figures of an evaluation as columns of tables: names, digits, and which is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from efae_jax.report.records import Record, figure, mean_of

MISSING = "–"
_FRECHET = {
    "vgg16": "Fréchet distance (VGG16)",  # never FID, which is of InceptionV3's features
    "pytorch-fid": "rFID (pytorch-fid)",
    "torch-fidelity": "rFID (torch-fidelity)",
}


class Column(NamedTuple):
    """A figure in a table.

    key: its name in a record; label: in print; unit: of it; digits: after the point;
    better: 1 where more is better, -1 where less is; features: of a Fréchet distance, which
    alone has them.
    """

    key: str
    label: str
    unit: str
    digits: int
    better: int
    features: str | None = None

    @property
    def heading(self) -> str:
        """Label, unit, and an arrow to the better side."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.label}{unit}\N{NO-BREAK SPACE}{'↑' if self.better > 0 else '↓'}"

    def value(self, record: Record, row: Record) -> float | None:
        """The figure in a part of a record, its reconstruction or one of its transformations."""
        return figure(row, self.key) if self._is_of(record) else None

    def mean(self, record: Record, kind: str) -> float | None:
        """The mean over a kind of transformations."""
        return mean_of(record, kind, self.key) if self._is_of(record) else None

    def text(self, value: float | None) -> str:
        """The figure in print."""
        return number(value, self.digits)

    def best(self, values: Sequence[float | None]) -> set[int]:
        """Where the best of several is: empty unless two differ in print; ties are all best."""
        known = {i: value for i, value in enumerate(values) if value is not None and value == value}
        if len({self.text(value) for value in known.values()}) < 2:
            return set()
        best = max(known.values(), key=lambda value: value * self.better)
        return {i for i, value in known.items() if self.text(value) == self.text(best)}

    def _is_of(self, record: Record) -> bool:
        return self.features is None or self.features == record.get("frechet")


def quality_columns(records: Sequence[Record]) -> list[Column]:
    """PSNR, SSIM, LPIPS, and a Fréchet distance for every set of features that was used."""
    kinds = dict.fromkeys(record["frechet"] for record in records if record.get("frechet"))
    return [
        Column("psnr", "PSNR", "dB", 2, 1),
        Column("ssim", "SSIM", "", 3, 1),
        Column("lpips", "LPIPS", "", 3, -1),
        *(Column("frechet", frechet_label(kind), "", 2, -1, kind) for kind in kinds or [None]),
    ]


def transformed_columns(records: Sequence[Record]) -> list[Column]:
    """The equivariance error, and what it is never read without."""
    psnr, ssim, lpips, *frechet = quality_columns(records)
    return [Column("error", "error", "", 3, -1), *frechet, psnr, lpips, ssim]


def frechet_label(features: str | None) -> str:
    """What a Fréchet distance over these features is called."""
    if not features:
        return "Fréchet distance"
    return _FRECHET.get(features, f"Fréchet distance ({features})")


def number(value: float | None, digits: int) -> str:
    """A figure in print: digits after the point, none if it is large, e-notation if tiny."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and (abs(value) < 0.5 * 10**-digits or abs(value) >= 1e9):
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}f}"
    return text.replace("-", "−")
