"""Tables of a page: figures as cells, in print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from efae_jax.report.comparing import UNSTATED, Difference, comparable, short, words
from efae_jax.report.figures import (
    MISSING,
    Column,
    frechet_label,
    quality_columns,
    transformed_columns,
)
from efae_jax.report.latents import latent_figures
from efae_jax.report.records import KINDS, Record, figure, label_of, rows_of

_KINDS = {
    "kl": "KL autoencoder",
    "aura": "Aura's VAE",
    "taesd": "TAESD",
    "flow": "flow autoencoder",
}
_NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "frechet": "Fréchet distance",
    "keys": "sha256 of the names",
}
_MODEL = ("kind", "source", "step", "sha256", "parameters", "factor", "latent_shape", "group",
          "representation", "dtype")  # fmt: skip
_DATA = ("source", "path", "split", "images", "unreadable", "size", "keys")


class Cell(NamedTuple):
    """A figure in print, and whether it is the best of those it is compared with."""

    text: str
    best: bool = False


class Row(NamedTuple):
    """A line of a table. model: its index where the line is one model's, else None."""

    head: str
    cells: list[Cell]
    model: int | None = None
    is_mean: bool = False


class Group(NamedTuple):
    """Lines under a heading of their own, which may be empty."""

    title: str
    rows: list[Row]


class Table(NamedTuple):
    """A table with figures in all columns but the first."""

    headings: list[str]
    groups: list[Group]


class Choice(NamedTuple):
    """A line of words: one value for all models, or one for each."""

    name: str
    values: list[str]
    differs: bool


def quality_table(records: Sequence[Record], found: Sequence[Difference]) -> Table:
    """A row a model: the plain reconstruction, and the errors by kind of transformation."""
    cells: list[list[Cell]] = [[] for _ in records]
    headings = ["model"]
    for column in quality_columns(records):
        values = [column.value(record, record["reconstruction"]) for record in records]
        _append(cells, column, values, comparable(found, column.key))
        headings.append(column.heading)
    error = transformed_columns(records)[0]
    for kind in KINDS:
        values = [error.mean(record, kind) for record in records]
        if any(value is not None for value in values):
            _append(cells, error, values, comparable(found, "error", "mean"))
            headings.append(f"{kind} error ↓")
    rows = [
        Row(short(r["name"]), row, i) for i, (r, row) in enumerate(zip(records, cells, strict=True))
    ]
    return Table(headings, [Group("", rows)])


def equivariance_table(record: Record) -> Table:
    """One model: a row for its reconstruction, and for every transformation and their means."""
    columns = transformed_columns([record])
    plain = record["reconstruction"]
    first = Row("identity", [_cell(c, c.value(record, plain)) for c in columns])
    groups = [Group("", [first])]
    for kind, plural in KINDS.items():
        parts = rows_of(record, kind)
        rows = [Row(label_of(p), [_cell(c, c.value(record, p)) for c in columns]) for p in parts]
        if len(parts) > 1:
            means = [_cell(c, c.mean(record, kind)) for c in columns]
            rows.append(Row(f"mean of {plural}", means, is_mean=True))
        if rows:
            groups.append(Group("", rows))
    return Table(["t", *(c.heading for c in columns)], groups)


def mean_table(records: Sequence[Record], found: Sequence[Difference]) -> Table:
    """Several models: for every kind of transformation, the means, a row a model."""
    columns = transformed_columns(records)
    groups = []
    for kind, plural in KINDS.items():
        if any(rows_of(record, kind) for record in records):
            values = [[c.mean(record, kind) for record in records] for c in columns]
            groups.append(_group(f"{plural}, mean", records, columns, values, found, "mean"))
    return Table(["model", *(c.heading for c in columns)], groups)


def transformation_table(records: Sequence[Record], found: Sequence[Difference]) -> Table:
    """Several models: for every transformation, a row a model."""
    columns = transformed_columns(records)
    by_name = [{t["name"]: t for t in record["transformations"]} for record in records]
    pairs = list(zip(records, by_name, strict=True))
    labels = {t["name"]: label_of(t) for record in records for t in record["transformations"]}
    groups = []
    for name, label in labels.items():
        values = [[c.value(record, rows.get(name, {})) for record, rows in pairs] for c in columns]
        groups.append(_group(label, records, columns, values, found, "one"))
    return Table(["model", *(c.heading for c in columns)], groups)


def _group(
    title: str,
    records: Sequence[Record],
    columns: Sequence[Column],
    values: Sequence[Sequence[float | None]],
    found: Sequence[Difference],
    transformed: str,
) -> Group:
    cells: list[list[Cell]] = [[] for _ in records]
    for column, of in zip(columns, values, strict=True):
        _append(cells, column, of, comparable(found, column.key, transformed))
    rows = [
        Row(short(record["name"]), row, i)
        for i, (record, row) in enumerate(zip(records, cells, strict=True))
        if any(of[i] is not None for of in values)
    ]
    return Group(title, rows)


def _append(
    cells: list[list[Cell]], column: Column, values: Sequence[float | None], marked: bool
) -> None:
    best = column.best(values) if marked else set()
    for i, value in enumerate(values):
        cells[i].append(Cell(column.text(value), i in best))


def _cell(column: Column, value: float | None) -> Cell:
    return Cell(column.text(value))


def transformation_words(record: Record) -> dict[str, str]:
    """{name: all figures of a transformation of one model, with their labels}."""
    columns = transformed_columns([record])
    return {
        row["name"]: ", ".join(
            f"{c.label} {c.text(value)}{' ' + c.unit if c.unit else ''}"
            for c, value in ((c, c.value(record, row)) for c in columns)
            if value is not None
        )
        for row in record["transformations"]
    }


def protocol_choices(records: Sequence[Record]) -> list[tuple[str, list[Choice]]]:
    """Every choice of the protocols, as a group without a name."""
    keys = dict.fromkeys(key for record in records for key in record["protocol"])
    return [("", [_choice(title_of(k), [r["protocol"].get(k) for r in records]) for k in keys])]


def identity_choices(records: Sequence[Record]) -> list[tuple[str, list[Choice]]]:
    """What was evaluated, on what, by what: named groups of lines."""

    def part(name: str, first: Sequence[str]) -> list[Choice]:
        keys = dict.fromkeys([*first, *(key for r in records for key in r[name])])
        return [_choice(title_of(key), [r[name].get(key) for r in records]) for key in keys]

    versions = dict.fromkeys(key for record in records for key in record["versions"])
    run = [_choice("images evaluated", [record.get("images") for record in records])]
    run += [_choice(key, [r.get(key) for r in records]) for key in ("device", "devices", "seed")]
    run.append(_choice("time", [seconds(figure(r, "seconds")) for r in records]))
    run += [_choice(key, [r["versions"].get(key) for r in records]) for key in versions]
    return [("model", part("model", _MODEL)), ("images", part("data", _DATA)), ("evaluation", run)]


def _choice(name: str, values: Sequence[Any]) -> Choice:
    printed = [MISSING if value is None or value == "" else words(value) for value in values]
    differs = len(set(printed)) > 1
    return Choice(name, printed if differs else printed[:1], differs)


def missing_figures(record: Record) -> list[tuple[str, str]]:
    """(figure, reason) of all that could not be had."""
    labels = {f.key: f.label for f in latent_figures([record])}
    labels["frechet"] = frechet_label(record.get("frechet"))
    return [(labels.get(key) or title_of(key), str(why)) for key, why in record["missing"].items()]


def title_of(key: str) -> str:
    """A key of a record in words."""
    return ": ".join(_NAMES.get(part, part.replace("_", " ")) for part in key.split(": "))


def model_words(record: Record) -> str:
    """ "KL autoencoder, latent 32×32×4, 83.7 M parameters, step 600"."""
    model = record["model"]
    said = [_KINDS.get(model.get("kind"), str(model.get("kind") or "autoencoder"))]
    if model.get("latent_shape"):
        said.append(f"latent {words(model['latent_shape'])}")
    if parameters := figure(model, "parameters"):
        big = parameters >= 1e6
        size = f"{parameters / 1e6:.1f} M" if big else f"{parameters:,}"
        said.append(f"{size} parameters")
    if model.get("step") is not None:
        said.append(f"step {words(model['step'])}")
    return ", ".join(said)


def data_words(record: Record) -> str:
    """ "1,000 images: folder /data/val, test, 256×256"."""
    data = record["data"]
    said = [" ".join(str(data[key]) for key in ("source", "path") if data.get(key))]
    said += [words(data[key]) for key in ("split", "size") if data.get(key)]
    count = words(record.get("images"))
    return f"{count if count != UNSTATED else 'some'} images: {', '.join(filter(None, said))}"


def seconds(value: float | None) -> str:
    """A time in words."""
    if value is None:
        return MISSING
    if value < 600:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"
