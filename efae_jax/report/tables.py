"""Evaluations in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from efae_jax.logs import figures_table
from efae_jax.report.comparing import comparable, differences
from efae_jax.report.figures import Column, number, quality_columns, transformed_columns
from efae_jax.report.latents import latent_figures
from efae_jax.report.records import KINDS, Record, figure, label_of, rows_of


def report_tables(records: Sequence[Record]) -> list[Table]:
    """What an evaluation found, or several beside one another with the best in bold.

    One: a row for the plain reconstruction and each transformation; the latent's figures.
    Several: a row each, with the means over transformations.
    """
    if len(records) == 1:
        return [_transformations(records[0]), _latent(records[0])]
    return [_models(records)]


def _transformations(record: Record) -> Table:
    columns = transformed_columns([record])
    plain = record["reconstruction"]
    rows = [["reconstruction", *(c.text(c.value(record, plain)) for c in columns)]]
    for kind, plural in KINDS.items():
        parts = rows_of(record, kind)
        for part in parts:
            rows.append([escape(label_of(part)), *(c.text(c.value(record, part)) for c in columns)])
        if len(parts) > 1:
            rows.append([f"{plural}, mean", *(c.text(c.mean(record, kind)) for c in columns)])
    images = f"{record.get('images') or 0:,} images"
    title = f"{escape(record['name'])}: decode(t E(x)) against t x, {images}"
    return figures_table(title, ["t", *(c.heading for c in columns)], rows)


def _latent(record: Record) -> Table:
    rows = [[f.label, f.text(record), f.note(record)] for f in latent_figures([record])]
    return figures_table("latent space", ["", "figure", "of"], rows)


def _models(records: Sequence[Record]) -> Table:
    found = differences(records)
    rows = [[escape(record["name"])] for record in records]
    headings = ["model"]

    def add(column: Column, heading: str, values: list[float | None], marked: bool) -> None:
        best = column.best(values) if marked else set()
        headings.append(heading)
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            text = column.text(value)
            row.append(f"[bold]{text}[/bold]" if i in best else text)

    for column in quality_columns(records):
        values = [column.value(record, record["reconstruction"]) for record in records]
        add(column, column.heading, values, comparable(found, column.key))
    error = transformed_columns(records)[0]
    for kind in KINDS:
        values = [error.mean(record, kind) for record in records]
        add(error, f"{kind} error ↓", values, comparable(found, "error", "mean"))
    images = {record.get("images") for record in records}
    title = f"{len(records)} models"
    if len(images) == 1 and None not in images:
        title += f", {images.pop():,} images"
    return figures_table(title, headings, rows)
