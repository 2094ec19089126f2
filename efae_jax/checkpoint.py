"""Whole runs on disk: state, data position and config, written while training goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from efae_jax.errors import UserError

FOLDER = "checkpoints"
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


class Checkpoints:
    """The checkpoints of a work directory.

    Each holds the items "params", "ema", "opt", "variables" (where the method has any) and
    "step" of the state, "data" (the number of training examples consumed) and "config". Saving
    is asynchronous: the arrays are copied, then written by a thread. A save that is cut off
    leaves a temporary folder, and the checkpoint before it stays the latest.

    Args:
      workdir: holds them in its folder `checkpoints`.
      keep: how many of the latest to keep.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self._manager = ocp.CheckpointManager(
            Path(workdir).absolute() / FOLDER,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: dict[str, Any], examples: int, config: dict) -> None:
        """Starts writing a checkpoint; a step that is there already stays as it is."""
        if step in self.steps():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **items,
                data=ocp.args.JsonSave({"examples": examples}),
                config=ocp.args.JsonSave(config),
            ),
        )

    def restore(
        self, abstract_state: dict[str, Any], step: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """A checkpoint, laid out as `abstract_state` says, on any number of devices.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with shardings; a subset of the state's
            entries restores only those.
          step: which; the newest unless given.

        Returns:
          the state, and the number of examples consumed.

        Raises:
          UserError: when the checkpoint holds less than is wanted.
        """
        step = self.latest() if step is None else step
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

    def close(self) -> None:
        """Waits until everything is written, then frees the writer's threads."""
        self._manager.close()


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


def read_config(workdir: Path) -> dict:
    """The config that a work directory was made with, as JSON.

    Raises:
      UserError: when it holds none, or one of another version of this package.
    """
    path = Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{workdir} holds no config.json; give a training run's work directory"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "kind" not in config.get("model", {}):
        raise UserError(
            f"{path} is not of this version of efae_jax: it has no model.kind; use the version "
            "that made it"
        )
    return config


def write_config(workdir: Path, config: dict) -> None:
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


def has_checkpoint(workdir: Path) -> bool:
    """Whether a work directory holds a complete checkpoint."""
    folder = Path(workdir) / FOLDER
    # A save that was cut off leaves a folder with a longer name.
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def check_config(workdir: Path, config: dict) -> None:
    """Refuses a work directory that holds checkpoints of another config.

    Raises:
      UserError: naming every field that differs and may not (`MAY_CHANGE`).
    """
    if not (Path(workdir) / "config.json").exists() or not has_checkpoint(workdir):
        return
    changed = [
        f"config.{name}: {old!r} there, {new!r} given"
        for name, old, new in differences(read_config(workdir), config)
        if not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); "
            "give the same config or another --workdir. Only these may change: "
            f"{', '.join(name + '*' if name.endswith('.') else name for name in MAY_CHANGE)}"
        )
