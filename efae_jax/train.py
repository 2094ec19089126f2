"""The training loop; there is one, for every method."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from efae_jax import data, disentanglement, distributed, validation
from efae_jax.checkpoint import Checkpoints, check_config, has_checkpoint
from efae_jax.compilation import count_cache_hits, keep_programs
from efae_jax.errors import RunError, UserError
from efae_jax.interrupts import Requests, deferred
from efae_jax.logs import MetricWriter, TrainProgress, say
from efae_jax.methods import complete_config, make_method
from efae_jax.methods.base import Method
from efae_jax.optim import make_optimizer, make_schedule
from efae_jax.paths import workdir_path
from efae_jax.sharding import batch_sharding, make_mesh, put_batch, replicated, tree_shardings
from efae_jax.state import init_state, make_train_step
from efae_jax.warm_start import read_autoencoder
from efae_jax.workdir import hold

# Steps that may be under way on the device before the loop waits for the oldest.
IN_FLIGHT = 2
# What measures a method's product, by `config.model.kind`; an autoencoder unless listed. Each
# module has check_evaluation, Evaluator and evaluate_workdir.
JUDGES = {"disentangler": disentanglement}


class Run:
    """What a config means on this machine: method, mesh, step programs, layout of the state.

    Building one compiles nothing and allocates nothing on the devices, but traces the
    training steps and one evaluation step abstractly, so that whatever does not fit in
    the config ends here.

    Args:
      config: as `configs/` make them.
      devices: all of them unless told otherwise.

    Attributes:
      programs: the compiled step for every plan of the method that has come up.
      compile_seconds: spent on compiling them, or on reading them back.
      cache_hits: how many of them were read back from JAX's persistent compilation cache.

    Raises:
      UserError: one line that says what does not fit and what is allowed.
    """

    def __init__(self, config: Any, devices: Any = None):
        self.config = config
        self.mesh: Mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        self._check_numbers()
        try:
            self.method: Method = make_method(config)
            first, *others = self.method.players
            settings = {first: config.optim} | {p: config[f"optim_{p}"] for p in others}
            self.optimizers = {
                player: make_optimizer(settings[player], config.train.steps)
                for player in self.method.players
            }
            step = make_train_step(
                self.method,
                self.optimizers,
                seed=config.seed,
                ema_decay=config.ema.decay,
                accumulate=config.train.accumulate,
            )
            self._init = lambda key: init_state(self.method, self.optimizers, key)
            shapes = jax.eval_shape(self._init, jax.random.key(0))
            for plan in self.method.plans_to_check():
                traced = functools.partial(step, plan=plan)
                jax.eval_shape(traced, shapes, self.abstract_batch(), self.method.frozen)
            product = shapes["ema"][self.method.players[0]]
            judge(config).check_evaluation(self.method.product, product, config, self.mesh)
        except ValueError as error:  # the mathematics and the models know no UserError
            raise UserError(str(error)) from error
        self.state_shardings = tree_shardings(shapes, config.mesh.rules, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            self.state_shardings,
        )
        self._step = jax.jit(
            step,
            in_shardings=(self.state_shardings, batch_sharding(self.mesh), replicated(self.mesh)),
            out_shardings=(self.state_shardings, replicated(self.mesh)),
            donate_argnums=0,
            static_argnums=3,
        )
        self.programs: dict[Hashable, Any] = {}
        self.compile_seconds, self.cache_hits = 0.0, 0

    def load_pretrained(self) -> dict[str, Any]:
        """Parameters, by player, that a run does not start from scratch with."""
        pretrained = self.method.load_pretrained()
        if self.config.init_from:
            pretrained[self.method.players[0]] = read_autoencoder(
                self.config, self.config.init_from
            )
        return pretrained

    def init(self, pretrained: dict[str, Any] | None = None) -> dict[str, Any]:
        """The state of step 0, every array made where it belongs; pretrained parts replaced.

        Args:
          pretrained: what `load_pretrained` gives; loaded unless given.
        """
        pretrained = self.load_pretrained() if pretrained is None else pretrained
        init = jax.jit(self._init, out_shardings=self.state_shardings)
        state = init(jax.random.key(self.config.seed))
        for player, part in pretrained.items():
            for tree in (state["params"], state["ema"]):
                if player in tree:
                    tree[player] = _replace(tree[player], part)
        return state

    @functools.cached_property
    def frozen(self) -> Any:
        """The weights that nobody trains, on every device."""
        return jax.device_put(self.method.load_frozen(), replicated(self.mesh))

    def step(
        self, state: dict[str, Any], batch: dict[str, jax.Array], plan: Hashable = None
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """One training step by the program of a plan, compiled when the plan first comes up."""
        if plan not in self.programs:
            start = time.monotonic()
            lowered = self._step.lower(state, batch, self.frozen, plan)
            with count_cache_hits() as hits:
                self.programs[plan] = lowered.compile()
            self.cache_hits += min(len(hits), 1)
            self.compile_seconds += time.monotonic() - start
        return self.programs[plan](state, batch, self.frozen)

    def _check_numbers(self) -> None:
        config, train, devices = self.config, self.config.train, self.mesh.size
        data.make_reader(config.data, train=True)
        if config.seed < 0:
            raise UserError(f"config.seed={config.seed} must be at least 0")
        for name, value in (
            ("train.steps", train.steps),
            ("log.every", config.log.every),
            ("checkpoint.every", config.checkpoint.every),
            ("checkpoint.keep", config.checkpoint.keep),
        ):
            if value < 1:
                raise UserError(f"config.{name}={value} must be at least 1")
        parts = devices * train.accumulate
        if train.accumulate < 1 or train.batch_size < 1 or train.batch_size % parts:
            raise UserError(
                f"config.train.batch_size={train.batch_size} must be a positive multiple of "
                f"devices x accumulate = {devices} x {train.accumulate}"
            )

    def lower(self, plan: Hashable = None) -> jax.stages.Lowered:
        """The step of a plan for shapes alone: compiled, it tells what it would take."""
        arguments = (self.abstract_state, self.abstract_batch(), self.method.frozen)
        return self._step.lower(*arguments, plan)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The whole batch's shapes and types."""
        size, one = self.config.train.batch_size, data.make_reader(self.config.data, train=True)
        return {
            name: jax.ShapeDtypeStruct((size, *np.shape(array)), array.dtype)
            for name, array in one.blank().items()
        }


def _replace(tree: Any, part: Any) -> Any:
    """The tree with the leaves of `part` in place of its own, laid out as its own were."""
    if not isinstance(part, dict):
        return jax.device_put(np.asarray(part, tree.dtype), tree.sharding)
    if unknown := part.keys() - tree.keys():
        raise KeyError(f"pretrained parameters that the model lacks: {sorted(unknown)}")
    return {k: _replace(v, part[k]) if k in part else v for k, v in tree.items()}


def judge(config: Any) -> Any:
    """The module that measures what a config trains."""
    return JUDGES.get(config.model.kind, validation)


def train(config: Any, workdir: epath.PathLike) -> dict[str, Any]:
    """Trains to `config.train.steps`, resuming what the work directory holds.

    Writes `config.json`, `parameters.txt`, `metrics.jsonl`, `tensorboard/` and
    `checkpoints/`, and keeps compiled programs in `compilation_cache/`. A run that was
    stopped and resumed equals, bit for bit on CPUs, the run that never stopped.

    Args:
      config: as `configs/` make them.
      workdir: on this machine or on object storage (`gs://...`); of several processes the
        same one, which all of them reach.

    Returns:
      the final state.

    Raises:
      UserError: for a config that does not fit, or not the work directory's, and where another
        run is at work.
      RunError: when a loss is not finite, naming the step; nothing is saved after it. When the
        data cannot be read, or a checkpoint cannot be written.
      Stopped, KeyboardInterrupt: after SIGTERM and Ctrl-C, once everything is saved.
    """
    workdir, config = workdir_path(workdir), complete_config(config)
    as_json = json.loads(config.to_json_best_effort())
    check_config(workdir, as_json)
    # All that can be wrong with the config is found before the work directory is touched.
    run = Run(config)
    source = data.make_source(config.data, "train")
    train_batches(config, source, 0).close()
    evaluator = judge(config).Evaluator(run.method.product, config, run.mesh)
    pretrained = {} if has_checkpoint(workdir) else run.load_pretrained()
    run.frozen  # noqa: B018  (read here, so that a missing file leaves no work directory)
    with hold(workdir, as_json):
        keep_programs(workdir)
        return _train(run, workdir, as_json, source, pretrained, evaluator)


def _train(
    run: Run, workdir: epath.Path, as_json: dict, source: Any, pretrained: Any, evaluator: Any
) -> dict[str, Any]:
    """What `train` does in a work directory that is its own."""
    config, total = run.config, run.config.train.steps
    new = not distributed.first_decides(has_checkpoint(workdir))
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, owner=True)
    if new:
        state, examples = run.init(pretrained), 0
    else:
        state, examples = checkpoints.restore(run.abstract_state)
        checkpoints.set_aside(above=int(state["step"]))
        say(f"resumed at step {int(state['step']):,} from {workdir}")
    overview = parameter_overview.get_parameter_overview(state["params"], include_stats="global")
    if jax.process_index() == 0:
        (workdir / "parameters.txt").write_text(overview + "\n")

    start = int(state["step"])
    writer = MetricWriter(workdir, start)
    schedule = make_schedule(config.optim, total)
    intact = True
    try:
        if start >= total:
            say(f"nothing left to train: step {start:,} of {total:,}")
        else:
            with deferred() as requests:
                state = _loop(
                    run,
                    state,
                    examples,
                    source,
                    as_json,
                    checkpoints,
                    writer,
                    evaluator,
                    schedule,
                    requests,
                )
            checkpoints.wait()
            if requests.signal is not None:  # it came in the last step
                raise requests.reason()
    except jax.errors.JaxRuntimeError:  # another process may be gone; closing would wait for it
        intact = False
        raise
    except OSError as error:  # the disk is full, or gone
        raise RunError(f"{workdir}: {error.strerror or error}; {checkpoints.left()}") from error
    finally:
        if intact:
            with contextlib.suppress(RunError, OSError):  # what matters was said by `wait`
                checkpoints.close()
        with contextlib.suppress(OSError):
            writer.close()
    return state


def _loop(
    run: Run,
    state: dict[str, Any],
    examples: int,
    source: Any,
    as_json: dict,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    evaluator: Any,
    schedule: Callable[[int], Any],
    requests: Requests,
) -> dict[str, Any]:
    config, batch_size = run.config, run.config.train.batch_size
    start, total = int(state["step"]), config.train.steps
    batches = train_batches(config, source, examples)
    pending: deque[tuple[int, Any]] = deque()  # metrics on the device since the last report
    loss_name = f"{run.method.players[0]}/loss"

    def report(step: int, progress: TrainProgress) -> None:
        """On the steps up to this one that were not reported yet."""
        done = []
        while pending and pending[0][0] <= step:
            done.append(pending.popleft())
        if not done:
            return
        figures = _collect(done)
        rate = progress.report(step, figures[loss_name])
        figures |= {
            "images_per_second": rate,
            "learning_rate": float(schedule(step - 1)),
            "programs": len(run.programs),
            "compile_seconds": run.compile_seconds,
            "cache_hits": run.cache_hits,
        }
        writer.write(step, figures)

    def save(step: int, progress: TrainProgress) -> None:
        """Once the losses of all steps up to this one are seen to be finite."""
        report(step, progress)
        checkpoints.save(step, state, examples + (step - start) * batch_size, as_json)

    say(
        f"training {config.method}, {total - start:,} steps of {batch_size} images, "
        f"{run.mesh.size} device(s); the first step is compiled, then its speed is shown"
    )
    several = len(run.method.plans()) > 1
    with TrainProgress(start, total, batch_size) as progress:
        batch = put_batch(run.mesh, next(batches))
        for step in range(start + 1, total + 1):
            plan, known, spent = run.method.plan(step - 1), len(run.programs), run.compile_seconds
            hits = run.cache_hits
            state, metrics = run.step(state, batch, plan)
            if several and len(run.programs) > known:
                what = "read back" if run.cache_hits > hits else "compiled"
                say(
                    f"step {step:,}: {what} program {len(run.programs)} of "
                    f"{len(run.method.plans())} ({plan}); {run.compile_seconds:.0f} s in all so far"
                )
                progress.leave_out(run.compile_seconds - spent)
            pending.append((step, metrics))
            if step < total:  # read and send the next batch while this step runs
                try:
                    batch = put_batch(run.mesh, next(batches))
                except RunError:
                    # The others of several processes may have their data, and would wait.
                    if jax.process_count() == 1:
                        save(step, progress)
                        checkpoints.wait()
                        say(f"saved at step {step:,}")
                    raise
            if len(pending) > IN_FLIGHT:
                jax.block_until_ready(pending[-1 - IN_FLIGHT][1])
            progress.advance(step)
            if step == start + 1 and config.log.every > 1:
                jax.block_until_ready(metrics)
                progress.restart_clock(step)
            # A report waits for the step before this one, so that the device has work meanwhile.
            if (step - 1) % config.log.every == 0:
                report(step - 1, progress)
            stop = requests.after(step)
            if step == total or step % config.checkpoint.every == 0 or stop:
                save(step, progress)
            if stop and step < total:
                checkpoints.wait()
                say(f"saved at step {step:,} of {total:,}")
                raise requests.reason()
            if config.eval.every and step % config.eval.every == 0:
                began, player = time.monotonic(), run.method.players[0]
                figures = evaluator.summary(state["ema"][player])
                writer.write(step, {f"eval/{k}": v for k, v in figures.items()})
                progress.leave_out(time.monotonic() - began)
    return state


def train_batches(
    config: Any, source: Any, start_example: int
) -> Generator[dict[str, np.ndarray], None, None]:
    """This process's share of the training batches from a position on: the reader's arrays only.

    Settings that cannot be are errors here, before anything is read.
    """
    reader = data.make_reader(config.data, train=True)
    batches = data.train_batches(
        source,
        reader,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_example=start_example,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        max_bad=config.data.max_bad,
    )
    names = tuple(reader.blank())
    return ({name: batch[name] for name in names} for batch in batches)


def _collect(done: list[tuple[int, Any]]) -> dict[str, float]:
    """Means of the metrics of some steps, all of them checked."""
    steps, metrics = zip(*done, strict=True)
    values = jax.device_get(list(metrics))
    for step, figures in zip(steps, values, strict=True):
        # A loss first: it is what a user looks for.
        for name, value in sorted(figures.items(), key=lambda f: not f[0].endswith("/loss")):
            if not math.isfinite(value):
                raise RunError(
                    f"{name} is {value} at step {step}; nothing was saved after it. Lower "
                    "config.optim.lr, or set config.optim.clip or config.dtype='float32'"
                )
    return {name: float(np.mean([v[name] for v in values])) for name in values[0]}
