"""One self-contained page of the evaluation of one model, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from efae_jax.report import plots, sections
from efae_jax.report.comparing import differences, letters, short
from efae_jax.report.figures import quality_columns
from efae_jax.report.gallery import make_gallery
from efae_jax.report.latents import latent_figures
from efae_jax.report.records import Record
from efae_jax.report.svg import colour


class Model(NamedTuple):
    """How a page names a model: a letter and a colour besides its name."""

    letter: str
    tint: str
    name: str
    short: str
    words: str


class Tile(NamedTuple):
    """A headline figure; `why` where it is missing."""

    label: str
    text: str
    unit: str
    why: str


class Plot(NamedTuple):
    """A drawing and what it shows."""

    svg: Markup
    caption: str


_CAPTIONS = {
    "spectra": "Energy of the discrete cosine transform over frequency, in units of its mean: "
    "white noise is 1 everywhere, photographs fall steeply. A latent that stays high to the right "
    "holds fine-grained, noise-like detail.",
    "histograms": "Distribution of every channel, each drawn to its own height; the dark line is "
    "the normal distribution of the same mean and standard deviation.",
    "correlations": "Correlation of the channels over images and positions.",
    "moments": "Mean of every channel, and one standard deviation to both sides.",
    "error": "Error of equivariance: less is better.",
    "psnr": "PSNR of decode(t E(x)) against t x: more is better.",
}


def write_page(evaluations: Sequence[tuple[Record, Path]], out: Path) -> None:
    """Writes an HTML file that needs no other and asks for none.

    Args:
      evaluations: records (see `read_record`), each with its folder, which holds `pictures/`;
        names differ (see `named_apart`).
      out: the file.

    Raises:
      UserError: for a picture that cannot be read.
    """
    records = [record for record, _ in evaluations]
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        gallery=make_gallery(records, [folder for _, folder in evaluations]),
        **_context(records),
    )
    Path(out).write_text(page, encoding="utf-8")


def _context(records: Sequence[Record]) -> dict[str, Any]:
    """All that the template reads, but the pictures."""
    several = len(records) > 1
    found = differences(records)
    spectra = plots.spectra(records, "spectra")
    marks = zip(letters(len(records)), records, strict=True)
    context = {
        "several": several,
        "records": records,
        "title": f"{len(records)} models compared" if several else records[0]["name"],
        "models": [
            Model(
                letter,
                colour(i),
                record["name"],
                short(record["name"]),
                sections.model_words(record),
            )
            for i, (letter, record) in enumerate(marks)
        ],
        "data": _data(records),
        "differences": found,
        "spoils": any(difference.spoils for difference in found),
        "features": {record.get("frechet") for record in records},
        "latent_figures": latent_figures(records),
        "plots": [Plot(spectra, _CAPTIONS["spectra"])] if spectra is not None else [],
        "channel_plots": [_channel_plots(record, i) for i, record in enumerate(records)],
        "protocol": sections.protocol_choices(records),
        "identity": sections.identity_choices(records),
        "missing": [sections.missing_figures(record) for record in records],
    }
    if several:
        context["quality"] = sections.quality_table(records, found)
        context["means"] = sections.mean_table(records, found)
        context["each"] = sections.transformation_table(records, found)
        context["error_plots"] = _error_plots(records)
    else:
        context["tiles"] = _tiles(records[0])
        context["equivariance"] = sections.equivariance_table(records[0])
        context["notes"] = sections.transformation_words(records[0])
    return context


def _data(records: Sequence[Record]) -> list[tuple[str, list[int]]]:
    """The images that were evaluated on, and the models for which, where these are not all."""
    found: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        found.setdefault(sections.data_words(record), []).append(i)
    return [(words, models if len(found) > 1 else []) for words, models in found.items()]


def _tiles(record: Record) -> list[Tile]:
    plain, missing = record["reconstruction"], record["missing"]
    return [
        Tile(c.label, c.text(value), c.unit if value is not None else "",
             str(missing.get(c.key, "")) if value is None else "")
        for c, value in ((c, c.value(record, plain)) for c in quality_columns([record]))
    ]  # fmt: skip


def _error_plots(records: Sequence[Record]) -> list[Plot]:
    asked = (("error", "error"), ("psnr", "PSNR (dB)"))
    drawn = {key: plots.by_transformation(records, f"by-{key}", key, label) for key, label in asked}
    return [Plot(svg, _CAPTIONS[key]) for key, svg in drawn.items() if svg is not None]


def _channel_plots(record: Record, model: int) -> list[Plot]:
    drawn = {
        "histograms": plots.histograms(record, f"histograms-{model}", model),
        "correlations": plots.correlations(record, f"correlations-{model}"),
        "moments": plots.moments(record, f"moments-{model}", model),
    }
    channels = len(record["latent"].get("std") or [])
    some = f" The first {plots.SHOWN} of {channels}." if channels > plots.SHOWN else ""
    return [
        Plot(svg, _CAPTIONS[name] + (some if name != "correlations" else ""))
        for name, svg in drawn.items()
        if svg is not None
    ]
