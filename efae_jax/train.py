"""The training loop; there is one, for every method."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath

from efae_jax import data, distributed
from efae_jax.checkpoint import Checkpoints, check_config, has_checkpoint
from efae_jax.compilation import keep_programs
from efae_jax.data.pipeline import Batches
from efae_jax.data_record import DataRecord
from efae_jax.errors import RunError
from efae_jax.interrupts import Requests, deferred
from efae_jax.logs import MetricWriter, TrainProgress, say
from efae_jax.methods import complete_config
from efae_jax.methods.base import Weighted
from efae_jax.optim import make_schedule
from efae_jax.paths import workdir_path
from efae_jax.run import Run, judge
from efae_jax.sharding import put_batch
from efae_jax.workdir import hold

# Steps that may be under way on the device before the loop waits for the oldest.
IN_FLIGHT = 2


def train(config: Any, workdir: epath.PathLike) -> dict[str, Any]:
    """Trains to `config.train.steps`, resuming what the work directory holds.

    Writes `config.json`, `parameters.txt`, `data.json`, `metrics.jsonl`, `tensorboard/`
    and `checkpoints/`, and keeps compiled programs in `compilation_cache/`. A run that was
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
    held_out = evaluator.source
    evaluated = min(config.eval.num_images or len(held_out), len(held_out))
    record = DataRecord(workdir, source, held_out, evaluated)

    start = int(state["step"])
    writer = MetricWriter(workdir, start)
    schedule = make_schedule(config.optim, total)
    batches = train_batches(config, source, examples)
    intact = True
    try:
        if start >= total:
            say(f"nothing left to train: step {start:,} of {total:,}")
        else:
            record.begin()
            with deferred() as requests:
                state = _loop(
                    run,
                    state,
                    examples,
                    batches,
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
        with contextlib.suppress(OSError):
            record.finish(batches.bad.by_name())
        batches.close()
    return state


def _loop(
    run: Run,
    state: dict[str, Any],
    examples: int,
    batches: Batches,
    as_json: dict,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    evaluator: Any,
    schedule: Callable[[int], Any],
    requests: Requests,
) -> dict[str, Any]:
    config, batch_size = run.config, run.config.train.batch_size
    start, total = int(state["step"]), config.train.steps
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


def train_batches(config: Any, source: Any, start_example: int) -> Batches:
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
    arrays = ({name: batch[name] for name in names} for batch in batches)
    return Batches(arrays, batches.bad)


def _collect(done: list[tuple[int, Any]]) -> dict[str, float]:
    """Means of the metrics of some steps, all of them checked."""
    steps, metrics = zip(*done, strict=True)
    values = jax.device_get(list(metrics))
    for step, figures in zip(steps, values, strict=True):
        # A loss first: it is what a user looks for.
        for name, value in sorted(figures.items(), key=lambda f: not f[0].endswith("/loss")):
            if not np.all(np.isfinite(value)):
                raise RunError(
                    f"{name} is {value} at step {step}; nothing was saved after it. Lower "
                    "config.optim.lr, or set config.optim.clip or config.dtype='float32'"
                )
    means = {name: np.mean([v[name] for v in values], axis=0) for name in values[0]}
    for name, value in values[0].items():
        if isinstance(value, Weighted):
            weighted, weight = means.pop(name)
            if weight > 0:
                means[name] = weighted / weight
    return {name: float(mean) for name, mean in means.items()}
