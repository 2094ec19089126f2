"""Evaluations of several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efae_jax import report
from efae_jax.errors import UserError
from efae_jax.logs import console, make_output_folder, say


def compare(paths: Sequence[Path | str], out: Path | str) -> list[dict[str, Any]]:
    """One table and one page of several evaluations, printed and written into a folder.

    `comparison.csv` has a row for each, `index.html` the figures, plots and pictures side by
    side. What the evaluations did not do alike is said, and no best is marked for it.

    Args:
      paths: of the evaluations' JSON, or of the folders that hold `evaluation.json`; pictures
        are looked for beside it.
      out: the folder.

    Returns:
      the records, with names that differ.

    Raises:
      UserError: when there is no such evaluation, or the folder holds one itself.
    """
    if not paths:
        raise UserError("compare: give at least one evaluation, the JSON or its folder")
    out = Path(out)
    if (out / report.FILE).exists():
        raise UserError(f"{out} holds an evaluation, whose page is not written over; give another")
    paths = [Path(path) for path in paths]
    records = report.named_apart([report.read_record(path) for path in paths])
    folders = [path if path.is_dir() else path.parent for path in paths]
    make_output_folder(out)
    report.write_csv(records, out / "comparison.csv")
    report.write_page(list(zip(records, folders, strict=True)), out / "index.html")
    for table in report.report_tables(records):
        console.print(table)
    for difference in report.differences(records):
        say(f"not alike: {difference}")
    say(f"page and figures: {out}/index.html, comparison.csv")
    return records
