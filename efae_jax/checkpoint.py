"""Whole runs on disk: state, data position and config, written while training goes on."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from efae_jax import distributed, json_files
from efae_jax.errors import RunError, UserError
from efae_jax.logs import say
from efae_jax.paths import absolute
from efae_jax.tensorstore_json import give_back_references

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
# tensorstore's and orbax' words for what is no damage.
_NO_DAMAGE = (
    "^(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)"
    "|not compatible with the stored shape"
)
DAMAGED = "damaged-"  # before the step, in the name of one that could not be read
# Fields of a config that may differ when a run is resumed. Every other difference would
# make the run another one.
MAY_CHANGE = (
    "train.batch_size",
    "train.accumulate",
    "train.remat",
    "train.steps",
    "mesh.",
    "log.",
    "eval.",
    "checkpoint.",
    "data.data_dir",
    "data.num_threads",
    "data.num_workers",
    "data.max_bad",
)
# Fields that runs did not have before some version, and what those runs did. A list that is empty
# does nothing in any case.
DONE_BEFORE = {"model.start": "flax", "loss.gan_in_discriminator": 0.0}


class Checkpoints:
    """The checkpoints of a work directory.

    Each holds the items "params", "ema", "opt", "variables" (where the method has any) and
    "step" of the state, "data" (the number of training examples consumed) and "config". Saving
    is asynchronous: the arrays are copied, then written by a thread. A save that is cut off
    leaves a temporary folder, and the checkpoint before it stays the latest.

    Args:
      workdir: holds them in its folder `checkpoints`.
      keep: how many of the latest to keep.
      owner: whether nobody else writes there; what saves that were cut off left is removed then.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2, *, owner: bool = False):
        give_back_references()
        self._manager = ocp.CheckpointManager(
            absolute(workdir) / FOLDER,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=owner
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: dict[str, Any], examples: int, config: dict) -> None:
        """Starts writing a checkpoint; a step that is there already stays as it is.

        Raises:
          RunError: when this one cannot be written, or the one before could not be.
        """
        if step in self.steps():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **items,
                    data=ocp.args.JsonSave({"examples": examples}),
                    config=ocp.args.JsonSave(config),
                ),
            )

    def wait(self) -> None:
        """Until everything is written.

        Raises:
          RunError: when it could not be.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of orbax, of whatever kind, is a RunError that says what is left."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # the state itself could not be computed
            raise
        except Exception as error:
            raise RunError(
                f"{self._manager.directory}: a checkpoint could not be written: "
                f"{_reason(error)}; {self.left()}"
            ) from error

    def left(self) -> str:
        """In words, from where the run would go on."""
        steps = ocp.utils.checkpoint_steps(self._manager.directory)
        if not steps:
            return "there is no checkpoint to go on from"
        return f"the same command goes on from step {max(steps):,}"

    def restore(
        self, abstract_state: dict[str, Any], step: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """A checkpoint, laid out as `abstract_state` says, on any number of devices.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with shardings; a subset of the state's
            entries restores only those.
          step: which; unless given the newest that can be read.

        Returns:
          the state, and the number of examples consumed.

        Raises:
          UserError: when the checkpoint holds less than is wanted.
          RunError: when it is damaged; without a step, when all of them are.
        """
        steps = self.steps()[::-1] if step is None else [step]
        if jax.process_count() > 1 and step is None:
            # One process alone tries: the others would wait for one that cannot read its part.
            mine = self._first_readable(steps, abstract_state) if jax.process_index() == 0 else 0
            steps = [distributed.first_decides(mine)]
        problems = []
        with _without_echo():
            for number in steps:
                try:
                    return self._restore(abstract_state, number)
                except Exception as error:  # damage shows in many ways
                    if not _is_damage(error):
                        _raise_as_it_is(error, f"{self._manager.directory}: checkpoint {number}")
                    problems.append(f"checkpoint {number} is damaged: {_reason(error)}")
                gc.collect()  # what was under way complains now, not later
                if number != steps[-1]:
                    say(f"{problems[-1]}; going back to the one before")
        raise RunError(f"{self._manager.directory}: {'; '.join(problems) or 'all are damaged'}")

    def _restore(self, abstract_state: dict[str, Any], step: int) -> tuple[dict[str, Any], int]:
        folder = self._manager.directory / str(step)
        wanted = _items(abstract_state)
        if missing := [name for name in wanted if not (folder / name).exists()]:
            raise UserError(
                f"{self._manager.directory} holds a model without {', '.join(missing)}, so "
                "training cannot go on there; give another --workdir"
            )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore())
        )
        state = {name: restored[name] for name in wanted} | {
            name: tree for name, tree in abstract_state.items() if not jax.tree.leaves(tree)
        }
        if "step" in state:
            state["step"] = state["step"]["value"]
        return state, restored["data"]["examples"]

    def _first_readable(self, steps: list[int], wanted: dict[str, Any]) -> int:
        """The first of the steps whose files this process can read; the last, if it can of none."""
        for step in steps[:-1]:
            try:
                with _without_echo():
                    _read_all(self._manager.directory / str(step), {*_items(wanted), "data"})
                return step
            except Exception as error:
                if not _is_damage(error):
                    return step  # restoring says what it is
                say(f"checkpoint {step} is damaged: {_reason(error)}; going back to the one before")
        return steps[-1]

    def set_aside(self, above: int) -> None:
        """Renames the checkpoints of later steps, which could not be read, to `damaged-STEP`.

        Else a run that goes on from an older one would take them for its own.
        """
        later = [step for step in self.steps() if step > above]
        if later and jax.process_index() == 0:
            for step in later:
                path = self._manager.directory / str(step)
                target = self._manager.directory / f"{DAMAGED}{step}"
                if target.exists():
                    target.rmtree()
                path.rename(target)
                say(f"kept the damaged checkpoint as {target}")
        if later:
            distributed.first_decides(0)  # the others look after that
            self._manager.reload()

    def close(self) -> None:
        """Waits until everything is written, then frees the writer's threads.

        Raises:
          RunError: when something could not be written.
        """
        with self._writing():
            self._manager.close()


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Drops what tensorstore's threads print of reads that nobody waits for any more."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _reason(error: Exception) -> str:
    """What the system said, or the first line, without the places in C++ that tensorstore adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r": ([^:]+) \[os_error_code=", text):
        return system[1]
    return (
        text.splitlines()[0][:300].split(" [source locations=")[0].split(" [tensorstore_spec=")[0]
    )


def _raise_as_it_is(error: Exception, what: str) -> NoReturn:
    """An error that commands have a line for; a RunError, where it has a name of orbax' own."""
    if isinstance(error, UserError | MemoryError | OSError | jax.errors.JaxRuntimeError):
        raise error
    raise RunError(f"{what} cannot be read: {_reason(error)}") from error


def _is_damage(error: Exception) -> bool:
    """Whether an error of reading means that the files are damaged, and will be tomorrow.

    Not a mistake of the user, a device or machine without memory, storage that is not reached or
    not allowed, or arrays of other shapes than are wanted.
    """
    if isinstance(error, UserError | MemoryError | PermissionError | jax.errors.JaxRuntimeError):
        return False
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EINVAL):
        return False
    return not re.search(_NO_DAMAGE, str(error))


def _read_all(folder: epath.Path, items: set[str]) -> None:
    """Reads some items of a checkpoint in this process alone, and drops them."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="reading",
    )
    for item in (folder / name for name in sorted(items)):
        if (item / "_METADATA").exists():
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
                tree = reader.metadata(item).item_metadata.tree
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                reader.restore(item, args=ocp.args.PyTreeRestore(restore_args=args))
        elif (item / "metadata").exists():
            json.loads((item / "metadata").read_text())


def save_model(
    workdir: Path, params: Any, config: dict, files: Mapping[str, bytes] | None = None
) -> None:
    """Makes a work directory that holds a model and no training state, whole or not at all.

    Args:
      workdir: must not be there yet.
      params: of the autoencoder, the method's first player, by its name.
      config: as JSON.
      files: what else lies in it: contents by name.
    """
    workdir = Path(workdir)
    temporary = workdir.with_name(f".{workdir.name}.{os.getpid()}.tmp")
    try:
        workdir.parent.mkdir(parents=True, exist_ok=True)
        # What an interrupted process of that number left would be taken for this model.
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoints = Checkpoints(temporary)
        try:
            checkpoints.save(0, {"ema": params}, 0, config)
        finally:
            checkpoints.close()
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        write_config(temporary, config)
        temporary.rename(workdir)
    except OSError as error:
        raise UserError(f"{workdir}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(workdir: epath.PathLike) -> dict:
    """The config that a work directory was made with, as JSON.

    Raises:
      UserError: when it holds none, or one of another version of this package.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        config = json_files.parse(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{workdir} holds no config.json; give a training run's work directory"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not the config of a run: {error}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or "kind" not in model:
        raise UserError(
            f"{path} is not of this version of efae_jax: it has no model.kind; use the version "
            "that made it"
        )
    return config


def write_config(workdir: epath.Path | Path, config: dict) -> None:
    """Writes `config.json`, whole or not at all."""
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(workdir / "config.json")


def _items(state: dict[str, Any]) -> dict[str, Any]:
    # An item is a tree that holds something; the step is a bare scalar.
    state = {k: {"value": v} if k == "step" else v for k, v in state.items()}
    return {k: v for k, v in state.items() if jax.tree.leaves(v)}


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) wherever two nested configs differ; None where absent."""
    found = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append((prefix + name, a, b))
    return found


def has_checkpoint(workdir: epath.PathLike) -> bool:
    """Whether a work directory holds a complete checkpoint."""
    folder = epath.Path(workdir) / FOLDER
    return folder.is_dir() and bool(ocp.utils.checkpoint_steps(folder))


def check_config(workdir: epath.PathLike, config: dict) -> None:
    """Refuses a work directory that holds checkpoints of another config.

    Raises:
      UserError: naming every field that differs and may not (`MAY_CHANGE`).
    """
    if not (epath.Path(workdir) / "config.json").exists() or not has_checkpoint(workdir):
        return
    changed = [
        f"config.{name}: {old!r} there, {new!r} given"
        for name, old, new in differences(read_config(workdir), config)
        if not name.startswith(MAY_CHANGE)
        and not (old is None and (new == [] or DONE_BEFORE.get(name) == new))
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); "
            "give the same config or another --workdir. Only these may change: "
            f"{', '.join(name + '*' if name.endswith('.') else name for name in MAY_CHANGE)}"
        )
