"""Evaluations in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from efae_jax.logs import figures_table
from efae_jax.report.comparing import comparable, differences, letters
from efae_jax.report.figures import Column, quality_columns, transformed_columns
from efae_jax.report.latents import latent_figures
from efae_jax.report.records import KINDS, Record, label_of, rows_of

ABREAST = 4  # models in a table


def report_tables(records: Sequence[Record]) -> list[Table]:
    """What an evaluation found, or several beside one another with the best in bold.

    One: a row for the plain reconstruction and each transformation; then the latent's figures.
    Several: a column each, as many as fit into 80 characters beside one another, and a row a
    figure, those of transformations as means over a kind; the caption names the columns.
    """
    if len(records) == 1:
        return [_transformations(records[0]), _latent(records[0])]
    return _models(records)


def _transformations(record: Record) -> Table:
    columns = transformed_columns([record])
    plain = record["reconstruction"]
    rows = [["identity", *(c.text(c.value(record, plain)) for c in columns)]]
    for kind, plural in KINDS.items():
        parts = rows_of(record, kind)
        for part in parts:
            rows.append([escape(label_of(part)), *(c.text(c.value(record, part)) for c in columns)])
        if len(parts) > 1:
            rows.append([f"{plural}, mean", *(c.text(c.mean(record, kind)) for c in columns)])
    title = f"{escape(record['name'])}: decode(t E(x)) against t x"
    if record.get("images"):
        title += f", {record['images']:,} images"
    headings = (c.heading.replace(" (", "\n(") for c in columns)  # all fits into 80 columns
    return figures_table(title, ["t", *headings], rows)


def _latent(record: Record) -> Table:
    rows = [[f.label, f.text(record), f.note(record)] for f in latent_figures([record])]
    table = figures_table("latent space", ["", "", ""], rows)
    table.show_header = False
    return table


def _models(records: Sequence[Record]) -> list[Table]:
    found = differences(records)
    rows: list[list[str]] = []

    def add(column: Column, heading: str, values: list[float | None], marked: bool) -> None:
        best = column.best(values) if marked else set()
        texts = [column.text(value) for value in values]
        if any(value is not None for value in values):
            rows.append(
                [heading, *(f"[bold]{t}[/bold]" if i in best else t for i, t in enumerate(texts))]
            )

    for column in quality_columns(records):
        values = [column.value(record, record["reconstruction"]) for record in records]
        add(column, column.heading, values, comparable(found, column.key))
    for kind, plural in KINDS.items():
        for column in transformed_columns(records):
            values = [column.mean(record, kind) for record in records]
            marked = comparable(found, column.key, "mean")
            add(column, f"{plural}: {column.heading}", values, marked)
    for latent in latent_figures(records):
        rows.append([latent.label, *(latent.text(record) for record in records)])
    title = f"{len(records)} models; of transformations, means of decode(t E(x)) against t x"
    names = [
        (mark, escape(record["name"]))
        for mark, record in zip(letters(len(records)), records, strict=True)
    ]
    tables = []
    for start in range(0, len(records), ABREAST):
        of = slice(start, start + ABREAST)
        table = figures_table(
            title, ["", *(mark for mark, _ in names[of])], [[h, *row[of]] for h, *row in rows]
        )
        table.caption = "\n".join(f"{mark}  {name}" for mark, name in names[of])
        table.caption_justify = "left"
        tables.append(table)
    return tables
