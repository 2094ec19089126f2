"""What a run shows of itself: quality on held-out images, plainly and through every group element.

`efae_jax.evaluation` measures any model, and much more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

import efae_jax
from efae_jax import data, pictures
from efae_jax.api import restore
from efae_jax.checkpoint import check_config
from efae_jax.data.left_out import account, account_lines
from efae_jax.errors import RunError, UserError
from efae_jax.logs import console, figures_table, say, track
from efae_jax.methods.base import Autoencoder, to_float
from efae_jax.metrics.equivariance import equivariance_error
from efae_jax.metrics.images import psnr, ssim
from efae_jax.paths import local_folder, printable, workdir_path
from efae_jax.sharding import batch_sharding, make_mesh, put_batch, replicated, whole_batch

NAMES = ("psnr", "ssim", "equivariance_error")


class Evaluator:
    """Figures of one autoencoder on the held-out images of a config, for every g.

    For each image x and element g: PSNR and SSIM of decode(rho(g) E(x), g e) against
    g x, where the noise e follows from the seed and the image's index, and the
    equivariance error of the encoder. Figures are per image and summed on the host in
    float64 in the order of the images, so that they depend neither on the batch size
    nor on the number of devices (up to the rounding of the forward pass).

    Args:
      autoencoder: the model.
      config: reads `data`, `eval` and `seed`.
      mesh: batches are split over all of it.
    """

    def __init__(self, autoencoder: Autoencoder, config: Any, mesh: Mesh):
        self.model, self.config, self.mesh = autoencoder, config, mesh
        self.source = data.make_source(config.data, "test")
        if len(self.source) == 0:
            raise UserError(
                "config.data holds out no image to evaluate on; see data.test_split, "
                "data.test_fraction and data.num_test"
            )
        self._reasons: dict[int, str] = {}  # why images could not be read, by their numbers
        self.num_images = min(config.eval.num_images or len(self.source), len(self.source))
        step = make_eval_step(autoencoder, config)
        self.step = jax.jit(
            step,
            in_shardings=(None, batch_sharding(mesh), batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

    def figures(self, params: Any, show: bool = False) -> dict[str, dict[str, float]]:
        """{element: {psnr, ssim, equivariance_error}}, means over the images, and the counts.

        Args:
          params: of the autoencoder.
          show: with a progress bar.

        Raises:
          RunError: when no image could be read.
        """
        elements = self.model.group.elements
        sums = {name: np.zeros(len(elements), np.float64) for name in NAMES}
        count = 0
        batches, size = self.batches(), self.config.eval.batch_size
        if show:
            batches = track(
                batches,
                self.num_images,
                "evaluating",
                " images",
                size=lambda batch: min(size, self.num_images - int(batch["index"][0])),
            )
        for batch in batches:
            device = put_batch(
                self.mesh, {"image": batch["image"], "index": batch["index"].astype(np.int32)}
            )
            values = jax.device_get(self.step(params, device["image"], device["index"]))
            mask = whole_batch(self.mesh, batch["mask"])
            count += int(mask.sum())
            for name in NAMES:  # [g, b]
                sums[name] += values[name].astype(np.float64)[:, mask].sum(axis=1)
        if count == 0:
            raise RunError("evaluation: none of the held-out images could be read")
        self.count = count
        return {
            g: {name: float(sums[name][i] / count) for name in NAMES}
            for i, g in enumerate(elements)
        }

    def summary(self, params: Any) -> dict[str, float]:
        """{"psnr/e": ..., "psnr/h": ...}: flat, for curves."""
        figures = self.figures(params)
        return {f"{name}/{g}": row[name] for g, row in figures.items() for name in NAMES}

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of the held-out images; padding and surplus masked out."""
        size = self.config.eval.batch_size
        found = held_out_batches(self.source, self.config, size)
        try:
            for i, batch in enumerate(found):
                batch["mask"] = batch["mask"] & (batch["index"] < self.num_images)
                yield batch
                if (i + 1) * size >= self.num_images:
                    return
        finally:
            self._reasons = {n: why for n, why in found.bad.reasons.items() if n < self.num_images}
            found.close()

    def read(self) -> dict[str, Any]:
        """What `figures` has read of the held-out images, and what it has not, and why."""
        source = self.source
        found = account(source, {source.name(n): why for n, why in self._reasons.items()},
                        used=self.count)  # fmt: skip
        lost = self.num_images - self.count - len(self._reasons)
        for kind, count, example in (
            ("beyond config.eval.num_images", len(source) - self.num_images,
             printable(source.name(len(source) - 1))),
            ("unreadable, in another process", lost, "see what that said"),
        ):  # fmt: skip
            if count:
                found["left_out"][kind] = {"count": count, "example": example}
        return found


def noise_of(seed: int, index_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sampler's noise for each image: a function of the seed and the image's index."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index_B)


def make_eval_step(model: Autoencoder, config: Any) -> Any:
    """(params, images uint8[B,H,W,C], index[B]) -> {figure: [G, B]}, for `jax.jit`."""
    options = model.decode_options(config.eval)

    def eval_step(params: Any, image: jax.Array, index_B: jax.Array) -> dict[str, jax.Array]:
        x, target = model.views(to_float(image))
        z = model.encode(params, x)
        noise = noise_of(config.seed, index_B, x.shape[1:]) if model.is_flow else None

        def one_element(g: jax.Array) -> dict[str, jax.Array]:
            g_B = jnp.full(x.shape[0], g)
            gz, g_target = model.act(params, g_B, z), model.act_image(g_B, target)
            g_noise = model.act_image(g_B, noise) if model.is_flow else None
            decoded = model.decode(params, gz, g_noise, **options)
            encoded = model.encode(params, model.act_image(g_B, x))
            return {
                "psnr": psnr(decoded, g_target),
                "ssim": ssim(decoded, g_target),
                "equivariance_error": equivariance_error(gz, encoded),
            }

        return jax.lax.map(one_element, jnp.arange(model.group.order))

    return eval_step


def check_evaluation(model: Autoencoder, params: Any, config: Any, mesh: Mesh) -> None:
    """Traces one evaluation step on shapes alone; what does not fit raises here."""
    c, size = config.data, config.eval.batch_size
    if size < 1 or size % mesh.size:
        raise UserError(
            f"config.eval.batch_size={size} must be a positive multiple of the {mesh.size} devices"
        )
    for name, least in (("pictures", 1), ("num_images", 0), ("every", 0)):
        if config.eval[name] < least:
            raise UserError(f"config.eval.{name}={config.eval[name]} must be at least {least}")
    try:
        jax.eval_shape(
            make_eval_step(model, config),
            params,
            jax.ShapeDtypeStruct((size, *c.size, c.channels), jnp.uint8),
            jax.ShapeDtypeStruct((size,), jnp.int32),
        )
    except ValueError as error:  # the mathematics and the models know no UserError
        raise UserError(str(error)) from error


def evaluate_workdir(
    workdir: epath.PathLike,
    config: Any,
    devices: Any = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint's averaged weights into `workdir/eval`.

    Args:
      workdir: of a training run.
      config: the run's; only fields that may change on resume may differ.
      devices: all of them unless told otherwise.
      step: of the checkpoint; the newest unless given.

    Raises:
      UserError: when there is no such checkpoint, or the config is another run's.
    """
    workdir = workdir_path(workdir)
    check_config(workdir, json.loads(config.to_json_best_effort()))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    restored = restore(workdir, config, mesh, step)
    check_evaluation(restored.model, restored.params, config, mesh)
    with local_folder(workdir / "eval") as out:
        record = evaluate(restored.model, restored.params, config, mesh, out, restored.step)
    names = ["equivariance.png", "flow.gif"][: 1 + restored.model.is_flow]
    say(f"pictures and figures: {workdir}/eval/{', '.join([*names, 'figures.json'])}")
    return record


def evaluate(
    model: Autoencoder,
    params: Any,
    config: Any,
    mesh: Mesh,
    out: Path,
    step: int,
) -> dict[str, Any]:
    """Evaluates, prints the table, and writes figures and pictures into a folder.

    `figures.json`, `figures.txt` (the table), `equivariance.png` (held-out images beside
    decode(rho(g) E(x)) for every g) and, of a flow, `flow.gif` (from noise to those images).

    Args:
      model, params: the autoencoder.
      config, mesh: as for `Evaluator`.
      out: the folder.
      step: of the checkpoint, for the record.

    Returns:
      what `figures.json` holds.
    """
    start = time.monotonic()
    evaluator = Evaluator(model, config, mesh)
    say(f"evaluating {evaluator.num_images:,} held-out images for {model.group.order} elements")
    figures = evaluator.figures(params, show=True)
    record = {
        "step": step,
        "images": evaluator.count,
        "group": model.group.name,
        "representation": config.group.representation,
        "data": {
            "source": config.data.source,
            "path": config.data.path,
            "split": "test",
            "read": evaluator.read(),
        },
        "decode": model.decode_options(config.eval),
        "protocol": "means over images of per-image figures; pixels clipped to [-1, 1], range 2; "
        "SSIM with an 11-pixel Gaussian window"
        + ("; the sampler's noise is transformed along" if model.is_flow else ""),
        "figures": figures,
        "seconds": round(time.monotonic() - start, 1),
        "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    # Every process takes part in decoding, the first one writes.
    images = first_images(evaluator.source, config, config.eval.pictures)
    shown = pictures.decode_for_pictures(
        model, params, images, config.eval, config.seed, replicated(mesh)
    )
    if jax.process_index() != 0:
        return record
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    table = _table(figures, f"{evaluator.count:,} held-out images", step)
    console.print(table)
    for line in account_lines(record["data"]["read"]):
        say(line)
    with (out / "figures.txt").open("w") as file:
        type(console)(file=file, width=100).print(table)
    pictures.write_pictures(model.group.elements, shown, out)
    return record


def _table(figures: dict[str, dict[str, float]], images: str, step: int) -> Any:
    identity = figures["e"]["psnr"]
    rows = [
        [
            g,
            f"{row['psnr']:.2f}",
            f"{row['psnr'] - identity:+.2f}",
            f"{row['ssim']:.4f}",
            f"{row['equivariance_error']:.4f}",
        ]
        for g, row in figures.items()
    ]
    title = f"decode(rho(g) encode(x)) against g x: {images}, step {step:,}"
    return figures_table(
        title,
        ["g", "PSNR (dB)", "vs identity", "SSIM", "equivariance error"],
        rows,
    )


def held_out_batches(
    source: Any, config: Any, batch_size: int, whole: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of a source in order (or the whole of it), with a mask."""
    return data.eval_batches(
        source,
        data.make_transform(config.data, train=False),
        batch_size=batch_size,
        process_index=0 if whole else jax.process_index(),
        process_count=1 if whole else jax.process_count(),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        max_bad=config.data.max_bad,
    )


def first_images(source: Any, config: Any, count: int) -> np.ndarray:
    """The first held-out images that can be read, uint8[N,H,W,C]."""
    found: list[np.ndarray] = []
    for batch in held_out_batches(source, config, count, whole=True):
        found.extend(batch["image"][batch["mask"]])
        if len(found) >= count:
            break
    return np.stack(found[:count])
