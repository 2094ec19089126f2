"""What a training run says of its data, and keeps."""

import json

import pytest
from data_files import encoded, picture
from tiny import tiny

from efae_jax import train
from efae_jax.errors import RunError

pytestmark = pytest.mark.usefixtures("only_one_device")
FRACTION = 0.3
HELD_OUT, TRAINED_ON = "held out for testing", "for training, not held out"


@pytest.fixture
def images(tmp_path):
    """Twenty readable images, two damaged ones and a hidden one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(encoded(picture(1))[:80])
    (folder / ".hidden.png").write_bytes(encoded(picture(2)))
    return folder


def config_of(images, **overrides):
    fields = {"source": "folder", "path": str(images), "test_fraction": FRACTION, "max_bad": 2}
    data = {f"data__{name}": value for name, value in (fields | overrides).items()}
    return tiny(train__steps=4, train__batch_size=8, checkpoint__every=2, **data)


def kept(workdir):
    return json.loads((workdir / "data.json").read_text())


def counts(account):
    return {kind.split(" (")[0]: entry["count"] for kind, entry in account["left_out"].items()}


def test_a_run_says_what_it_leaves_out(images, tmp_path, capsys):
    train.train(config_of(images), tmp_path / "run")
    said, found = capsys.readouterr().out, kept(tmp_path / "run")
    assert found["train"]["images"] + found["test"]["images"] == 22
    line = f"data: {found['train']['images']} images to train on, {found['test']['images']} held"
    assert line in said
    assert said.index(line) < said.index("training efae")
    hidden = "hidden files"
    assert counts(found["test"]) == {TRAINED_ON: found["train"]["images"], hidden: 1}
    # Of the damaged ones, those that are trained on, four batches of eight having met them all.
    damaged = counts(found["train"])["unreadable"]
    assert counts(found["train"]) == {
        HELD_OUT: found["test"]["images"],
        hidden: 1,
        "unreadable": damaged,
    }
    assert 1 <= damaged <= 2
    assert found["train"]["used"] == found["train"]["images"] - damaged
    assert found["test"]["used"] == found["test"]["images"]
    assert said.count("hidden files") == 1  # of both sources, said once
    assert said.index("data: left out in training:") < said.index("  unreadable (")
    assert not (tmp_path / "run" / "data.json.tmp").exists()


def test_a_run_that_stops_for_its_images_keeps_which(images, tmp_path):
    with pytest.raises(RunError, match=r"more than data\.max_bad"):
        train.train(config_of(images, max_bad=0), tmp_path / "run")
    assert "unreadable" in counts(kept(tmp_path / "run")["train"])


def test_a_finished_run_keeps_what_it_found(images, tmp_path):
    config = config_of(images)
    train.train(config, tmp_path / "run")
    before = kept(tmp_path / "run")
    train.train(config, tmp_path / "run")
    assert kept(tmp_path / "run") == before


def test_where_nothing_is_left_out(tmp_path, capsys):
    train.train(tiny(train__steps=2, eval__num_images=8), tmp_path)
    assert "data: 96 images to train on, 21 held out\n" in capsys.readouterr().out
    assert kept(tmp_path) == {
        "train": {"images": 96, "used": 96, "left_out": {}},
        "test": {"images": 21, "used": 8, "left_out": {}},
    }
