"""Disentangling runs on disk: what they found, from and to the files of the original program."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from efae_jax import json_files
from efae_jax.api import config_of, restore_player
from efae_jax.basis import Basis, make_basis, to_bytes
from efae_jax.checkpoint import save_model
from efae_jax.convert import files, layout, sketch, sources
from efae_jax.errors import UserError
from efae_jax.models.disentangler import Disentangler, build_disentangler
from efae_jax.paths import user_path
from efae_jax.sharding import make_mesh

METHOD, PLAYER = "disentangle", "disentangler"  # of the config; of the checkpoint
FORMATS = ("sketch", "matrix")


class RestoredRun(NamedTuple):
    """A disentangler, its (averaged) weights, the run's config, and the checkpoint's step."""

    disentangler: Disentangler
    params: Any
    config: Any
    step: int


def is_basis_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the work directory of a disentangling run, or of such an import."""
    config = json_files.read_object(Path(user_path(path)) / "config.json", "a model's config")
    return (config or {}).get("method") == METHOD


def restore_run(workdir: str | os.PathLike[str], step: int | None = None) -> RestoredRun:
    """What a disentangling run has trained, on this machine's devices.

    Args:
      workdir: of the run.
      step: of the checkpoint; the newest unless given.

    Raises:
      UserError: when it holds no such checkpoint.
    """
    workdir, config = Path(workdir), config_of(workdir)
    try:
        disentangler = build_disentangler(config)
    except ValueError as error:  # the models know no UserError
        raise UserError(f"{workdir}: {error}") from error
    params, step = restore_player(workdir, config, make_mesh(), PLAYER, disentangler.init, step)
    return RestoredRun(disentangler, params, config, step)


def basis_of_run(workdir: str | os.PathLike[str], semantic: int | None = None) -> Basis:
    """The basis that a run has found.

    Args:
      workdir: of the run.
      semantic: number of semantic channels; as it was trained unless given.

    Raises:
      UserError: when there is none.
    """
    run = restore_run(workdir)
    matrix = jax.device_get(run.disentangler.basis(run.params))
    if semantic is None:
        semantic = run.disentangler.semantic
    return make_basis(matrix, semantic, f"{workdir}, step {run.step}")


def import_run(source: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> list[str]:
    """Makes a work directory of the original program's state dict.

    Args:
      source: a file, or a hub id: owner/name/file.
      workdir: must not be there yet.

    Returns:
      what was read, one line each.

    Raises:
      UserError: names or shapes that do not fit (all listed), or nothing but a matrix.
    """
    workdir = Path(workdir)
    if workdir.exists():
        raise UserError(f"{workdir} is there already; give a new directory")
    params = sketch.from_tensors(sources.read_source(source).tensors, source)
    if set(params) == {"transform"}:
        raise UserError(
            f"{source} holds the matrix alone, which needs no import: give the file as --basis"
        )
    config = sketch.new_config(params, source)
    save_model(workdir, {PLAYER: params}, json.loads(config.to_json_best_effort()))
    channels, semantic = config.data.latent[-1], config.model.semantic
    return [
        f"{source}: disentangler, format {sketch.FORMAT}",
        f"{channels} channels, {semantic} of them semantic; embeddings of {config.data.text} "
        f"(text) and {config.data.image} (image) numbers",
        f"wrote {workdir}",
        f"efae_jax.read_basis({str(workdir)!r}) gives the basis",
    ]


def export_run(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str | None = None,
    dtype: str | None = None,
) -> str:
    """Writes what a run has found for the original program, whole or not at all.

    Args:
      workdir: of the run.
      out: a .safetensors file.
      format: "sketch", the state dict with the orthogonal matrix Q as `z_transform.weight`; or
        "matrix", Q alone as `weight`, with the number of semantic channels in the metadata.
      dtype: of the stored numbers; float32 unless given. Q stays float32 in "matrix".

    Returns:
      the format.

    Raises:
      UserError: another format, or a file that cannot be written or is there already.
    """
    out, format = Path(out), sketch.FORMAT if format is None else format
    if format not in FORMATS:
        raise UserError(
            f"--format {format} does not hold a disentangler; allowed: {', '.join(FORMATS)}"
        )
    if format == "matrix":
        if out.suffix != ".safetensors" or dtype not in (None, "float32"):
            raise UserError(
                f"--format matrix writes a .safetensors file of float32, not {out}"
                + (f" of {dtype}" if dtype else "")
            )
        files.write_new(out, to_bytes(basis_of_run(workdir)))
        return format
    run = restore_run(workdir)
    finished = jax.device_get(run.disentangler.finished(run.params))
    sketch.write(out, finished, dtype or layout.STORED_TYPES[0])
    return format
