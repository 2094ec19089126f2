"""Matplotlib figures as SVG inside a page: one look, text as text, no ids that collide."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

INK, PALE, FAINT = "#1b1b1f", "#6b6b76", "#d9d9e0"
# Told apart by colour-blind readers as well; plots name models by letters besides, so that
# colours may begin again.
COLOURS = ("#0b66ab", "#c8511b", "#157a5a", "#9a4c95", "#a87900", "#3c4a5e")
WIDTH = 5.0  # inches: 360 units, about the width of a phone, so that 10 points stay 10 pixels

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "efae_jax",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALE,
    "axes.labelcolor": PALE,
    "axes.linewidth": 0.8,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "mathtext.default": "regular",
}


def look() -> AbstractContextManager[None]:
    """Within it, figures are made and drawn in the pages' style."""
    return matplotlib.rc_context(_STYLE)


def colour(i: int) -> str:
    """Of the i-th model, on the whole page."""
    return COLOURS[i % len(COLOURS)]


def to_svg(figure: Figure, name: str, title: str) -> Markup:
    """An `<svg>` element that fits the width it is given.

    Args:
      figure: drawn within `look()`.
      name: unique on the page; every id begins with it.
      title: for readers who do not see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)[1]
    label = Markup(' role="img" aria-label="{}"').format(title)
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}"{label}>', text, count=1)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # The page's own letters, which are no wider than those the figure was laid out with.
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    return Markup(text)
