"""One pass over the images of an evaluation, and its record."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

import efae_jax
from efae_jax import batch_sizes, data, report
from efae_jax.api import Model
from efae_jax.batch_sizes import Batch
from efae_jax.checkpoint import differences
from efae_jax.data.chosen import Chosen
from efae_jax.data.left_out import account
from efae_jax.data.splits import Subset
from efae_jax.errors import RunError, UserError
from efae_jax.evaluation import record
from efae_jax.evaluation.networks import Networks
from efae_jax.evaluation.programs import Programs
from efae_jax.evaluation.protocols import DEFAULT, find_protocol
from efae_jax.evaluation.tally import PLAIN, Tally
from efae_jax.evaluation.transformations import possible
from efae_jax.interrupts import deferred
from efae_jax.logs import counting, make_output_folder, say, waiting
from efae_jax.models.build import compute_dtype, larger_range
from efae_jax.panels import picture
from efae_jax.paths import printable
from efae_jax.report.gallery import FOLDER as PICTURES
from efae_jax.sharding import fitting_devices, make_mesh, put_batch, replicated, whole_batch

UNFINISHED = "unfinished.npz"
SAVE_EVERY = 120.0  # seconds
# Images of a device, and their pixels where images are large. Cores of a CPU gain nothing by more,
# and a batch takes them minutes.
MOST, MOST_PIXELS, MOST_PIXELS_OF_A_CORE = 16, 16 * 128 * 128, 4 * 128 * 128


class Settings(NamedTuple):
    """How a model is evaluated.

    Attributes:
      protocol: how images are prepared and compared, one of `protocols.PROTOCOLS`.
      frechet, inception, perceptual_weights: for `Networks`.
      reference: file of statistics that the reconstructions' features are compared with, instead
        of those of the images themselves.
      save_reference: file to write the images' own statistics into.
      latent: "sample", of the posterior, or "mean"; the protocol's unless given.
      resampling: of scalings, one of `groups.RESAMPLINGS`.
      num_images: of all images, a random choice by the seed; 0: all.
      batch_size: unless given up to 16 a device, fewer of large images, where there are few, and
        where memory is scarce.
      pictures: images that are shown.
      max_bad: unreadable images that do not end the run.
      seed: of the order of the images, samples, and a flow's noise.
    """

    protocol: str = DEFAULT
    frechet: str | None = None
    inception: str | None = None
    perceptual_weights: str | None = None
    reference: str | None = None
    save_reference: str | None = None
    latent: str | None = None
    resampling: str = "bilinear"
    num_images: int = 0
    batch_size: int | None = None
    pictures: int = 6
    max_bad: int = 100
    seed: int = 0


# What of the settings changes no figure.
_IMMATERIAL = ("batch_size", "max_bad", "save_reference")


class Run:
    """One pass over the images; what it has seen is saved every two minutes, and when stopped."""

    def __init__(
        self,
        model: Model,
        networks: Networks,
        chosen: Chosen,
        settings: Settings,
        out: Path,
        devices: Any,
    ):
        self.model, self.networks, self.settings, self.out = model, networks, settings, out
        self.chosen, self.size = chosen, tuple(chosen.config.size)
        self.protocol = find_protocol(settings.protocol)
        self.latent = self.protocol.choose_latent(settings.protocol, settings.latent)
        try:
            self.reader = self.protocol.reader(chosen.config)
        except ValueError as error:  # the data know no options
            raise UserError(f"--protocol {settings.protocol}: {error}") from error
        # In random order, so that what only looks at the first images sees all kinds of them.
        order = np.random.default_rng(settings.seed).permutation(len(chosen.source))
        self.order = order[: settings.num_images or None]
        if len(self.order) < 2:
            raise UserError(f"{len(self.order)} images are too few to evaluate on; at least 2")
        if devices is None:
            devices = fitting_devices(jax.devices(), settings.batch_size)
        pixels = MOST_PIXELS_OF_A_CORE if devices[0].platform == "cpu" else MOST_PIXELS
        most = max(1, min(MOST, pixels // (self.size[0] * self.size[1])))
        self._set_up(batch_sizes.first_batch(devices, len(self.order), most, settings.batch_size))
        shape, sides = self.programs.latent_shape, self.programs.decoded_sides
        vgg = settings.reference or settings.save_reference
        if vgg and networks.frechet == "vgg16" and min(sides) < networks.smallest_side:
            raise UserError(
                f"images of {sides[0]}x{sides[1]} have no statistics of VGG16's features; at least "
                f"{networks.smallest_side} pixels a side"
            )
        self.labelled = chosen.source.num_classes > 1
        self.seconds = 0.0  # of starts before this one
        self.about = {
            "model": model.identity,
            "dtype": jnp.dtype(compute_dtype(model.config.dtype)).name,
            "data": {**chosen.described, "size": list(self.size)},
            "settings": {
                **{k: v for k, v in settings._asdict().items() if k not in _IMMATERIAL},
                "latent": self.latent,
            },
        }
        self.unreadable: dict[int, str] = {}  # number of an image -> why
        self.tally = Tally(
            self.transformations, shape, sides, features=networks.size, labelled=self.labelled
        )

    def _set_up(self, batch: Batch) -> None:
        """The programs for such batches, traced: what does not fit ends here, before anything is
        read or written.
        """
        self.batch, self.mesh = batch, make_mesh(devices=batch.devices)
        model, settings = self.model, self.settings
        self.params = jax.device_put(jax.device_get(model.params), replicated(self.mesh))
        self.networks_params = jax.device_put(self.networks.params, replicated(self.mesh))
        try:
            self.programs = Programs(
                model.autoencoder,
                self.networks,
                model.config,
                self.mesh,
                protocol=self.protocol,
                sample=self.latent == "sample",
                resampling=settings.resampling,
                seed=settings.seed,
                size=self.size,
                channels=self.chosen.config.channels,
            )
            sides, shape = self.programs.decoded_sides, self.programs.latent_shape
            wanted, self.impossible = possible(model.autoencoder, sides, shape)
            self.impossible |= self.programs.trace(
                self.params, self.networks_params, batch.size, wanted
            )
        except ValueError as error:  # the models know no UserError
            raise UserError(str(error)) from error
        self.transformations = [t for t in wanted if t.name not in self.impossible]

    def _compile(self) -> None:
        """All programs; for smaller batches where memory is too small, unless a size is given."""
        image = f"an image of {self.size[0]}x{self.size[1]}"
        given = self.settings.batch_size is not None
        with waiting("compiling") as note:
            while True:
                needed = None
                try:
                    self.programs.compile(note)
                    if given:
                        return
                    needed = self.programs.memory
                except jax.errors.JaxRuntimeError as error:
                    if given or not batch_sizes.out_of_memory(error):
                        raise
                free = batch_sizes.free_memory(self.batch.devices)
                smaller = batch_sizes.smaller(self.batch, needed, free, image)
                if smaller is None:
                    return
                self._set_up(smaller)

    def go(self, start: float) -> None:
        """All images that were not seen before; `start` of the clock, for the record."""
        self.start = start
        make_output_folder(self.out)
        done, total = self._resume(), len(self.order)
        say(
            f"evaluating {total:,} images of {self.size[0]}x{self.size[1]}"
            + (f", {done:,} of them done before" if done else "")
            + f"; {len(self.transformations)} transformations"
        )
        if done < total:
            with batch_sizes.named_in_errors(lambda: self.batch):
                self._compile()
                done = self._all(done, total)
        self._save(done)
        if self.tally.count < 2:
            raise RunError(f"only {self.tally.count} of the {total} images could be read")

    def _all(self, done: int, total: int) -> int:
        """The images after `done`, of all; returns how many are done."""
        say(f"batches of {self.batch.size} images on {self.mesh.size} device(s)")
        saved, ahead = time.monotonic(), []
        with deferred() as requests, counting(total, "evaluating", " images", done=done) as more:

            def add(found: Any) -> None:
                nonlocal done
                count = self._add(*found)
                done += count
                more(count)

            for number, batch in enumerate(self._batches(done), 1):
                ahead.append((whole_batch(self.mesh, batch["bad"]), self._dispatch(batch)))
                # The devices compute a batch while the host adds up another; where the host itself
                # computes, the batch is done by now.
                if len(ahead) == 2 or _is_ready(ahead[0]):
                    add(ahead.pop(0))
                stop = requests.after(number)
                if stop or time.monotonic() - saved > SAVE_EVERY:
                    self._save(done)
                    saved = time.monotonic()
                if stop:
                    say(f"saved after {done:,} of {total:,} images")
                    raise requests.reason()
            for found in ahead:
                add(found)
        return done

    def _dispatch(self, batch: dict[str, np.ndarray]) -> tuple[Any, list[Any]]:
        names = ("image", "index", "label", "mask")
        device = put_batch(self.mesh, {n: _narrow(batch[n]) for n in names})
        encoded, plain = self.programs.plain(self.params, self.networks_params, device)
        each = [
            self.programs.transformed(t, self.params, self.networks_params, encoded)
            for t in self.transformations
        ]
        return plain, each

    def _add(self, bad: np.ndarray, found: tuple[Any, list[Any]]) -> int:
        """Adds a batch up; returns how many images it had."""
        plain, each = found
        shown = len(self.tally.shown)
        pictures = [f.pop("pictures") for f in (plain, *each)]
        plain, each = jax.device_get((plain, each))
        mask = plain["mask"]
        self._check_finite(plain, plain["figures"] | {"latent": plain["latent"]}, "")
        for t, one in zip(self.transformations, each, strict=True):
            self._check_finite(plain, one["figures"], f" under {t.label}")
        if mask.any():
            self.tally.add_images(plain, mask, self.settings.pictures)
            self.tally.add_figures(PLAIN, plain["figures"], mask)
            for t, one in zip(self.transformations, each, strict=True):
                self.tally.add_figures(t.name, one["figures"], mask)
            if len(self.tally.shown) > shown and jax.process_index() == 0:
                self._write_pictures(jax.device_get(pictures), mask, shown)
        self.tally.unreadable += int(bad.sum())
        return int(mask.sum() + bad.sum())

    def _check_finite(self, plain: dict[str, Any], values: dict[str, Any], where: str) -> None:
        fine = plain["mask"].copy()
        for value in values.values():
            fine &= np.isfinite(value).all(axis=tuple(range(1, value.ndim)))
        for row in np.flatnonzero(plain["mask"] & ~fine):
            name = self.chosen.source.name(int(plain["index"][row]))
            dtype = self.about["dtype"]
            raise RunError(
                f"latent or decoded image of {printable(name)}{where} is not finite, computed in "
                f"{dtype}{larger_range(dtype)}"
            )

    def _write_pictures(self, pictures: list[Any], mask: np.ndarray, first: int) -> None:
        folder = self.out / PICTURES
        folder.mkdir(exist_ok=True)
        names = (
            ("input", "reconstruction"),
            *((f"{t.name}-target", f"{t.name}-decoded") for t in self.transformations),
        )
        for pair, both in zip(names, pictures, strict=True):
            for name, images in zip(pair, both, strict=True):
                shown = images[mask][: len(self.tally.shown) - first]
                for n, image in enumerate(shown, first):
                    picture(image).convert("RGB").save(folder / f"{name}-{n}.png")

    def _batches(self, done: int) -> Iterator[dict[str, np.ndarray]]:
        rest = self.order[done:]
        batches = data.eval_batches(
            Subset(self.chosen.source, rest.tolist()),
            self.reader,
            batch_size=self.batch.size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self.chosen.config.num_threads,
            num_workers=self.chosen.config.num_workers,
            max_bad=self.settings.max_bad,
        )
        try:
            for batch in batches:
                # Numbers of the images themselves: what is drawn for one depends on no other.
                batch["index"] = np.where(batch["index"] < 0, -1, rest[batch["index"]])
                for row, reason in batches.bad.reasons.items():
                    self.unreadable[int(rest[row])] = reason
                yield batch
        finally:
            batches.close()

    def _save(self, done: int) -> None:
        if jax.process_index() != 0:
            return
        temporary = self.out / f".{UNFINISHED}.partial"
        with temporary.open("wb") as file:
            about, seconds = json.dumps(self.about), self._elapsed()
            # Those of batches that are read ahead will be found again.
            lost = [int(n) for n in self.order[:done] if n in self.unreadable]
            np.savez(
                file,
                done=done,
                about=about,
                seconds=seconds,
                unreadable_index=np.array(lost, np.int64),
                unreadable_reason=np.array([self.unreadable[n] for n in lost], str),
                **self.tally.arrays(),
            )
        temporary.replace(self.out / UNFINISHED)

    def _resume(self) -> int:
        path = self.out / UNFINISHED
        if not path.exists():
            return 0
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            there = json.loads(str(arrays["about"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"{path} is damaged; remove it to start anew") from error
        changed = differences(there, json.loads(json.dumps(self.about)))
        if changed:
            raise UserError(
                f"{self.out} holds an unfinished evaluation made otherwise ("
                + "; ".join(f"{n}: {old!r} there, {new!r} given" for n, old, new in changed)
                + "); give the same model, data and options, or another --out"
            )
        self.tally.load(arrays)
        self.seconds = float(arrays["seconds"])
        if "unreadable_index" in arrays:
            reasons = arrays["unreadable_reason"].tolist()
            self.unreadable = dict(zip(arrays["unreadable_index"].tolist(), reasons, strict=True))
        return int(arrays["done"])

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.start

    def _account(self) -> dict[str, Any]:
        """What was read of the images, and what was not, and why."""
        source = self.chosen.source
        reasons = {source.name(number): why for number, why in self.unreadable.items()}
        found = account(source, reasons, used=self.tally.count)
        others = self.tally.unreadable - len(self.unreadable)
        if others > 0:
            found["left_out"]["unreadable, in another process"] = {
                "count": others,
                "example": "see what that said",
            }
        if unchosen := len(source) - len(self.order):
            first = next(n for n in range(len(source)) if n not in set(self.order.tolist()))
            found["left_out"]["not chosen (--num-images)"] = {
                "count": unchosen,
                "example": printable(source.name(first)),
            }
        return found

    def record(self, name: str, reference: Any) -> dict[str, Any]:
        """What `evaluation.json` holds."""
        model, tally, settings = self.model, self.tally, self.settings
        rows = [record.transformed(tally, t, reference) for t in self.transformations]
        latent, missing = record.latent_space(tally, self.labelled)
        missing = self.networks.missing | self.impossible | missing
        plain = record.reconstruction(tally, reference)
        for figure in ("lpips", "frechet"):
            small = [
                row["name"] for row in [{"name": PLAIN, **plain}, *rows] if row[figure] is None
            ]
            if small and figure not in missing:
                missing[f"{figure} of {', '.join(small)}"] = "images too small for VGG16"
        identity = {k: v for k, v in model.identity.items() if k != "kind"}
        return {
            "format": report.FORMAT,
            "name": name,
            "model": {
                "kind": model.identity["kind"],
                **identity,
                "parameters": self.programs.parameters,
                "factor": model.factor,
                "latent_shape": list(self.programs.latent_shape),
                "group": model.group.name,
                "representation": model.config.group.representation,
                "dtype": self.about["dtype"],
            },
            "data": {
                **self.about["data"],
                "images": len(self.chosen.source),
                "unreadable": tally.unreadable,
                "read": self._account(),
            },
            "protocol": record.protocol(
                settings.protocol,
                self.latent,
                resampling=settings.resampling,
                frechet=self.networks.frechet,
                reference=settings.reference,
                is_flow=model.is_flow,
            ),
            "frechet": self.networks.frechet,
            "networks": self.networks.files,
            "reference": reference and {"count": reference.count, "about": reference.about},
            "reconstruction": plain,
            "transformations": rows,
            "errors": record.errors(rows),
            "latent": latent,
            "missing": missing,
            "images": tally.count,
            "seed": settings.seed,
            "seconds": round(self._elapsed(), 1),
            "device": jax.devices()[0].device_kind,
            "devices": self.mesh.size,
            "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
        }


def _is_ready(found: Any) -> bool:
    arrays = (leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array))
    return all(array.is_ready() for array in arrays)


def _narrow(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32) if values.dtype == np.int64 else values
