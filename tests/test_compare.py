"""Several evaluations side by side."""

from __future__ import annotations

import csv

import pytest
from evaluations import TRANSFORMATIONS, Page, make_record, write_evaluation

from efae_jax.compare import compare
from efae_jax.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two evaluations of models of one name."""
    folder = tmp_path_factory.mktemp("evaluations")
    records = [make_record(i, name="runs/eq") for i in range(2)]
    return [write_evaluation(folder / str(i), record) for i, record in enumerate(records)]


def test_one_table_and_one_page(folders, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    records = compare([folders[0] / "evaluation.json", folders[1]], out)
    names = ["runs/eq (00000000)", "runs/eq (00000001)"]
    assert [record["name"] for record in records] == names
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert [float(row["psnr"]) for row in rows] == [r["reconstruction"]["psnr"] for r in records]
    page = Page((out / "index.html").read_text())
    assert names[0] in page.text
    assert names[1] in page.text
    # Of either kind of path: 3 plain ones on one input, 2 latents, 3 of each transformation.
    assert len(page.of("img")) == 3 + 2 + 3 * len(TRANSFORMATIONS)
    printed = capsys.readouterr().out
    assert f"A  {names[0]}" in printed
    assert f"{records[1]['reconstruction']['psnr']:.2f}" in printed
    assert f"{out}/index.html" in printed
    assert "not alike" not in printed
    assert sorted(path.name for path in out.iterdir()) == ["comparison.csv", "index.html"]


def test_differences_are_printed(folders, tmp_path, capsys):
    other = write_evaluation(tmp_path / "other", make_record(5, images=7))
    compare([folders[0], other], tmp_path / "out")
    assert "not alike: number of images (A: 1,000; B: 7)" in capsys.readouterr().out


def test_one_evaluation_alone(folders, tmp_path, capsys):
    compare(folders[:1], tmp_path / "out")
    assert "runs/eq: decode(t E(x)) against t x" in capsys.readouterr().out
    assert "models compared" not in (tmp_path / "out" / "index.html").read_text()


def test_mistakes_are_one_line_and_write_nothing(folders, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="at least one evaluation"):
        compare([], out)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        compare([folders[0], tmp_path / "nowhere"], out)
    assert not out.exists()
    before = {path: path.read_bytes() for path in folders[0].iterdir() if path.is_file()}
    with pytest.raises(UserError, match="holds an evaluation"):
        compare(folders, folders[0])
    assert before == {path: path.read_bytes() for path in folders[0].iterdir() if path.is_file()}
    out.write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        compare(folders, out)
