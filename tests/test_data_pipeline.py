"""The stream of examples is one, however it is cut, resumed, spread or damaged."""

import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from data_files import Numbers, data_config, encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from efae_jax.data import Transform, eval_batches, make_source, train_batches
from efae_jax.errors import RunError, UserError

RANDOM = Transform((4, 2), crop="random", flip=True)  # six views of a 4 x 4 image


def stream(source, examples, *, batch_size=4, process_count=1, transform=RANDOM, **options):
    """The first examples of the global stream, as its processes read it, and as one dict."""
    options = {"seed": 0, "num_threads": 0, **options}
    readers = [
        train_batches(
            source,
            transform,
            batch_size=batch_size,
            process_index=index,
            process_count=process_count,
            **options,
        )
        for index in range(process_count)
    ]
    batches = itertools.chain.from_iterable(zip(*readers, strict=True))
    wanted = list(itertools.islice(batches, -(-examples // batch_size) * process_count))
    for reader in readers:
        reader.close()
    assert all(len(b["label"]) == batch_size // process_count for b in wanted)
    return {key: np.concatenate([b[key] for b in wanted])[:examples] for key in wanted[0]}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_batches_have_the_promised_types():
    batch = next(train_batches(Numbers(9), RANDOM, batch_size=4, seed=0))
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "image": ("uint8", (4, 4, 2, 3)),
        "label": ("int32", (4,)),
        "index": ("int64", (4,)),
        "bad": ("bool", (4,)),
    }


@pytest.mark.parametrize("count", [1, 2, 23])
def test_every_epoch_has_every_record_once_in_its_own_order(count):
    plain = Transform((4, 4))
    x = stream(Numbers(count), 3 * count, transform=plain)
    epochs = x["index"].reshape(3, count)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    if count > 2:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[1], epochs[2])
        assert not np.array_equal(epochs[0], np.arange(count))
    np.testing.assert_array_equal(x["image"][:, 0, 0, 0], x["index"])
    np.testing.assert_array_equal(x["label"], x["index"] % 7)


def test_seeds_share_no_epoch():
    orders = {
        tuple(stream(Numbers(20), 60, seed=seed)["index"][20 * epoch :][:20])
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_augmentation_differs_between_records_epochs_and_seeds():
    one = Numbers(1)
    crops = {x.tobytes() for x in stream(one, 60)["image"]}
    assert len(crops) == 6
    assert not np.array_equal(stream(one, 60, seed=1)["image"], stream(one, 60)["image"])


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 13),
    start=st.integers(0, 30),
    local=st.integers(1, 5),
    processes=st.integers(1, 3),
    threads=st.sampled_from([0, 2]),
    broken=st.sets(st.integers(0, 12), max_size=2),
)
def test_the_stream_does_not_depend_on_how_it_is_read(
    count, start, local, processes, threads, broken
):
    """Any batch size, processes and threads, from any example: a piece of the same stream."""
    source = Numbers(count, tuple(b for b in broken if b < count - 1))
    whole = stream(source, start + 15, batch_size=1, max_bad=2)
    part = stream(
        source,
        15,
        batch_size=local * processes,
        process_count=processes,
        num_threads=threads,
        start_example=start,
        max_bad=2,
    )
    assert_equal(part, {key: value[start:] for key, value in whole.items()})


def test_worker_processes_read_the_same_stream_and_report_damage():
    source = Numbers(11, broken=(4,))
    expected = stream(source, 32, max_bad=1)
    for workers, batch_size, start in ((2, 3, 7), (1, 4, 0)):
        part = stream(
            source,
            25,
            batch_size=batch_size,
            start_example=start,
            num_workers=workers,
            max_bad=1,
        )
        assert_equal(part, {key: value[start : start + 25] for key, value in expected.items()})
    with pytest.raises(
        UserError, match=r"max_bad=0; the last: number 4 \(no image that Pillow reads here"
    ):
        stream(source, 22, num_workers=1)


def test_a_killed_worker_process_is_replaced_and_nothing_is_missed(caplog):
    expected = stream(Numbers(9), 40)
    reader = train_batches(Numbers(9), RANDOM, batch_size=2, seed=0, num_workers=1)
    found = [next(reader)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found += [next(reader) for _ in range(19)]
    assert time.monotonic() - start < 60
    assert "exit code -9" in caplog.text
    assert "New processes go on" in caplog.text
    for name in ("index", "image", "label"):
        np.testing.assert_array_equal(np.concatenate([b[name] for b in found]), expected[name])
    reader.close()


def test_worker_processes_that_always_die_stop_the_run():
    class Deadly(Numbers):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    reader = train_batches(Deadly(9), RANDOM, batch_size=2, seed=0, num_workers=1)
    with pytest.raises(RunError, match=r"reading stopped 3 times .*exit code -9.*num_workers=0"):
        next(reader)


def test_processes_share_out_each_epoch():
    parts = [
        next(
            train_batches(
                Numbers(12), RANDOM, batch_size=12, seed=0, process_index=i, process_count=3
            )
        )
        for i in range(3)
    ]
    indices = [set(part["index"].tolist()) for part in parts]
    assert all(len(part) == 4 for part in indices)
    assert set.union(*indices) == set(range(12))


# Damage


def test_a_bad_record_is_marked_and_replaced_by_the_next_good_one(caplog):
    source = Numbers(10, broken=(3, 4, 9))
    with caplog.at_level(logging.WARNING):
        x = stream(source, 30, transform=Transform((4, 4)), max_bad=3)
    np.testing.assert_array_equal(x["bad"], np.isin(x["index"], (3, 4, 9)))
    shown = np.where(x["index"] == 9, 0, np.where(x["bad"], 5, x["index"]))
    np.testing.assert_array_equal(x["image"][:, 0, 0, 0], shown)
    np.testing.assert_array_equal(x["label"], shown % 7)
    for index in (3, 4, 9):  # three epochs, one warning each
        assert caplog.text.count(f"skipped number {index}: no image") == 1


def test_more_distinct_bad_records_than_the_limit_stop_the_run():
    source = Numbers(10, broken=(1, 3, 4))
    stream(source, 50, max_bad=3)
    with pytest.raises(UserError, match=r"3 unreadable images .*max_bad=2.*number") as error:
        stream(source, 50, max_bad=2)
    assert all(f"number {index} (" in str(error.value) for index in (1, 3, 4))
    with pytest.raises(UserError, match=r"1 unreadable images .*max_bad=0"):
        stream(source, 50)


@pytest.mark.parametrize("max_bad", [0, 2, 4, 100])
@pytest.mark.parametrize("threads", [0, 3])
def test_nothing_readable_ends_the_search(max_bad, threads):
    source = Numbers(5, broken=tuple(range(5)))
    with pytest.raises(
        UserError, match=r"no readable image from number|unreadable images are more"
    ):
        stream(source, 20, max_bad=max_bad, num_threads=threads)


def test_files_that_break_in_every_way(tmp_path, caplog):
    good = encoded(picture(0, 40, 40), "JPEG")
    files = {
        "empty.png": b"",
        "text.jpg": b"<html>",
        "torn.jpg": good[: len(good) // 2],
        "large.png": encoded(picture(0, 60, 60)),
        "good.jpg": good,
        "gone.jpg": good,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = make_source(data_config(path=str(tmp_path)), "train")
    (tmp_path / "gone.jpg").unlink()
    transform = Transform((8, 8), max_pixels=2000)
    with caplog.at_level(logging.WARNING):
        x = stream(source, 6, transform=transform, max_bad=5)
    names = [source.key(i) for i in x["index"][x["bad"]]]
    assert sorted(names) == ["empty.png", "gone.jpg", "large.png", "text.jpg", "torn.jpg"]
    assert len({image.tobytes() for image in x["image"]}) == 1  # the good one everywhere
    for reason in (
        "gone.jpg: gone since the files were listed",
        "large.png: more pixels than data.max_pixels=2,000 (--max-pixels): 60x60",
        "torn.jpg: damaged",
        "text.jpg: no image that Pillow reads here: a web page",
        "empty.png: empty",
    ):
        assert reason in caplog.text
    masks = [
        batch["mask"].tolist()
        for batch in eval_batches(source, transform, batch_size=6, max_bad=5, num_threads=2)
    ]
    assert masks == [[name == "good.jpg" for name in sorted(files)]]


def test_a_label_that_is_no_number_is_no_damage():
    class Odd(Numbers):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": "dog" if index == 2 else 1}

    found = stream(Odd(4), 4, max_bad=0)
    assert not found["bad"].any()
    assert sorted(found["label"]) == [0, 1, 1, 1]


# Evaluation


@given(count=st.integers(1, 17), local=st.integers(1, 4), processes=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_evaluation_sees_every_record_once_in_order(count, local, processes):
    readers = [
        list(
            eval_batches(
                Numbers(count),
                Transform((4, 4)),
                batch_size=local * processes,
                process_index=index,
                process_count=processes,
                num_threads=0,
            )
        )
        for index in range(processes)
    ]
    assert {len(batches) for batches in readers} == {-(-count // (local * processes))}
    batches = [batch for together in zip(*readers, strict=True) for batch in together]
    assert all(len(batch["mask"]) == local for batch in batches)
    x = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    np.testing.assert_array_equal(x["index"][x["mask"]], np.arange(count))
    np.testing.assert_array_equal(x["image"][x["mask"]][:, 0, 0, 0], np.arange(count))
    np.testing.assert_array_equal(x["index"][~x["mask"]], -1)
    assert not x["image"][~x["mask"]].any()
    assert not x["bad"].any()


def test_evaluation_masks_bad_records_up_to_the_limit():
    source, plain = Numbers(6, broken=(1, 5)), Transform((4, 4))
    (batch,) = eval_batches(source, plain, batch_size=8, max_bad=2, num_threads=2)
    assert batch["mask"].tolist() == [True, False, True, True, True, False, False, False]
    assert batch["bad"].tolist() == [False, True, False, False, False, True, False, False]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert not batch["image"][~batch["mask"]].any()
    with pytest.raises(UserError, match=r"max_bad=1.*number 5"):
        list(eval_batches(source, plain, batch_size=8, max_bad=1))


# Mistakes and endings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "batch of 5 .* 2 processes"),
        ({"batch_size": 0}, "batch of 0"),
        ({"num_threads": -1}, "num_threads: -1"),
        ({"num_workers": -2}, "num_workers: -2"),
        ({"max_bad": -1}, "max_bad: -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(options, message):
    with pytest.raises(UserError, match=message):
        train_batches(Numbers(3), RANDOM, **{"batch_size": 4, "seed": 0, **options})
    with pytest.raises(UserError, match=message):
        eval_batches(Numbers(3), RANDOM, **{"batch_size": 4, **options})


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="no image"):
        train_batches(Numbers(0), RANDOM, batch_size=1, seed=0)


def reading_threads():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def wait_for_threads(number):
    deadline = time.monotonic() + 10
    while len(reading_threads()) > number and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(reading_threads()) <= number


def test_threads_end_with_the_iterator():
    before = len(reading_threads())
    closed = train_batches(Numbers(9), RANDOM, batch_size=4, seed=0, num_threads=3)
    dropped = train_batches(Numbers(9), RANDOM, batch_size=4, seed=0, num_threads=3)
    next(closed), next(dropped)
    assert len(reading_threads()) > before
    closed.close()
    del dropped
    wait_for_threads(before)
    with pytest.raises(StopIteration):
        next(closed)


def test_threads_end_with_an_error_even_while_it_is_looked_at():
    before = len(reading_threads())
    reader = train_batches(Numbers(9, broken=(3,)), RANDOM, batch_size=9, seed=0, num_threads=3)
    with pytest.raises(UserError) as error:
        next(reader)
    wait_for_threads(before)
    assert error.value.__traceback__ is not None
