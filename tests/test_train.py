"""The training loop: it learns, resumes exactly, and does the same on any mesh."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_device
from tiny import tiny

from efae_jax import data, train
from efae_jax.checkpoint import Checkpoints
from efae_jax.errors import RunError, UserError
from efae_jax.run import Run
from efae_jax.sharding import put_batch

pytestmark = pytest.mark.usefixtures("only_one_device")
# A schedule that does not know the run's length, so that fewer steps are a run cut off.
CUT = {"optim__schedule": "constant", "optim__warmup": 2}


def make_run(devices, **overrides):
    return Run(tiny(**overrides), jax.devices()[:devices])


def steps(run, count):
    """Losses and final state of the first steps."""
    source = data.make_source(run.config.data, "train")
    batches = train.train_batches(run.config, source, 0)
    state, losses = run.init(), []
    for _ in range(count):
        state, metrics = run.step(state, put_batch(run.mesh, next(batches)))
        losses.append(float(metrics["autoencoder/loss"]))
    return losses, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), *jax.device_get((a, b)))


@pytest.fixture(scope="module")
def one_device():
    run = make_run(1)
    return run, *steps(run, 4)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of six steps that never stopped."""
    with first_device():
        workdir = tmp_path_factory.mktemp("whole")
        return workdir, jax.device_get(train.train(tiny(**CUT), workdir))


@pytest.mark.parametrize(("data_axis", "fsdp"), [(8, 1), (4, 2), (1, 8)])
def test_losses_agree_on_every_mesh(one_device, data_axis, fsdp):
    _, expected, _ = one_device
    run = make_run(8, mesh__data=data_axis, mesh__fsdp=fsdp)
    losses, state = steps(run, 4)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    kernel = state["params"]["autoencoder"]["velocity"]["blocks"]["0"]["mlp_in"]["kernel"]
    moment = jax.tree.leaves(state["opt"])  # the optimiser's state is split as well
    assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
    assert any(m.shape == kernel.shape and m.sharding == kernel.sharding for m in moment)


def test_accumulation_equals_the_whole_batch(one_device):
    _, expected, whole = one_device
    losses, state = steps(make_run(1, train__accumulate=4), 4)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    after = state["params"]["autoencoder"]["encoder"]["stem"]["kernel"]
    np.testing.assert_allclose(
        after, whole["params"]["autoencoder"]["encoder"]["stem"]["kernel"], atol=2e-5
    )


def test_rematerialisation_changes_nothing(one_device):
    _, expected, _ = one_device
    losses, _ = steps(make_run(1, train__remat=True), 4)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_one_program_and_donated_state(one_device):
    run, _, state = one_device
    assert len(run.programs) == 1
    batch = {
        "image": np.zeros((8, 8, 8, 3), np.uint8),
        "label": np.zeros(8, np.int32),
    }
    kernel = state["params"]["autoencoder"]["encoder"]["stem"]["kernel"]
    copy = jax.tree.map(jnp.copy, state)
    run.step(copy, put_batch(run.mesh, batch))
    assert len(run.programs) == 1
    assert copy["params"]["autoencoder"]["encoder"]["stem"]["kernel"].is_deleted()
    assert not kernel.is_deleted()


def test_average_follows_its_formula(one_device):
    run, _, _ = one_device
    source = data.make_source(run.config.data, "train")
    batches = train.train_batches(run.config, source, 0)
    state = run.init()
    expected = jax.device_get(state["params"])
    for step in range(3):
        state, _ = run.step(state, put_batch(run.mesh, next(batches)))
        decay = min(run.config.ema.decay, (1 + step) / (10 + step))
        params = jax.device_get(state["params"])
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.device_get(state["ema"]),
        expected,
    )


def test_it_learns(tmp_path):
    config = tiny(train__steps=60, log__every=10, optim__lr=4e-3, checkpoint__every=100)
    train.train(config, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    losses = [line["autoencoder/loss"] for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    assert all(line["images_per_second"] > 0 for line in lines[1:])
    assert list((tmp_path / "tensorboard").iterdir())
    assert "encoder" in (tmp_path / "parameters.txt").read_text()


def test_a_resumed_run_equals_one_that_never_stopped(whole_run, tmp_path):
    workdir, expected = whole_run
    train.train(tiny(**CUT, train__steps=3), tmp_path)
    assert Checkpoints(tmp_path).latest() == 3
    resumed = train.train(tiny(**CUT), tmp_path)
    assert_same(resumed, expected)
    # The curves agree too, but for the speed.
    for name in ("autoencoder/loss", "autoencoder/gradient_norm"):
        curves = [
            {r["step"]: r[name] for r in map(json.loads, (d / "metrics.jsonl").open())}
            for d in (workdir, tmp_path)
        ]
        assert curves[0][6] == curves[1][6]


def test_a_stop_after_the_last_checkpoint_is_made_up(whole_run, tmp_path):
    """Steps 4 and 5 ran and were logged, but only step 3 was saved."""
    _, expected = whole_run
    train.train(tiny(**CUT, train__steps=3), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 5, "autoencoder/loss": 123.0}) + "\n")
    assert_same(train.train(tiny(**CUT), tmp_path), expected)
    logged = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").open()]
    assert logged == sorted(set(logged))


def test_a_run_cut_off_between_checkpoints_goes_on_exactly(tmp_path):
    """Under a schedule that knows the run's length: the last checkpoint is lost, as by a kill."""
    expected = jax.device_get(train.train(tiny(), tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert Checkpoints(tmp_path).latest() == 3
    assert_same(train.train(tiny(), tmp_path), expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__crop": "middle"}, "random, center"),
        ({"data__num_threads": -1}, "num_threads"),
        ({"data__num_test": 0}, "num_test"),
    ],
)
def test_a_config_that_is_refused_leaves_no_work_directory(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train.train(tiny(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_step_may_be_reported(tmp_path):
    train.train(tiny(train__steps=2, log__every=1), tmp_path)
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").open()] == [1, 2]


def test_a_finished_run_is_left_alone(whole_run):
    workdir, expected = whole_run
    before = (workdir / "metrics.jsonl").read_text()
    assert_same(train.train(tiny(**CUT), workdir), expected)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_eight_devices_restores_on_two_and_one(tmp_path):
    eight = make_run(8, mesh__data=2, mesh__fsdp=4)
    _, state = steps(eight, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, 8, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    for devices, fsdp in ((2, 2), (1, 1)):
        run = make_run(devices, mesh__data=devices // fsdp, mesh__fsdp=fsdp)
        restored, examples = checkpoints.restore(run.abstract_state)
        assert examples == 8
        assert_same(restored, state)
        assert jax.tree.leaves(restored)[0].sharding.mesh.size == devices
        run.step(restored, put_batch(run.mesh, _zeros()))  # it is laid out as the step wants
    checkpoints.close()


def _zeros():
    return {"image": np.zeros((8, 8, 8, 3), np.uint8), "label": np.zeros(8, np.int32)}


def test_a_longer_run_with_other_batches_may_go_on(tmp_path):
    train.train(tiny(train__steps=3), tmp_path)
    state = train.train(
        tiny(train__steps=4, train__batch_size=4, log__every=1, eval__batch_size=4), tmp_path
    )
    assert int(state["step"]) == 4
    checkpoints = Checkpoints(tmp_path)
    _, examples = checkpoints.restore({"step": jax.ShapeDtypeStruct((), jnp.int32)})
    assert examples == 3 * 8 + 4
    checkpoints.close()


def test_another_config_is_refused(whole_run):
    workdir, _ = whole_run
    other = tiny(**CUT, optim__lr=0.5, group__name="z2_h", train__steps=8)
    with pytest.raises(UserError) as error:
        train.train(other, workdir)
    message = str(error.value)
    assert "config.optim.lr: 0.001 there, 0.5 given" in message
    assert "config.group.name: 'z2xz2' there, 'z2_h' given" in message
    assert "config.train.steps" not in message
    assert "\n" not in message


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path, monkeypatch):
    original = train.put_batch
    served = []

    def poisoned(mesh, batch):
        served.append(1)
        image = batch["image"].astype(np.float32)
        return original(mesh, batch | {"image": image * (np.nan if len(served) == 5 else 1)})

    monkeypatch.setattr(train, "put_batch", poisoned)
    with pytest.raises(RunError, match="autoencoder/loss is nan at step 5;"):
        train.train(tiny(log__every=100), tmp_path)
    assert Checkpoints(tmp_path).latest() == 3


def test_nothing_waits_for_the_step_just_started(tmp_path, monkeypatch):
    """The next batch is read while a step runs, and metrics are fetched only to report."""
    events = []
    put, fetch = train.put_batch, train.jax.device_get
    monkeypatch.setattr(train, "put_batch", lambda *a: events.append("put") or put(*a))
    monkeypatch.setattr(train.jax, "device_get", lambda x: events.append("get") or fetch(x))
    train.train(tiny(train__steps=5, log__every=100, checkpoint__every=100), tmp_path)
    loop = events[events.index("put") :]  # before it, the parameter overview fetches statistics
    assert loop == ["put"] * 5 + ["get"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__batch_size": 7, "mesh__data": 2}, "must be a positive multiple of"),
        ({"train__accumulate": 3}, "must be a positive multiple of"),
        ({"mesh__data": 3}, "does not arrange 2 devices"),
        ({"mesh__rules": (("nothing", "fsdp"),)}, "no rule covers"),
        ({"mesh__rules": ((".*", ("fsdp",)),), "mesh__data": 2}, "does not fit"),
        ({"mesh__rules": (("(", "fsdp"),)}, "is no regex"),
        ({"mesh__rules": ((".*", None),)}, "does not fit"),
        ({"model__velocity__heads": 0}, "config.model.velocity.heads=0 must be at least 1"),
        ({"model__encoder__widths": ()}, "at least one width"),
        ({"data__size": (8,)}, "(height, width)"),
        ({"eval__steps": 0}, "config.eval.steps=0 must be at least 1"),
        ({"flow__drop_rate": 3.0}, "[0, 1)"),
        ({"latent__noise_size": -1.0}, "config.latent.noise_size=-1.0"),
        ({"latent__clamp": -1.0}, "config.latent.clamp=-1.0"),
        ({"group__name": "z3"}, "z3"),
        ({"group__name": "d4", "group__representation": "8*A1", "data__size": (8, 16)}, "square"),
        ({"group__representation": "3*trivial"}, "the latent has 8"),
        ({"data__size": (10, 8)}, "multiples of 4"),
        ({"model__velocity__patch": 3}, "one must divide the other"),
        ({"model__velocity__kind": "gan"}, "dit, unet, original"),
        ({"log__every": 0}, "config.log.every=0 must be at least 1"),
        ({"method": "vae"}, "config.method='vae' is not one of"),
        ({"eval__solver": "rk45"}, "euler, midpoint, heun"),
        ({"eval__batch_size": 7}, "config.eval.batch_size=7"),
        ({"flow__time": "cosine"}, "uniform, logit_normal"),
        ({"dtype": "float8"}, "auto, float32, bfloat16"),
        ({"group__learned": "householder"}, "cayley"),
        ({"optim__schedule": "step"}, "constant, cosine, linear"),
        ({"latent__noise": "pink"}, "additive"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message):
    two = {"mesh__data": 2, **overrides}
    with pytest.raises(UserError) as error:
        make_run(2, **two)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
