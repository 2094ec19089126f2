"""The command: latents first checked, then embeddings, then latents, then both joined."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import efae_jax
from efae_jax.api import load
from efae_jax.data.captions import open_captioned
from efae_jax.data.chosen import describe
from efae_jax.data.left_out import account_lines
from efae_jax.data.pairs import ARRAYS, SUMMARY, Embeddings
from efae_jax.data.splits import Source, is_held_out
from efae_jax.data.transforms import Transform
from efae_jax.embed.prediction import LeastSquares, same_space
from efae_jax.embed.shards import EmbeddingShards
from efae_jax.embedders import make_embedders
from efae_jax.errors import RunError, UserError
from efae_jax.extract import Extractor
from efae_jax.extract import Settings as LatentSettings
from efae_jax.logs import say, track

log = logging.getLogger(__name__)
BUILT_IN = "captioned_glyphs"
FEW = 3  # captions for each number of an embedding
STYLES = {  # by whether texts and images are embedded in one space
    True: "the image's embedding less the caption's",
    False: "the image's embedding less its least-squares prediction from the caption's, which was "
    "fitted to the training pairs",
}


class Settings(NamedTuple):
    """What is embedded, and how.

    Attributes:
      data, images, split, num_images: as for `data.captions.open_captioned`.
      size: of the square that the encoder takes; the model's own unless given.
      clip, text, image, embeddings, one_space, perceptual_weights: as for
        `embedders.make_embedders`.
      test_fraction: of the images that are held out, chosen by the hash of their keys.
      sample, seed: draw latents from the posterior, instead of its mode.
      shards: files; one for every 4096 images if None.
      batch_size: of the encoder.
      max_bad: unreadable images in a shard that do not end the run.
    """

    data: str
    images: str | None = None
    split: str | None = None
    num_images: int | None = None
    size: int | None = None
    clip: str | None = None
    text: str | None = None
    image: str | None = None
    embeddings: Path | None = None
    one_space: bool = False
    perceptual_weights: str | None = None
    test_fraction: float = 0.1
    sample: bool = False
    seed: int = 0
    shards: int | None = None
    batch_size: int | None = None
    max_bad: int = 100


def embed(
    model_source: str | Path,
    out: Path,
    settings: Settings,
    *,
    dtype: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> dict[str, Any]:
    """Writes latents with embeddings of captioned images, as `data.pairs` reads them.

    Latents are in the units of a diffusion model. The autoencoder and the embedders are in memory
    one after the other, never together; the same command goes on where it was stopped.

    Args:
      model_source, dtype, scaling_factor, shift_factor: for `efae_jax.load`.
      out: the folder.
      settings: everything else.

    Returns:
      what `pairs.json` holds.

    Raises:
      UserError: for what is not there or does not fit.
      RunError: when too much cannot be read.
    """
    out = Path(out)
    if not 0 < settings.test_fraction < 1:
        raise UserError(f"--test-fraction {settings.test_fraction}: it must be between 0 and 1")
    options = {"dtype": dtype, "scaling_factor": scaling_factor, "shift_factor": shift_factor}
    shards, source, described = _Prepared(model_source, out, settings, options).plan()
    text, image = make_embedders(
        clip=settings.clip,
        text=settings.text,
        image=settings.image,
        embeddings=settings.embeddings,
        same_space=settings.one_space,
        builtin=settings.data == BUILT_IN,
        perceptual_weights=settings.perceptual_weights,
    )
    embeddings = EmbeddingShards(source, text, image, described, out, shards, settings.max_bad)
    say(f"embedding {len(source):,} images and their captions: {text.name}; {image.name}")
    embeddings.run(jax.process_index(), jax.process_count())
    # Out of memory before the autoencoder comes.
    embeddings.text = embeddings.image = text = image = None
    extractor = _Prepared(model_source, out, settings, options).extractor
    say(f"encoding them, resized and cropped to {'x'.join(map(str, extractor.transform.size))}")
    extractor.run(jax.process_index(), jax.process_count())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("pairs")  # until every process has its shards
    # All processes look, so that all of them stop where something is missing; the first writes.
    summary = _join(out, source, extractor, embeddings, settings, str(model_source))
    shape = "x".join(map(str, summary["latents"]["shape"]))
    say(
        f"{summary['images']:,} latents of {shape} with {summary['captions']:,} captions, "
        f"{summary['held_out']:,} of the images held out: {out}"
    )
    for line in account_lines(summary["latents"]["read"]):
        say(line)
    say(f"main.py --config=configs/disentangle.py:VARIANT --config.data.path={out} learns")
    return summary


class _Prepared:
    """The source, and the extractor with its model, opened and checked."""

    def __init__(self, model_source: Any, out: Path, settings: Settings, options: dict[str, Any]):
        model = load(model_source, **options)
        model.require("embed", ["encoder"])
        size, channels = _size(model, settings.size), model.config.data.channels
        self.source: Source = open_captioned(
            settings.data,
            size=size,
            images=settings.images,
            split=settings.split,
            num_images=settings.num_images,
            max_bad=settings.max_bad,
        )
        _check_held_out(self.source, settings.test_fraction)
        self.described = {
            **describe(self.source),
            "source": settings.data,
            "images_folder": settings.images,
            "split": settings.split,
            "size": list(size),
        }
        self.extractor = Extractor(
            model,
            self.source,
            Transform(size, channels),
            self.described,
            out,
            LatentSettings(
                shards=settings.shards,
                sample=settings.sample,
                normalised=True,
                seed=settings.seed,
            ),
            batch_size=settings.batch_size,
            max_bad=settings.max_bad,
        )

    def plan(self) -> tuple[int, Source, dict[str, Any]]:
        """What the embeddings need of it; the model is not kept."""
        return self.extractor.settings.shards, self.source, self.described


def _check_held_out(source: Source, fraction: float) -> None:
    held = sum(is_held_out(source.key(i), fraction) for i in range(len(source)))
    if not 0 < held < len(source):
        raise UserError(
            f"--test-fraction {fraction}: {held} of the {len(source)} images would be held out; "
            "there must be some to train on and some to test on: give another, or more images"
        )


def _size(model: Any, size: int | None) -> tuple[int, int]:
    shrink = model.config.model.get("shrink", 1)
    sides = (size, size) if size else tuple(n // shrink for n in model.config.data.size)
    if model.factor is not None and any(n < 1 or n % model.factor for n in sides):
        raise UserError(
            f"images of {sides[0]}x{sides[1]} cannot be encoded: both sides must be positive "
            f"multiples of {model.factor}; see --size"
        )
    return sides


def _join(
    out: Path,
    source: Source,
    extractor: Extractor,
    embeddings: EmbeddingShards,
    settings: Settings,
    model_source: str,
) -> dict[str, Any]:
    """Process 0 writes `pairs.npz`, then `pairs.json`, which says that everything is there."""
    latents, counts = extractor.finish(), [len(part) for part in embeddings.indices()]
    found = [np.concatenate(parts) for parts in (extractor.indices(), embeddings.indices())]
    both, in_latents, in_embeddings = np.intersect1d(*found, True, return_indices=True)
    if not len(both):
        raise RunError(f"none of the {len(source)} images could be read")
    keys = [source.key(int(i)) for i in both]
    reader, captions = Embeddings(out, counts), 0
    record, fraction = embeddings.record, settings.test_fraction
    fit = LeastSquares(record["text"]["dimension"], record["image"]["dimension"])
    for key, place in track(
        zip(keys, in_embeddings, strict=True), len(keys), "captions", " images"
    ):
        pair = reader[int(place)]
        captions += len(pair["captions"])
        if not is_held_out(key, fraction):
            fit.add(pair["captions"], pair["image"])
    joint = record["text"]["space"] == record["image"]["space"]
    prediction = same_space(record["image"]["dimension"]) if joint else fit.solve()
    if not joint and fit.count < FEW * len(prediction.matrix):
        log.warning(
            "%d captions are few to predict images from %d numbers by least squares: what is left "
            "as style will be too little",
            fit.count,
            len(prediction.matrix),
        )
    summary = {
        "images": len(keys),
        "held_out": sum(is_held_out(key, fraction) for key in keys),
        "captions": captions,
        **{name: record[name] for name in ("text", "image", "data")},
        "style": STYLES[joint],
        "test_fraction": fraction,
        "model_source": model_source,
        "embeddings": counts,
        "latents": latents,
        "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
    }
    if jax.process_index() != 0:
        return summary
    (out / SUMMARY).unlink(missing_ok=True)  # of another --test-fraction
    temporary = out / f".{ARRAYS}.partial"
    with temporary.open("wb") as file:
        places = {"latents": in_latents, "embeddings": in_embeddings}
        means = {f"{name}_mean": mean for name, mean in fit.means(prediction).items()}
        np.savez(file, keys=np.array(keys, str), **places, **means, **prediction._asdict())
    os.replace(temporary, out / ARRAYS)
    temporary = out / f".{SUMMARY}.partial"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(out / SUMMARY)
    return summary
