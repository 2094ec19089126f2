"""What a disentangling run shows of itself: quick figures on the way, all of them at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

import efae_jax
from efae_jax import data, groups
from efae_jax.api import restore_player
from efae_jax.checkpoint import check_config
from efae_jax.data.pairs import Pairs
from efae_jax.data.splits import Subset
from efae_jax.disentanglement import report
from efae_jax.disentanglement.measure import Measurement, mean_targets
from efae_jax.disentanglement.probes import Settings
from efae_jax.disentanglement.reconstruction import decoded_difference
from efae_jax.errors import RunError, UserError
from efae_jax.logs import console, say
from efae_jax.methods import complete_config
from efae_jax.methods.disentangle import clip
from efae_jax.models.disentangler import Disentangler, build_disentangler, change_channels
from efae_jax.paths import local_folder, workdir_path
from efae_jax.sharding import batch_sharding, make_mesh, put_batch, replicated, whole_batch

PLAYER = "disentangler"
FEW = 100  # held-out images
PAIRS = ("text", "image", "style", "data", "test_fraction")  # of their summary, for the record
PROTOCOL = (
    "of held-out pairs: fresh embedders, one for each part of the channels, predict the mean of an "
    "image's caption embeddings, and its style embedding; R^2 against the mean of the training "
    "pairs; recall among the distinct held-out captions (a hit is one of the image's own) and "
    "among the held-out styles, by Euclidean distance"
)


class Evaluator:
    """How much of held-out captions and styles the embedders that are being trained predict.

    Args:
      disentangler: the model.
      config: reads `data`, `eval` and `latent`.
      mesh: batches are split over all of it.
    """

    def __init__(self, disentangler: Disentangler, config: Any, mesh: Mesh):
        self.config, self.mesh = config, mesh
        source = data.make_source(config.data, "test")
        some = range(min(config.eval.num_images or len(source), len(source)))
        self.source, self.pairs = Subset(source, some), Pairs(config.data.path)

        def embed(params: Any, z: jax.Array) -> tuple[jax.Array, jax.Array]:
            # In the basis that training would end with here.
            u = change_channels(disentangler.basis(params), clip(z, config.latent.clip))
            return disentangler.embed(params, u)

        whole = replicated(mesh)
        self._embed = jax.jit(embed, in_shardings=(None, batch_sharding(mesh)), out_shardings=whole)
        self._error = jax.jit(lambda p: groups.orthogonality_error(disentangler.matrix(p)))

    def summary(self, params: Any) -> dict[str, float]:
        """{"caption_r2", "style_r2", "orthogonality_error"}: flat, for curves.

        The captions' embeddings are the means of each image's, and R^2 is against the mean of the
        training pairs, as at the end.

        Raises:
          RunError: when no pair could be read.
        """
        squares, count = np.zeros((2, 2)), 0
        batches = data.eval_batches(
            self.source,
            data.make_reader(self.config.data, train=False),
            batch_size=self.config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self.config.data.num_threads,
            num_workers=self.config.data.num_workers,
            max_bad=self.config.data.max_bad,
        )
        for batch in batches:
            device = put_batch(self.mesh, {"z": batch["latent"]})
            found = jax.device_get(self._embed(params, device["z"]))
            mask = whole_batch(self.mesh, batch["mask"])
            count += int(mask.sum())
            targets = mean_targets(self.pairs.prediction, batch)
            for i, (e, (name, target)) in enumerate(zip(found, targets.items(), strict=True)):
                t = whole_batch(self.mesh, target)[mask].astype(np.float64)
                known = self.pairs.means[name]
                squares[i] += [np.square(e[mask] - t).sum(), np.square(known - t).sum()]
        if not count:
            raise RunError("evaluation: none of the held-out pairs could be read")
        r2 = (1 - squares[:, 0] / squares[:, 1]).tolist()
        error = float(self._error(params))
        return {"caption_r2": r2[0], "style_r2": r2[1], "orthogonality_error": error}


def check_evaluation(disentangler: Disentangler, params: Any, config: Any, mesh: Mesh) -> None:
    """Whether the settings of the evaluation fit.

    Raises:
      UserError: one line.
    """
    del disentangler, params
    c, size = config.eval, config.eval.batch_size
    if size < 1 or size % mesh.size:
        raise UserError(
            f"config.eval.batch_size={size} must be a positive multiple of the {mesh.size} devices"
        )
    for name, least in (("every", 0), ("num_images", 0), ("draws", 2), ("steps", 1)):
        if c[name] < least:
            raise UserError(f"config.eval.{name}={c[name]} must be at least {least}")
    if not c.lr > 0:
        raise UserError(f"config.eval.lr={c.lr} must be positive")


def evaluate_workdir(
    workdir: epath.PathLike, config: Any, devices: Any = None, step: int | None = None
) -> dict[str, Any]:
    """Measures the basis of a checkpoint into `workdir/eval`.

    Args:
      workdir: of a training run.
      config: the run's; only fields that may change on resume may differ.
      devices: all of them unless told otherwise.
      step: of the checkpoint; the newest unless given.

    Raises:
      UserError: when there is no such checkpoint, or the config is another run's.
    """
    workdir, config = workdir_path(workdir), complete_config(config)
    check_config(workdir, json.loads(config.to_json_best_effort()))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    disentangler = build_disentangler(config)
    check_evaluation(disentangler, None, config, mesh)
    params, step = restore_player(workdir, config, mesh, PLAYER, disentangler.init, step)
    W, Q = (np.asarray(jax.jit(f)(params)) for f in (disentangler.matrix, disentangler.basis))
    c = config.eval
    found = measure(
        Pairs(config.data.path),
        Q,
        config.model.semantic,
        mesh,
        Settings(config.model.width, config.model.blocks, c.steps, c.lr, config.seed),
        batch_size=c.batch_size,
        draws=c.draws,
        clip=config.latent.clip,
        num_images=c.num_images,
        threads=config.data.num_threads,
        max_bad=config.data.max_bad,
    )
    found = {"step": step, "trained_orthogonality_error": _error(W), **found}
    with local_folder(workdir / "eval") as out:
        write(found, out, workdir / "eval")
    return found


def measure(
    pairs: Pairs,
    matrix: np.ndarray,
    semantic: int,
    mesh: Mesh,
    settings: Settings,
    **options: Any,
) -> dict[str, Any]:
    """The record of a basis: `Measurement`'s figures, and all that they depend on.

    Args:
      pairs: latents with embeddings.
      matrix: Q, orthogonal; semantic: its semantic channels.
      mesh, settings, options: as for `Measurement`.
    """
    start = time.monotonic()
    measurement = Measurement(pairs, mesh, settings, **options)
    if len(measurement.held_out) < FEW:
        say(f"{len(measurement.held_out)} held-out images are few: the figures will say little")
    figures = measurement(matrix, semantic)
    return {
        "semantic": semantic,
        "orthogonality_error": _error(matrix),
        **figures,
        "reconstruction": decoded_difference(pairs, matrix, measurement.held_out),
        "probes": settings._asdict(),
        "options": {name: options[name] for name in ("batch_size", "draws", "clip")},
        "pairs": {name: pairs.summary[name] for name in PAIRS},
        "model": pairs.summary["latents"]["model"],
        "protocol": PROTOCOL,
        "seconds": round(time.monotonic() - start, 1),
        "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }


def write(record: dict[str, Any], out: Path, shown: epath.Path | None = None) -> None:
    """Prints the table, and writes `figures.json`, `figures.txt` and `figures.png` to a folder.

    `shown` is what to call the folder, if another is copied there.
    """
    if jax.process_index() != 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    table, words = report.table(record), "\n".join(report.words(record))
    with (out / "figures.txt").open("w") as file:
        for target in (console, type(console)(file=file, width=120, soft_wrap=True)):
            target.print(table)
            target.print(words, markup=False, highlight=False)
    report.draw(record, out / "figures.png")
    say(f"figures: {shown or out}/figures.json, figures.png")


def _error(matrix: np.ndarray) -> float:
    return float(groups.orthogonality_error(np.asarray(matrix, np.float64)))
