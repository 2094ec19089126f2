"""The benchmark of reading: what it reads is what it says, and it measures what was asked for."""

import numpy as np
import pytest
from data_files import data_config, encoded, picture

from efae_jax.benchmark import input as reading
from efae_jax.benchmark import photographs
from efae_jax.benchmark.pairs import Spread
from efae_jax.data import Transform, make_source
from efae_jax.errors import UserError


def test_folder_shards_and_cache_hold_the_same_photographs(tmp_path):
    sources = reading._sources(tmp_path, 3, 32, None)
    assert list(sources) == ["JPEG folder", "tar shards", "cache"]
    folder, shards, cache = sources.values()
    assert len(folder) == len(shards) == len(cache) == 3
    for i in range(3):
        assert folder[i]["image"] == shards[i]["image"]
        assert folder[i]["label"] == shards[i]["label"] == cache[i]["label"] == i
        assert min(cache[i]["image"].shape[:2]) == 32
    image = np.asarray(photographs.photograph(0))
    assert image.shape == (375, 500, 3)
    np.testing.assert_array_equal(image, photographs.photograph(0))
    assert not np.array_equal(image, photographs.photograph(5))
    # As of photographs: neighbours are alike, but not equal; 0.1 to 0.5 bytes a pixel.
    assert 1 < abs(np.diff(image.astype(int), axis=1)).mean() < 15
    assert 0.1 < len(folder[0]["image"]) / image[..., 0].size < 0.8


def test_rates_and_stages_of_the_users_data(tmp_path, capsys):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number, 40, 30)))
    rows = reading.measure(
        size=16, workers=(1,), rounds=2, batch_size=4, batches=2, peer=False, data=str(tmp_path)
    )
    rates = {(r.data, r.reader, r.workers) for r in rows if r.unit == reading.RATE}
    names = (str(tmp_path), reading.SMALL)
    ours = (reading.THREADS, reading.WORKERS)
    assert rates == {(name, reader, 1) for name in names for reader in ours}
    # A clock may find no time in a stage of such small images, but some in a turn.
    assert all(0 <= r.value.low <= r.value.median <= r.value.high for r in rows)
    assert all(r.value.low > 0 for r in rows if r.unit == reading.RATE)
    stages = [r.reader for r in rows if r.unit == reading.TIME]
    assert stages == ["read", "decode", "resize and crop", "order and collate"]
    reading.show(rows)
    assert "images/s a core" in capsys.readouterr().out.replace("\n", " ")


def test_the_peer_reads_too(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "0.png").write_bytes(encoded(picture(0)))
    source = make_source(data_config(path=str(tmp_path)), "train")
    turn = reading._Turn(source, Transform((8, 8)), batch_size=2, batches=2)
    assert turn.peer(1)() > 0


def test_ratios_are_taken_pair_by_pair(tmp_path, monkeypatch):
    """The machine is twice as slow in the second round; the ratio does not see it."""
    (tmp_path / "0.png").write_bytes(encoded(picture(0)))
    speeds = {reading.THREADS: 30.0, reading.WORKERS: 40.0, reading.PEER: 20.0}
    calls = dict.fromkeys(speeds, 0)

    def measured(reader):
        def turn():
            calls[reader] += 1
            return speeds[reader] / (2 if calls[reader] > 2 else 1)  # two data sets a round

        return turn

    monkeypatch.setattr(reading, "find_spec", lambda _: True)  # with PyTorch or without
    monkeypatch.setattr(reading._Turn, "peer", lambda *_: measured(reading.PEER))
    ours = lambda _, **how: measured(reading.THREADS if "num_threads" in how else reading.WORKERS)  # noqa: E731
    monkeypatch.setattr(reading._Turn, "ours", ours)
    rows = reading.measure(size=8, workers=(1,), rounds=2, data=str(tmp_path))
    by_reader = {r.reader: r for r in rows if r.data == str(tmp_path)}
    assert by_reader[reading.THREADS].ratio == Spread(1.5, 1.5, 1.5)
    assert by_reader[reading.WORKERS].ratio == Spread(2.0, 2.0, 2.0)
    assert by_reader[reading.PEER].ratio is None
    assert by_reader[reading.PEER].value == Spread(15.0, 10.0, 20.0)


def test_mistakes_are_one_line(monkeypatch):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch, or measure without the peer"):
        reading.measure()
    for options in ({"rounds": 0}, {"workers": (0,)}, {"workers": ()}, {"images": 0}, {"size": 0}):
        with pytest.raises(UserError, match=rf"{next(iter(options))}: .*at least 1"):
            reading.measure(peer=False, **options)
