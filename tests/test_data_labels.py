"""Labels of any kind, and the tables that number them."""

import numpy as np
import pytest

from efae_jax.data.labels import MOST_CLASSES, Label, Table, of_json, parse, read_table, table_of
from efae_jax.errors import UserError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, Label(3)),
        (-1, Label(-1)),
        (" 12\n", Label(12)),
        (b"7", Label(7)),
        ("\ufeff5", Label(5)),
        (4.0, Label(4)),
        ("4.0", Label(4)),
        ("1_000", Label(0, "1_000")),
        ("1e3", Label(0, "1e3")),
        ("-7", Label(-7)),
        (True, Label(1)),
        (None, Label()),
        ("", Label()),
        ([9], Label(9)),
        (np.int64(5), Label(5)),
        (np.array([6]), Label(6)),
        (2.5, Label(0, "2.5")),
        (float("nan"), Label(0, "NaN")),
        ("inf", Label(0, "inf")),
        ("1e400", Label(0, "1e400")),
        (2**31, Label(0, "2147483648")),
        ("2147483647", Label(2147483647)),
        ("n01440764", Label(0, "n01440764")),
        ([1, 2], Label(0, "[1, 2]")),
        ({"b": 1, "a": 2}, Label(0, '{"a": 2, "b": 1}')),
        ({1, 2}, Label(0, "{1, 2}")),
        (b"caf\xe9", Label(0, "caf\ufffd")),
    ],
)
def test_parse(value, expected):
    assert parse(value) == expected


def test_of_json():
    assert of_json(b'{"label": null, "cls": 4}') == Label(4)
    assert of_json(b'{"label": "a\\ud800b"}') == Label(0, "a\\ud800b")
    assert of_json(b'{"cls": "cat"}') == Label(0, "cat")
    assert of_json(b'{"caption": "x"}') == of_json(b"[") == of_json(b"3") == Label()
    assert of_json(b"[" * 100_000) == Label()


def test_a_table_numbers_its_texts_only():
    table = Table(["cat", "dog"])
    assert table.record(Label(0, "dog")) == {"label": 1}
    assert table.record(Label(0, "cow")) == {"label": 0, "label_text": "cow"}
    assert table.record(Label(5)) == {"label": 5}
    assert Table().record(Label()) == {"label": 0}


def test_too_many_texts_are_no_classes():
    assert table_of([Label(0, "b"), Label(0, "a"), Label(0, "b"), Label()]).names == ("a", "b")
    assert table_of(Label(0, str(i) + "x") for i in range(MOST_CLASSES + 1)).names == ()


def test_tables_beside_data(tmp_path):
    assert read_table(tmp_path) is None
    (tmp_path / "classes.json").write_text('{"dog": 1, "cat": 0}')
    assert read_table(tmp_path).names == ("cat", "dog")
    (tmp_path / "classes.json").write_text('["x", "y"]')
    assert read_table(tmp_path).names == ("x", "y")
    (tmp_path / "classes.txt").write_text("a\nb\n\n\n", encoding="utf-8-sig")
    assert read_table(tmp_path).names == ("a", "b")


@pytest.mark.parametrize("text", ["", "{", "3", '{"a": 1}', '["a", 2]', '{"a": 0, "b": 0}', "[]"])
def test_a_table_of_another_form_is_named(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json must name the classes"):
        read_table(tmp_path)


def test_a_table_that_is_no_text_is_named(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"classes\.txt must name the classes, each once, in UTF-8"):
        read_table(tmp_path)
