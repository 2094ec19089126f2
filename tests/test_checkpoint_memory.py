"""A run may save as often as it likes: no checkpoint leaves anything in memory."""

import gc
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import tensorstore
from conftest import ROOT

from efae_jax import tensorstore_json
from efae_jax.checkpoint import Checkpoints

FRESH = "a value that is made {} and now"
SPEC = {"driver": "file", "path": "/a folder/äß/"}


def blocks():
    """Python's objects and the parts of them that are in use."""
    gc.collect()
    return sys.getallocatedblocks()


def grown(action, times):
    """Blocks that it leaves each time, once it was done often enough for caches to be full."""
    for _ in range(10):
        action()
    before = blocks()
    for _ in range(times):
        action()
    return (blocks() - before) / times


def test_checkpoints_leave_nothing_in_memory(tmp_path):
    state = {"params": {f"kernel_{i}": jnp.ones((2, 3)) for i in range(20)}, "step": jnp.int32(0)}
    checkpoints, steps = Checkpoints(tmp_path), iter(range(1000))

    def save():
        checkpoints.save(next(steps), state, 0, {})
        checkpoints.wait()

    assert grown(save, 40) < 20
    checkpoints.close()


def test_reading_a_checkpoint_leaves_nothing_in_memory(tmp_path):
    state = {"params": {f"kernel_{i}": jnp.ones((2, 3)) for i in range(20)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state, 0, {})
    checkpoints.wait()
    assert grown(lambda: checkpoints.restore(state), 20) < 20
    checkpoints.close()


def test_what_tensorstore_says_stays_and_is_freed(tmp_path):
    tensorstore_json.give_back_references()
    spec = tensorstore.KvStore.Spec(SPEC)
    array = tensorstore.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": str(tmp_path)}},
        create=True,
        dtype=np.float32,
        shape=(4, 5),
    ).result()
    array.write(np.ones((4, 5), np.float32)).result()
    kept = [spec.to_json() for _ in range(100)]
    assert grown(spec.to_json, 1000) < 0.1
    assert grown(array.spec().to_json, 1000) < 0.1
    assert grown(tensorstore.experimental_collect_matching_metrics, 100) < 1
    assert kept == [SPEC] * 100
    assert array.spec().to_json()["metadata"]["shape"] == [4, 5]
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/write")
    assert metrics[0]["values"][0]["value"] > 0


def test_a_library_that_counts_rightly_is_left_alone():
    class Right:
        def to_json(self):
            return {FRESH.format("here"): FRESH.format("here"), "".join(["pa", "th"]): [1]}

    assert not tensorstore_json._counts_too_often(Right())


def test_it_is_mended_once():
    code = (
        "import tensorstore\n"
        "from efae_jax.tensorstore_json import give_back_references\n"
        "give_back_references()\n"
        "mended = tensorstore.Spec.to_json\n"
        "give_back_references()\n"
        "assert tensorstore.Spec.to_json is mended\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
