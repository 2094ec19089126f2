"""The figures of a basis in a table, in words and in a picture."""

from __future__ import annotations

import copy
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from efae_jax.disentanglement import report

DRAWS = {"semantic": [0.25, 0.35], "style": [0.15, 0.05]}  # R^2 of captions


def row(channels, caption, style):
    def figures(r2):
        return {"r2": r2, "recall_1": 0.5 + r2 / 10, "recall_5": 0.7 + r2 / 10}

    return {"channels": channels, "caption": figures(caption), "style": figures(style)}


def record_of(channels=4, semantic=2, scale=1.0, shift=0.0):
    """R^2 are those written here times `scale`, plus `shift`."""
    counts = {"semantic": semantic, "style": channels - semantic}
    raw = {"raw semantic": list(range(semantic)), "raw style": list(range(semantic, channels))}
    parts = {"semantic": (0.6, 0.01), "style": (0.1, 0.5)}
    for draw in range(2):
        for part, values in DRAWS.items():
            parts[f"random {part} {draw}"] = (values[draw], 0.3)
    parts |= {"raw semantic": (0.4, 0.2), "raw style": (0.3, 0.35)}
    return {
        "parts": {
            name: row(counts["style" if "style" in name else "semantic"],
                      *(scale * v + shift for v in r2)) for name, r2 in parts.items()
        },
        "raw": raw,
        "images": {"train": 9_000, "held_out": 1_234},
        "orthogonality_error": 2e-7,
        "trained_orthogonality_error": 3e-2,
        "reconstruction": {"psnr": 131.7, "largest": 1e-6, "images": 16},
        "latent": {
            "reconstruction_error": 4e-8,
            **{space: {"mean": [-0.1, 0.2], "std": [0.9, 1.1], "excess_kurtosis": [-1, 3],
                       "mean_abs_correlation": 0.25} for space in ("raw", "basis")},
        },
    }  # fmt: skip


def test_lines_name_the_parts_and_hold_their_figures():
    lines = report.lines(record_of(6, 2))
    assert [(line.name, line.part, line.channels) for line in lines] == [
        ("semantic", "semantic", 2), ("random", "random", 2), ("best raw (0, 1)", "raw", 2),
        ("style", "style", 4), ("random", "random", 4), ("best raw (2, 3, 4, 5)", "raw", 4),
    ]  # fmt: skip
    r2 = [line.values["caption", "r2"].tolist() for line in lines]
    assert r2 == [[0.6], DRAWS["semantic"], [0.4], [0.1], DRAWS["style"], [0.3]]
    np.testing.assert_allclose(lines[3].values["style", "recall_5"], [0.75])
    assert [line.name for line in report.lines(record_of(32, 16))][2::3] == ["best raw"] * 2


def test_the_table_has_means_and_the_spread_of_draws():
    file = io.StringIO()
    Console(file=file, width=120).print(report.table(record_of()))
    text = file.getvalue()
    assert "1,234 held-out images" in text
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    ]
    # (N - 1) deviation of 0.25 and 0.35; of recall a tenth of it.
    assert cells[:3] == [
        ["semantic", "2", "0.600", "0.560", "0.760", "0.010", "0.501", "0.701"],
        ["random", "2", "0.300 ±0.071", "0.530 ±0.007", "0.730 ±0.007",
         "0.300 ±0.000", "0.530 ±0.000", "0.730 ±0.000"],
        ["best raw (0, 1)", "2", "0.400", "0.540", "0.740", "0.200", "0.520", "0.720"],
    ]  # fmt: skip
    assert [c[0] for c in cells[3:]] == ["style", "random", "best raw (2, 3)"]


def test_words_say_what_the_basis_costs():
    first, raw, basis = report.words(record_of())
    assert "max |QᵀQ - 1|: 2.0e-07 (of the matrix as trained 3.0e-02)" in first
    assert "4.0e-08" in first
    assert "132 dB, 16 images" in first
    assert raw.startswith("raw channels: mean -0.10 to 0.20, std 0.90 to 1.10, excess kurtosis -1")
    assert basis.endswith("mean |correlation| 0.25")
    record = record_of()
    record["reconstruction"] = {"missing": "the model is gone"}
    assert "the model is gone" in report.words(record)[0]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a record; gives the axes, and the boxes in pixels of all that is written in them."""

    def draw(record):
        found, close = {}, plt.close

        def measured(figure):
            renderer = figure.canvas.get_renderer()
            found["axes"], found["boxes"] = figure.axes, []
            for axis in figure.axes:
                texts = [t for t in (*axis.texts, *axis.get_yticklabels()) if t.get_visible()]
                found["boxes"].append(
                    [t.get_window_extent(renderer) for t in texts if t.get_text()]
                )
            found["size"], found["right"] = figure.bbox, figure.axes[1].get_window_extent(renderer)
            close(figure)

        with monkeypatch.context() as patch:
            patch.setattr(plt, "close", measured)
            report.draw(record, tmp_path / "x.png")
        return found

    return draw


@pytest.mark.parametrize(
    ("channels", "scale", "shift"),
    [(4, 1.0, 0.0), (32, 1.0, 0.3), (16, 0.3, -0.5), (4, 1e-4, 0.4), (4, 1e-4, 0.0), (8, 0, 0)],
)
def test_the_picture_is_legible(drawn, tmp_path, channels, scale, shift):
    """Of few and of many channels, with R^2 that are negative, next to equal, or all zero."""
    record = record_of(channels, channels // 2, scale, shift)
    before, found = copy.deepcopy(record), drawn(record)
    assert record == before
    picture = Image.open(tmp_path / "x.png")
    assert picture.width > 1_000
    assert not plt.get_fignums()
    for axis, target, boxes in zip(
        found["axes"], ("caption", "style"), found["boxes"], strict=True
    ):
        assert target in axis.get_title(loc="left")
        low, high = axis.get_xlim()
        assert low <= 0 <= high
        assert high - low >= report.SPAN
        values = [row[target]["r2"] for row in record["parts"].values()]
        assert low <= min(values) <= max(values) <= high
        shown = {x for line in axis.lines for x in line.get_xdata()}
        assert set(values) <= shown
        labels = [text.get_text() for text in axis.texts]
        means = [line.values[target, "r2"].mean() for line in report.lines(record)]
        wanted = [f"{mean:.3f}".replace("-", "\u2212") for mean in means]
        assert [text.split(" ")[0] for text in labels] == wanted
        ends = [line.values[target, "r2"].max() for line in report.lines(record)]
        assert [text.xy[0] for text in axis.texts] == ends  # beside all dots
        assert ["±" in text for text in labels] == [False, True, False] * 2
        for i, box in enumerate(boxes):
            assert found["size"].x0 <= box.x0 <= box.x1 <= found["size"].x1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    assert max(box.x1 for box in found["boxes"][0]) < found["right"].x0
    half = channels // 2
    names = [text.get_text() for text in found["axes"][0].get_yticklabels()]
    assert [name.split(" (")[0] for name in names] == [
        f"{half} {name}"
        for name in ("semantic", "random", "best raw", "style", "random", "best raw")
    ]
