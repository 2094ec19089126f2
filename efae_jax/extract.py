"""The latents of a data source, in shards on disk, with their statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import efae_jax
from efae_jax import batch_sizes, data
from efae_jax.api import Model
from efae_jax.checkpoint import differences
from efae_jax.data.latents import FORMATS, SUMMARY, shard_path, shard_range, write_shard
from efae_jax.data.left_out import account
from efae_jax.data.splits import Source, Subset
from efae_jax.data.transforms import Transform
from efae_jax.errors import RunError, UserError
from efae_jax.logs import counting, say, waiting
from efae_jax.methods.base import to_float
from efae_jax.metrics.streaming import ChannelStatistics
from efae_jax.models.build import compute_dtype
from efae_jax.paths import printable
from efae_jax.sharding import batch_sharding, fitting_devices, make_mesh, replicated

FRACTIONS = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
SETTINGS = "settings.json"
TEXT_LABELS = "labels that are texts without a number (kept as label_text, numbered 0)"
MOST = 8  # images of a device at a time
SHARD_IMAGES = 4096  # at most, unless the number of shards is given


class Settings(NamedTuple):
    """How latents are made and stored.

    Attributes:
      format: "array_record" or "npz".
      shards: files; one for every 4096 images if None.
      sample: draw from the posterior, by (seed, number of the image), instead of its mode.
      normalised: in the units of a diffusion model, instead of the model's own.
      seed: of the samples.
    """

    format: str = "array_record"
    shards: int | None = None
    sample: bool = False
    normalised: bool = False
    seed: int = 0


class Extractor:
    """Encodes a data source into shards, of which those that are there already are kept.

    Shard s of S holds the images from s N / S on; process p of P writes the shards p, p + P,
    ... into the same folder, each on the devices of its own machine. A shard and its
    statistics appear under their names when they are complete.

    Args:
      model: the autoencoder.
      source: of the images.
      transform: the way of each into a batch.
      described: what tells these images from others, for the record.
      out: the folder, the same for all processes.
      settings: of the result; another run's settings are refused.
      batch_size: of this process; a multiple of its devices. Unless given 8 a device, fewer where
        there are few images, and where memory is scarce.
      max_bad: unreadable images in a shard that do not end the run.
      devices: this process's, unless given.

    Raises:
      UserError: for settings that cannot be, and for a folder of other latents.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        transform: Transform,
        described: dict[str, Any],
        out: Path,
        settings: Settings,
        *,
        batch_size: int | None = None,
        max_bad: int = 100,
        devices: Any = None,
    ):
        self.model, self.source, self.transform, self.out = model, source, transform, Path(out)
        if settings.format not in FORMATS:
            raise UserError(f"--format {settings.format}: allowed are {', '.join(FORMATS)}")
        if len(source) == 0:
            raise UserError("there is no image to encode")
        shards = settings.shards
        if shards is None:
            shards = math.ceil(len(source) / SHARD_IMAGES)
        if not 1 <= shards <= len(source):
            raise UserError(f"--shards {shards}: allowed are 1 to the {len(source)} images")
        self.settings, self.max_bad = settings._replace(shards=shards), max_bad
        if devices is None:
            devices = fitting_devices(jax.local_devices(), batch_size)
        largest = max(len(self._range(number)) for number in range(shards))
        self.given = batch_size is not None
        self.batch = batch_sizes.first_batch(devices, largest, MOST, batch_size)
        shape = (self.batch.size, *transform.size, transform.channels)
        posterior = _abstract(model.autoencoder.posterior, model.params, shape)
        if settings.sample and posterior.log_variance is None:
            raise UserError("--sample: the encoder is deterministic, there is nothing to draw")
        units = model.autoencoder.normalise if settings.normalised else lambda z: z
        try:  # packed units change the shape
            self.shape = jax.eval_shape(units, posterior.mean).shape[1:]
        except ValueError as error:
            raise UserError(str(error)) from error
        latent = model.config.latent.to_dict() if settings.normalised else {}
        self.record = {
            "model": {**model.identity, "config": model.config.model.to_dict(), "latent": latent},
            "dtype": jnp.dtype(compute_dtype(model.config.dtype)).name,
            "data": described,
            **self.settings._asdict(),
            "shape": list(self.shape),
        }
        self._check_folder()

    def run(self, process_index: int = 0, process_count: int = 1) -> None:
        """Writes those of this process's shards that are not there yet, with a progress bar.

        Raises:
          RunError: too many unreadable images, or a latent that is not finite.
        """
        mine = range(process_index, self.settings.shards, process_count)
        left = [number for number in mine if not self._is_complete(number)]
        if len(left) < len(mine):
            say(f"{len(mine) - len(left)} of {len(mine)} shards are there already")
        if not left:
            return
        total = sum(len(self._range(i)) for i in left)
        with batch_sizes.named_in_errors(lambda: self.batch):
            self._compile()
            with counting(total, "encoding", " images") as done:
                for number in left:
                    self._write(number, done)

    def finish(self) -> dict[str, Any]:
        """Joins the shards' statistics, once all are there, in `latents.json`; returns it.

        Raises:
          RunError: when some are missing, or no image at all could be read.
        """
        shards = range(self.settings.shards)
        if missing := [i for i in shards if not self._is_complete(i)]:
            raise RunError(f"{self.out} lacks {len(missing)} of {len(shards)} shards")
        total, counts, texts = ChannelStatistics(self.shape[-1]), [], 0
        unreadable: dict[str, str] = {}
        text_of = ""
        for number in shards:
            with np.load(self._statistics_path(number), allow_pickle=False) as arrays:
                if "indices" not in arrays:
                    raise UserError(
                        f"{self.out} holds latents of an older version of efae_jax; give another "
                        "--out"
                    )
                total.merge(ChannelStatistics.from_arrays(arrays))
                counts.append(len(arrays["indices"]))
                names = arrays["unreadable"].tolist()
                reasons = arrays["reasons"].tolist() if "reasons" in arrays else len(names) * [""]
                unreadable |= dict(zip(names, reasons, strict=True))
                texts += int(arrays["texts"]) if "texts" in arrays else 0
                text_of = text_of or (str(arrays["text_of"]) if "text_of" in arrays else "")
        if not total.count:
            raise RunError(
                f"none of the {len(self.source)} images could be read; the first: "
                + "; ".join(f"{printable(n)} ({why})" for n, why in [*unreadable.items()][:3])
            )
        found = account(self.source, unreadable)
        known = any(kind.startswith("labels that") for kind in found["left_out"])
        if texts and not known:  # what a source says as it opens is said once
            found["left_out"][TEXT_LABELS] = {"count": texts, "example": text_of}
        quantiles, pooled = total.quantiles(FRACTIONS), total.pooled_quantiles(FRACTIONS)
        names = [str(fraction) for fraction in FRACTIONS]
        summary = {
            **self.record,
            "shards": counts,
            "images": sum(counts),
            "unreadable": [*map(printable, unreadable)],
            "read": found,
            "classes": list(self.source.class_names),
            "mean": total.mean.tolist(),
            "std": total.std.tolist(),
            "quantiles": dict(zip(names, quantiles.tolist(), strict=True)),
            "quantiles_of_all_channels": dict(zip(names, pooled.tolist(), strict=True)),
            "exactness": "mean and std (divided by N) in float64 over all positions; quantiles "
            "from a histogram, within 0.25% of their value, or 2.5e-5 near zero",
            "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
        }
        _write_json(self.out / SUMMARY, summary)
        return summary

    def indices(self) -> list[np.ndarray]:
        """Of each shard, the numbers in the source of the images that it holds."""
        found = []
        for number in range(self.settings.shards):
            with np.load(self._statistics_path(number), allow_pickle=False) as arrays:
                found.append(arrays["indices"])
        return found

    def _write(self, number: int, done: Callable[[int], None]) -> None:
        """One shard. Its statistics get their name first: the shard's says it is complete."""
        statistics = ChannelStatistics(self.shape[-1])
        unreadable: dict[str, str] = {}
        indices: list[int] = []
        texts: list[str] = []

        def records() -> Iterator[dict[str, Any]]:
            for batch, z in self._encoded(number, unreadable):
                for row in np.flatnonzero(batch["mask"]):
                    index = int(batch["index"][row])
                    if not np.isfinite(z[row]).all():
                        name = printable(self.source.name(index))
                        raise RunError(f"the latent of {name} is not finite")
                    label, key = int(batch["label"][row]), self.source.key(index)
                    indices.append(index)
                    record = {"latent": z[row], "label": label, "key": key, "index": index}
                    if text := batch["label_text"][row].decode("utf-8", "ignore"):
                        record["label_text"] = text
                        texts.append(printable(f"{text!r} of {key}"))
                    yield record
                statistics.add(z[batch["mask"]])
                done(int((batch["index"] >= 0).sum()))
            self._write_statistics(number, statistics, indices, unreadable, texts)

        path = shard_path(self.out, number, self.settings.shards, self.settings.format)
        write_shard(path, records(), self.settings.format)

    def _encoded(
        self, number: int, unreadable: dict[str, str]
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """(batch, latents) of a shard's images; a batch is encoded while another is written.

        What cannot be read is added to `unreadable`: name -> why.
        """
        indices = self._range(number)
        batches = data.eval_batches(
            Subset(self.source, indices),
            self.transform.with_label_text(),
            batch_size=self.batch.size,
            max_bad=self.max_bad,
        )
        ahead: list[Any] = []
        try:
            for batch in batches:
                batch["index"] = np.where(batch["index"] < 0, -1, batch["index"] + indices.start)
                image, numbers = jax.device_put(
                    (batch["image"], batch["index"].astype(np.int32)), batch_sharding(self._mesh)
                )
                ahead.append((batch, self._encode(self._params, image, numbers)))
                if len(ahead) == 2:
                    yield _fetched(ahead.pop(0))
            for pair in ahead:
                yield _fetched(pair)
        finally:
            unreadable |= batches.bad.by_name()
            batches.close()

    def _compile(self) -> None:
        """The encoder, for smaller batches where memory is too small, unless a size is given."""
        height, width = self.transform.size
        with waiting("compiling the encoder"):
            while True:
                # The devices of this process only: others are at other shards.
                self._mesh, needed = make_mesh(devices=self.batch.devices), None
                self._params = jax.device_put(
                    jax.device_get(self.model.params), replicated(self._mesh)
                )
                shape = (self.batch.size, height, width, self.transform.channels)
                image = jax.ShapeDtypeStruct(shape, np.uint8)
                index = jax.ShapeDtypeStruct(shape[:1], np.int32)
                try:
                    self._encode = self._jitted().lower(self._params, image, index).compile()
                    if self.given:
                        return
                    memory = self._encode.memory_analysis()
                    needed = memory.temp_size_in_bytes + 2 * memory.output_size_in_bytes
                except jax.errors.JaxRuntimeError as error:
                    if self.given or not batch_sizes.out_of_memory(error):
                        raise
                smaller = batch_sizes.smaller(
                    self.batch,
                    needed,
                    batch_sizes.free_memory(self.batch.devices),
                    f"an image of {height}x{width}",
                )
                if smaller is None:
                    return
                self.batch = smaller

    def _jitted(self) -> Any:
        autoencoder, settings = self.model.autoencoder, self.settings

        def encode(params: Any, image: jax.Array, index_B: jax.Array) -> jax.Array:
            x = to_float(image)
            if settings.sample:
                key = jax.random.key(settings.seed)
                keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B)
                z = autoencoder.clip(autoencoder.posterior(params, x).sample_each(keys_B))
            else:
                z = autoencoder.encode(params, x)
            return autoencoder.normalise(z) if settings.normalised else z

        split = batch_sharding(self._mesh)
        return jax.jit(
            encode, in_shardings=(replicated(self._mesh), split, split), out_shardings=split
        )

    def _range(self, number: int) -> range:
        return shard_range(len(self.source), number, self.settings.shards)

    def _is_complete(self, number: int) -> bool:
        path = shard_path(self.out, number, self.settings.shards, self.settings.format)
        return path.exists() and self._statistics_path(number).exists()

    def _statistics_path(self, number: int) -> Path:
        return shard_path(self.out, number, self.settings.shards, "statistics.npz")

    def _write_statistics(
        self,
        number: int,
        statistics: ChannelStatistics,
        indices: list[int],
        unreadable: dict[str, str],
        texts: list[str],
    ) -> None:
        path = self._statistics_path(number)
        temporary = path.with_name(f".{path.name}.partial")
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                indices=np.array(indices, np.int64),
                unreadable=np.array([*unreadable], str),
                reasons=np.array([*unreadable.values()], str),
                texts=len(texts),
                text_of=next(iter(texts), ""),
                **statistics.arrays(),
            )
        temporary.replace(path)

    def _check_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.out / SETTINGS}: {error}") from error
        started = any(self.out.glob("latents-*-of-*"))
        words = "latents", "the same model, data and options"
        keep_settings(self.out / SETTINGS, self.record, started, *words)


def keep_settings(
    path: Path, record: dict[str, Any], started: bool, what: str, needed: str
) -> None:
    """Writes how a folder's shards are made beside them, or checks that they are made so.

    Settings that no shard was written under bind nobody.

    Args:
      path: of the settings.
      record: the settings.
      started: whether there are shards.
      what, needed: words for what the folder holds, and for what must be given again.

    Raises:
      UserError: when the shards were made otherwise.
    """
    try:
        if not path.exists() or not started:
            _write_json(path, record)
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    changed = [
        f"{name}: {old!r} there, {new!r} given"
        for name, old, new in differences(there, json.loads(json.dumps(record)))
    ]
    if changed:
        raise UserError(
            f"{path.parent} holds {what} made otherwise ({'; '.join(changed)}); give {needed}, or "
            "another --out"
        )


def _fetched(pair: tuple[Any, jax.Array]) -> tuple[Any, np.ndarray]:
    return pair[0], np.asarray(pair[1], np.float32)


def _abstract(function: Any, params: Any, shape: tuple[int, ...]) -> Any:
    """Shapes of function(params, images of that shape); what does not fit is a UserError."""
    try:
        return jax.eval_shape(function, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    except ValueError as error:  # the models know no UserError
        raise UserError(str(error)) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{jax.process_index()}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
