"""What a compiled step takes of each device, against the arrays of a state that is really made."""

import math
import signal

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny, tiny_aura, tiny_eq

from efae_jax.errors import UserError
from efae_jax.layout import tables
from efae_jax.layout.command import parse_mesh, read_config, stopped_at_once
from efae_jax.layout.measure import choose_plan, does_not_fit, measure
from efae_jax.layout.targets import (
    CUBES,
    FLAT,
    default_platform,
    find_target,
    parse_target,
    prepare_environment,
)
from efae_jax.models.build import compute_dtype
from efae_jax.run import Run
from efae_jax.sharding import SMALL

FSDP = 4


@pytest.fixture(scope="module")
def run():
    """A model whose arrays are mostly large enough to be split."""
    config = tiny(mesh__data=2, mesh__fsdp=FSDP, train__batch_size=16, model__velocity__width=64)
    return Run(config)


@pytest.fixture(scope="module")
def measured(run):
    return measure(run, None)


def held_by(device, tree):
    """Bytes of a tree's arrays that lie on a device."""
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.device == device
    )


def test_parameters_over_fsdp_take_their_share_of_each_device(run, measured):
    """Of a state that is made: large arrays 1/N, small ones whole, and as the command says."""
    state = run.init()
    large, small = [], []
    for leaf in jax.tree.leaves(state["params"]):
        (large if leaf.size >= SMALL else small).append(leaf)
    assert sum(a.nbytes for a in large) > 9 * sum(a.nbytes for a in small)
    for device in run.mesh.devices.flat:
        assert held_by(device, large) == sum(a.nbytes for a in large) / FSDP
        assert held_by(device, small) == sum(a.nbytes for a in small)
        for name, part in (("parameters", "params"), ("EMA", "ema"), ("optimiser state", "opt")):
            assert measured.held[name] == held_by(device, state[part])
    whole = sum(a.nbytes for a in jax.tree.leaves(state["params"]))
    assert measured.totals["parameters"] == whole
    # Adam's two moments are as large as the parameters, and lie as they do.
    assert 2 * whole <= measured.totals["optimiser state"] < 2.01 * whole
    assert measured.held["parameters"] / whole == pytest.approx(1 / FSDP, rel=0.3)


def test_the_compiled_program_takes_what_is_held(run, measured):
    """Its arguments are the state and the batch, to the byte, less what the step does not read."""
    unread = 2 * 4  # labels of a device's two images
    held = sum(measured.held.values()) - unread
    arrays = len(jax.tree.leaves((run.abstract_state, run.abstract_batch())))
    assert held <= measured.arguments <= held + 64 * arrays  # each may be aligned
    assert measured.needed > measured.arguments + measured.temporaries
    assert measured.temporaries > 0
    assert measured.outputs < 0.01 * measured.arguments  # the state is donated
    assert measured.operations > 0


def test_splitting_over_devices_lowers_what_each_holds(measured):
    config = tiny(mesh__data=8, mesh__fsdp=1, train__batch_size=16, model__velocity__width=64)
    whole = measure(Run(config), None)
    assert whole.held["parameters"] == whole.totals["parameters"] > 3 * measured.held["parameters"]
    assert whole.held["batch"] == measured.held["batch"] == whole.totals["batch"] / 8
    kinds = {c.kind for c in whole.collectives}
    assert kinds == {"all-reduce"}  # of gradients and figures, nothing else
    gradients = sum(c.bytes for c in whole.collectives)
    assert gradients == pytest.approx(whole.totals["parameters"], rel=0.05)
    assert "all-gather" in {c.kind for c in measured.collectives}  # of what is split


def test_the_largest_parameters_come_first(measured):
    sizes = [a.total for a in measured.arrays]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(a.own for a in measured.arrays) == measured.held["parameters"]
    first = measured.arrays[0]
    assert first.path.startswith("autoencoder/")
    assert math.prod(first.shape) * 4 == first.total == FSDP * first.own
    assert "fsdp" in first.spec


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny, ""),
        (tiny_aura, "program 1 of 2 (latent window 4x4)"),
        (tiny_eq, "(plain, latent 4x4)"),
    ],
)
def test_the_program_with_the_largest_sides_is_chosen(config, words):
    chosen = Run(config(), jax.devices()[:1])
    plan, which = choose_plan(chosen, None)
    assert plan in chosen.method.plans()
    assert which.endswith(words)
    assert choose_plan(chosen, 1)[0] == chosen.method.plans()[0]
    with pytest.raises(UserError, match="--plan 99 is not one of 1 to"):
        choose_plan(chosen, 99)


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v6e-1", "v6e:1x1"),
        ("v4-8", "v4:2x2x1"),  # these count TensorCores, two in a chip
        ("v4-32", "v4:2x2x4"),
        ("v5p-16", "v5p:2x2x2"),
    ],
)
def test_accelerator_types_are_topologies(name, topology):
    assert parse_target(name)[1] == topology


def test_topologies_have_as_many_chips_as_they_say():
    for chips, shape in [*FLAT.items(), *CUBES.items()]:
        assert math.prod(map(int, shape.split("x"))) == chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "v5e-8 or v4-32"),
        ("h100-8", "no accelerator type"),
        ("v5e-7", "v5e-1, v5e-4, v5e-8"),
        ("v4-5", "v4-8, v4-16"),
    ],
)
def test_other_targets_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        parse_target(name)


def test_devices_and_target_exclude_each_other():
    with pytest.raises(UserError, match="exclude each other"):
        prepare_environment(8, "v5e-8")
    with pytest.raises(UserError, match="must be at least 1"):
        prepare_environment(0, None)


def test_a_target_without_the_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'libtpu"):
        prepare_environment(None, "v5e-8")


def test_models_are_traced_as_for_the_target():
    with default_platform("tpu"):
        assert compute_dtype("auto") == jnp.bfloat16
    assert compute_dtype("auto") == jnp.float32


def test_a_signal_ends_a_compilation_at_once_and_only_that():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stopped_at_once():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_mesh_is_named_by_axes():
    assert parse_mesh("data=4,fsdp=2") == (4, 2)
    assert parse_mesh("fsdp=8") == (-1, 8)
    for wrong in ("4x2", "model=2", "data=", ""):
        with pytest.raises(UserError, match="data=4,fsdp=2"):
            parse_mesh(wrong)


def test_overrides_are_those_of_main():
    words = ["--config.train.batch_size=48", "--config.data.size=(8,8)", "--config.train.remat"]
    config = read_config("configs/efae.py:smoke", words)
    assert (config.train.batch_size, config.data.size, config.train.remat) == (48, (8, 8), True)


def test_what_does_not_fit_is_one_line():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm. "
        "Exceeded hbm capacity by 4.4G.\n\nTotal hbm usage >= 20.3G:\n    program 20.1G\n"
    )
    assert does_not_fit(message).startswith("the step does not fit: RESOURCE_EXHAUSTED: Ran out")
    assert "\n" not in does_not_fit(message)


def test_tables_fit_100_columns_and_say_all(run, measured):
    from rich.console import Console

    target = find_target(None)
    console = Console(width=100, record=True)
    for table in tables.all_tables("title", run, target, measured, 3):
        console.print(table)
    text = console.export_text()
    for words in ("parameters", "optimiser state", "activations", "needed", "fsdp", "all-reduce"):
        assert words in text
    assert "…" not in text
    assert tables.record(run, target, measured)["held"] == measured.held
    assert tables.size(3 * 2**29) == "1.50 GiB"
    assert tables.size(2**20) == "1.00 MiB"
