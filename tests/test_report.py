"""Records of evaluations: reading them, comparing them, CSV, tables in the terminal."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from evaluations import make_record, without
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from efae_jax import report
from efae_jax.errors import UserError
from efae_jax.report.comparing import comparable, letters, short
from efae_jax.report.figures import Column, frechet_label, number, quality_columns
from efae_jax.report.records import figure, mean_of

QUALITY = ("psnr", "ssim", "lpips", "frechet")


def changed(record, part, **values):
    return {**record, part: {**record[part], **values}}


def printed(tables, width=80, colours=False):
    colour = "standard" if colours else None
    console = Console(width=width, file=io.StringIO(), force_terminal=colours, color_system=colour)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


# Reading


def test_a_record_is_read_from_its_file_or_its_folder(tmp_path):
    record = make_record()
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    assert report.read_record(tmp_path / "evaluation.json") == record
    assert report.read_record(str(tmp_path)) == record


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "evaluation.json does not exist"),
        (b"{", "evaluation.json is not the record of an evaluation"),
        (b"\xff\xfe\x00", "evaluation.json is not the record of an evaluation"),
        (b"[1]", "its format is None, not 'efae_jax evaluation 1'"),
        (b'{"psnr": 1}', "its format is None, not"),
        (b'{"format": "efae_jax evaluation 2"}', "its format is 'efae_jax evaluation 2', not"),
        (b'{"format": "efae_jax evaluation 1"}', "'name' is missing or not a str"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "evaluation.json").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        report.read_record(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent": None}, "x.json: 'latent' is missing or not a dict"),
        ({"transformations": {}}, "'transformations' is missing or not a list"),
        ({"transformations": [3]}, "a transformation is named None"),
        ({"transformations": [{"name": "", "kind": "flip"}]}, "is named ''"),
        ({"transformations": [{"name": "../h", "kind": "flip"}]}, "is named '../h'"),
        ({"transformations": [{"name": "h", "kind": "flip"}] * 2}, "named 'h'; allowed is a name"),
        ({"transformations": [{"name": "h", "kind": "shear"}]}, "allowed: rotation, flip, scale"),
    ],
)
def test_parts_of_another_shape_are_refused(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        report.check_record(make_record(**changes), "x.json")


def test_what_is_no_number_is_no_figure():
    record = changed(make_record(), "reconstruction", psnr="26 dB")
    with pytest.raises(UserError, match=r"reconstruction.psnr of runs/model0 is '26 dB'"):
        figure(record, "reconstruction", "psnr")
    assert figure(record, "reconstruction", "nothing") is None
    assert figure(record, "nothing", "psnr") is None


def test_means_over_a_kind():
    record = make_record()
    turns = [t for t in record["transformations"] if t["kind"] == "rotation"]
    assert mean_of(record, "rotation", "psnr") == (turns[0]["psnr"] + turns[1]["psnr"]) / 2
    assert mean_of(record, "rotation", "error") == record["errors"]["rotation"]
    assert mean_of({**record, "transformations": []}, "rotation", "psnr") is None
    turns[0]["psnr"] = None  # a mean of the others would be another figure
    assert mean_of(record, "rotation", "psnr") is None
    assert mean_of(record, "flip", "psnr") is not None


# Figures in print


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 2, "–"),
        (26.816, 2, "26.82"),
        (0.0, 3, "0.000"),
        (-0.25, 2, "−0.25"),
        (0.0005, 3, "0.001"),
        (0.00049, 3, "4.9e−4"),
        (-3.2e-13, 3, "−3.2e−13"),
        (999.994, 2, "999.99"),
        (4321.09, 2, "4,321"),
        (2.5e11, 2, "2.5e11"),
        (float("inf"), 2, "∞"),
        (float("-inf"), 2, "−∞"),
        (float("nan"), 2, "not a number"),
    ],
)
def test_numbers_in_print(value, digits, text):
    assert number(value, digits) == text


@given(st.floats(-1e12, 1e12), st.integers(0, 4))
def test_a_number_in_print_is_the_number(value, digits):
    back = float(number(value, digits).replace("−", "-").replace(",", ""))
    rounding = 0.5 if abs(value) >= 1000 else 0.5 * 10**-digits
    if 0 < abs(value) < 0.5 * 10**-digits or abs(value) >= 1e9:
        rounding = 0.05 * abs(value)
    assert abs(back - value) <= rounding * (1 + 1e-9) + 1e-15


def test_a_frechet_distance_is_called_what_it_is():
    assert frechet_label("vgg16") == "Fréchet distance (VGG16)"
    assert frechet_label("pytorch-fid") == "rFID (pytorch-fid)"
    assert frechet_label("torch-fidelity") == "rFID (torch-fidelity)"
    assert "FID" not in frechet_label(None) + frechet_label("other")
    # Distances of several features are figures of their own.
    records = [make_record(0), make_record(1, frechet="pytorch-fid"), make_record(2)]
    vgg, inception = quality_columns(records)[3:]
    rows = [record["reconstruction"] for record in records]
    found = [
        [c.value(r, row) for r, row in zip(records, rows, strict=True)] for c in (vgg, inception)
    ]
    assert found[0] == [rows[0]["frechet"], None, rows[2]["frechet"]]
    assert found[1] == [None, rows[1]["frechet"], None]


@pytest.mark.parametrize(
    ("values", "better", "best"),
    [
        ([1.0, 2.0, 3.0], 1, {2}),
        ([1.0, 2.0, 3.0], -1, {0}),
        ([1.0, 3.0, 3.001], 1, {1, 2}),  # alike in print
        ([2.0, 2.001], 1, set()),
        ([2.0, None], 1, set()),
        ([None, 2.0, float("nan"), 1.0], -1, {3}),
        ([2.0, float("inf")], 1, {1}),
        ([float("nan"), 2.0, 1.0], 1, {1}),
        ([], 1, set()),
    ],
)
def test_the_best_of_several(values, better, best):
    assert Column("psnr", "PSNR", "dB", 2, better).best(values) == best


# Names


@given(st.lists(st.sampled_from(["a", "a (1)", "a (2)", "b"]), max_size=6), st.data())
def test_names_are_apart_and_begin_as_given(names, data):
    steps = data.draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    records = [
        changed(make_record(name=n), "model", step=s) for n, s in zip(names, steps, strict=True)
    ]
    named = report.named_apart(records)
    new = [record["name"] for record in named]
    assert len(set(new)) == len(new)
    for record, old, name in zip(named, records, new, strict=True):
        assert name.startswith(old["name"])
        assert {**record, "name": old["name"]} == old
        if names.count(old["name"]) == 1:
            assert name == old["name"]


def test_models_of_one_name_are_told_apart_by_what_differs():
    a, b = make_record(name="m"), make_record(name="m")
    apart = [
        ([a, changed(b, "model", step=700)], ["m (step 600)", "m (step 700)"]),
        ([a, changed(b, "model", sha256="f" * 64)], ["m (00000000)", "m (ffffffff)"]),
        ([a, changed(b, "protocol", name="small")], ["m (eq-vae)", "m (small)"]),
        ([a, changed(b, "data", path="cats")], ["m (photos)", "m (cats)"]),
        ([a, b], ["m (1)", "m (2)"]),
        # A step that two of three share tells nothing apart.
        (
            [
                changed(r, "model", step=s)
                for r, s in ((make_record(0), 1), (make_record(1), 1), (make_record(2), 2))
            ],
            ["m (00000000)", "m (00000001)", "m (00000002)"],
        ),
    ]
    for records, names in apart:
        records = [{**record, "name": "m"} for record in records]
        assert [record["name"] for record in report.named_apart(records)] == names


def test_letters_and_short_names():
    marks = letters(60)
    assert marks[:3] == ["A", "B", "C"]
    assert marks[25:28] == ["Z", "A2", "B2"]
    assert len(set(marks)) == 60
    assert short("runs/eq") == "runs/eq"
    long = "runs/" + "very" * 20 + "/checkpoint-600"
    assert len(short(long)) == 30
    assert short(long).startswith("runs/very")
    assert short(long).endswith("/checkpoint-600")


# What keeps evaluations from being compared


def test_the_same_protocol_on_the_same_images_compares():
    a, b = make_record(0), make_record(1)
    assert report.differences([a, b]) == []
    assert report.differences([a]) == []
    moved = changed(b, "data", path="elsewhere")  # the same names
    (difference,) = report.differences([a, moved])
    assert str(difference) == "path of the images (A: photos; B: elsewhere)"
    assert all(comparable([difference], key, "mean") for key in ("error", *QUALITY))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: changed(r, "data", source="glyphs"), "source of the images"),
        (lambda r: changed(r, "data", split="train"), "split"),
        (lambda r: changed(r, "data", keys="cd" * 32), "names of the images"),
        (lambda r: changed(r, "data", size=[32, 32]), "size of the images (A: 64×64; B: 32×32)"),
        (lambda r: {**r, "images": 500}, "number of images (A: 1,000; B: 500)"),
        (lambda r: changed(r, "protocol", name="small"), "protocol (A: eq-vae; B: small)"),
        (lambda r: changed(r, "protocol", latent="mode"), "protocol: latent"),
        (lambda r: changed(r, "protocol", pixels="floats"), "(A: not stated; B: floats)"),
    ],
)
def test_differences_that_spoil_every_comparison(change, said):
    found = report.differences([make_record(0), change(make_record(1))])
    assert said in str(found[0])
    assert not any(comparable(found, key) for key in QUALITY)
    assert not comparable(found, "error", "one")


def test_differences_that_spoil_some():
    a, b = make_record(0), make_record(1)

    def comparing(change):
        found = report.differences([a, change])
        assert len(found) == 1
        keys = ("error", *QUALITY)
        return [
            {key for key in keys if comparable(found, key, transformed)}
            for transformed in ("", "one", "mean")
        ]

    every = {"error", *QUALITY}
    for key in QUALITY:
        found = report.differences([a, changed(b, "protocol", **{key: "otherwise"})])
        assert {k for k in every if comparable(found, k, "mean")} == every - {key}
    without_frechet = every - {"frechet"}
    assert comparing({**b, "frechet": "pytorch-fid"}) == [without_frechet] * 3
    assert comparing(changed(b, "protocol", transformed="bicubic")) == [every, set(), set()]
    own = changed(b, "protocol", **{"equivariance error": "of a sample"})
    assert comparing(own) == [set(QUALITY)] * 3
    fewer = {**b, "transformations": b["transformations"][:-1]}
    assert comparing(fewer) == [every, every, set()]
    for key in ("latent space", "noise"):
        assert comparing(changed(b, "protocol", **{key: "otherwise"})) == [every] * 3


def test_a_path_matters_where_names_do_not_say_which_images():
    a, b = (changed(make_record(i), "data", keys=None) for i in range(2))
    found = report.differences([a, changed(b, "data", path="elsewhere")])
    assert not comparable(found, "psnr")
    assert str(found[0]) == "path of the images (A: photos; B: elsewhere)"


def test_models_that_agree_are_named_together():
    records = [make_record(i, images=n) for i, n in enumerate((1000, 50, 1000))]
    (difference,) = report.differences(records)
    assert difference.groups() == [("1,000", ["A", "C"]), ("50", ["B"])]


# CSV


def test_columns_of_the_csv_are_stable_and_numbers_come_back(tmp_path):
    record = make_record(3)
    report.write_csv([record], tmp_path / "e.csv")
    with (tmp_path / "e.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    quality = ["error", *QUALITY]
    assert list(row) == [
        *("name", "kind", "source", "step", "sha256", "images"),
        *("data_source", "data_path", "data_split", "data_size", "data_keys", "data_unreadable"),
        *("protocol", "frechet_features", *QUALITY),
        *("rotation_error", "flip_error", "scale_error"),
        *(f"{t}_{key}" for t in ("r90", "r180", "h", "s0.5") for key in quality),
        *("latent_mean_mean", "latent_std_mean", "latent_excess_kurtosis_mean"),
        *("mean_abs_correlation", "high_frequency", "high_frequency_image"),
        *("intrinsic_dimension", "intrinsic_dimension_images"),
        *("velocity_irreducible_variance", "velocity_irreducible_variance_per_dimension"),
        *("velocity_irreducible_variance_classes", "velocity_irreducible_variance_images"),
        *("parameters", "factor", "latent_shape", "group", "representation", "dtype"),
        *("seconds", "device", "devices", "version_efae_jax", "version_jax"),
    ]
    for key in QUALITY:
        assert float(row[key]) == record["reconstruction"][key]
        for t in record["transformations"]:
            assert float(row[f"{t['name']}_{key}"]) == t[key]
    for kind in ("rotation", "flip", "scale"):
        assert float(row[f"{kind}_error"]) == record["errors"][kind]
    assert float(row["r180_error"]) == record["transformations"][1]["error"]
    latent = record["latent"]
    assert float(row["intrinsic_dimension"]) == latent["intrinsic_dimension"]
    velocity = latent["velocity_irreducible_variance"]
    assert float(row["velocity_irreducible_variance"]) == velocity["value"]
    assert float(row["velocity_irreducible_variance_per_dimension"]) == velocity["per_dimension"]
    assert float(row["latent_std_mean"]) == pytest.approx(sum(latent["std"]) / 4)
    said = ("latent_shape", "data_size", "frechet_features", "protocol", "images", "sha256")
    assert [row[key] for key in said] == [
        "8x8x4",
        "64x64",
        "vgg16",
        "eq-vae",
        "1000",
        "00000003" * 8,
    ]


def test_csv_of_several_has_all_columns_and_empty_cells(tmp_path):
    a = without(make_record(0, name='a "quoted", name\nof two lines'), "lpips", "no weights")
    b = make_record(1)
    b["transformations"] = [{**b["transformations"][0], "name": "r45"}]
    report.write_csv([a, b], tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["name"] == a["name"]
    assert first["lpips"] == first["r90_lpips"] == first["r45_psnr"] == second["r90_psnr"] == ""
    assert float(second["r45_psnr"]) == b["transformations"][0]["psnr"]
    assert list(first)[: len(report.csv_row(a))] == list(report.csv_row(a))


# The terminal


@pytest.mark.parametrize("features", ["vgg16", "pytorch-fid", "torch-fidelity"])
def test_table_of_one_model_in_80_columns(features):
    record = make_record(2, frechet=features)
    text = printed(report.report_tables([record]))
    assert "…" not in text
    assert "runs/model2: decode(t E(x)) against t x, 1,000 images" in text
    for t in record["transformations"]:
        (line,) = [line for line in text.splitlines() if t["label"] in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:] == [
            *(f"{t['error']:.3f}", f"{t['frechet']:.2f}", f"{t['psnr']:.2f}"),
            *(f"{t['lpips']:.3f}", f"{t['ssim']:.3f}"),
        ]
    assert f"{mean_of(record, 'rotation', 'psnr'):.2f}" in text
    assert "rotations, mean" in text
    assert "flips, mean" not in text  # of one
    assert ("Fréchet" in text) == (features == "vgg16")
    assert ("FID" in text) == (features != "vgg16")
    assert f"{record['latent']['intrinsic_dimension']:.1f}" in text


def test_many_models_are_in_tables_that_fit():
    records = [make_record(i, frechet="torch-fidelity") for i in range(6)]
    text = printed(report.report_tables(records))
    assert "…" not in text
    rows = [re.findall(r"[\d.]+ ", line) for line in text.splitlines() if "│ PSNR (dB)" in line]
    wanted = [f"{record['reconstruction']['psnr']:.2f} " for record in records]
    assert rows == [wanted[:4], wanted[4:]]
    for letter, record in zip("ABCDEF", records, strict=True):
        assert f"{letter}  {record['name']}" in text


def test_table_of_several_marks_the_best_and_names_the_models():
    records = [make_record(i) for i in range(3)]
    records[0]["name"] = "[red]runs[/red]/" + "x" * 90
    text = printed(report.report_tables(records), colours=True)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert records[0]["name"] in bare.replace("\n", "")
    assert "C  runs/model2" in bare
    values = [record["reconstruction"]["psnr"] for record in records]
    bold = re.findall(r"\x1b\[1m *([\d.,]+)", text)
    assert f"{max(values):.2f}" in bold
    assert f"{min(values):.2f}" not in bold
    errors = [record["errors"]["rotation"] for record in records]
    assert f"{min(errors):.3f}" in bold
    text = printed(report.report_tables([*records[:2], {**records[2], "images": 10}]), colours=True)
    assert not re.findall(r"\x1b\[1m *[\d.,]+", text)
