"""The measurement: probes of every part of the channels, and what they find on held-out pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from efae_jax import data
from efae_jax.data.pairs import NamingReader, Pairs, Prediction
from efae_jax.data.splits import Subset, hold_out
from efae_jax.disentanglement import parts
from efae_jax.disentanglement.probes import Probes, Settings
from efae_jax.errors import RunError
from efae_jax.logs import track
from efae_jax.metrics.latent_moments import LatentMoments
from efae_jax.metrics.subspaces import r_squared, recall, retrieval_ranks
from efae_jax.sharding import put_batch, whole_batch

TARGETS = ("caption", "style")
# Raw channels are chosen by probes of a quarter of the steps, by their losses in the last quarter.
SHORT, LATE = 4, 4
PART = {"caption": "semantic", "style": "style"}  # that should tell a target


class Held(NamedTuple):
    """Held-out pairs without their latents, in the order of the data.

    Attributes:
      caption: [N,T], means of the images' caption embeddings; style: [N,I].
      candidates: distinct embeddings of all their captions, [M,T]; own: [N,5], each image's among
        them, -1 where it has fewer.
    """

    caption: Float[np.ndarray, "N T"]
    style: Float[np.ndarray, "N I"]
    candidates: Float[np.ndarray, "M T"]
    own: np.ndarray


class Measurement:
    """R^2 and recall of captions and styles from parts of the channels.

    For every part of the channels (`parts`), a fresh embedder learns the mean embedding of an
    image's captions, another the style embedding, from the training pairs; figures are of the
    held-out pairs. Latents are clipped as in training.

    Args:
      pairs: the folder's records.
      mesh: batches are split over all of it.
      settings: of the probes.
      batch_size: of training and evaluation.
      draws: of random bases.
      clip: limit of a latent's absolute value; 0 for none.
      num_images: held-out pairs at most; 0 for all.
      threads: that read.
      max_bad: unreadable pairs that do not end the run.

    Raises:
      RunError: a probe that diverged, or no pair that could be read.
    """

    def __init__(
        self,
        pairs: Pairs,
        mesh: Mesh,
        settings: Settings,
        *,
        batch_size: int,
        draws: int,
        clip: float,
        num_images: int = 0,
        threads: int = 8,
        max_bad: int = 0,
    ):
        self.pairs, self.mesh, self.settings = pairs, mesh, settings
        self.batch_size, self.draws, self.clip = batch_size, draws, clip
        self.options = {"num_threads": threads, "max_bad": max_bad}
        fraction = pairs.summary["test_fraction"]
        self.train = hold_out(pairs, "train", fraction)
        test = hold_out(pairs, "test", fraction)
        self.held_out = test.indices[: num_images or None]
        self.test = Subset(pairs, self.held_out)
        summary = pairs.summary
        self.dimensions = {
            "caption": summary["text"]["dimension"],
            "style": summary["image"]["dimension"],
        }
        self.reader = NamingReader(tuple(summary["latents"]["shape"]), *self.dimensions.values())
        self.channels = self.reader.latent[-1]

    def __call__(self, matrix: Float[np.ndarray, "C C"], semantic: int) -> dict[str, Any]:
        """Figures of a basis: {"parts": ..., "latent": ..., "raw": ..., counts}."""
        raw = self._best_raw(semantic)
        compared = parts.compared(matrix, semantic, self.draws, self.settings.seed)
        for target, chosen in raw.items():
            compared[f"raw {PART[target]}"] = parts.raw(chosen, self.channels)
        most = max(len(rows) for rows in compared.values())
        probes, _ = self._trained(
            dict.fromkeys(TARGETS, compared), most, "training probes", self.settings
        )
        found, held, moments = self._held_out(probes, matrix)
        rows = {name: {"channels": len(rows)} for name, rows in compared.items()}
        for target in TARGETS:
            wanted = getattr(held, target)
            for name, predicted in zip(compared, found[target], strict=True):
                if not np.isfinite(predicted).all():
                    raise RunError(f"the probe of {name} diverged; lower the learning rate")
                if target == "caption":
                    ranks = retrieval_ranks(predicted, held.candidates, held.own)
                else:
                    ranks = retrieval_ranks(predicted, wanted, np.arange(len(wanted))[:, None])
                rows[name][target] = {
                    "r2": r_squared(predicted, wanted, self.pairs.means[target]),
                    "recall_1": recall(ranks, 1),
                    "recall_5": recall(ranks, 5),
                }
        return {
            "parts": rows,
            "raw": {f"raw {PART[target]}": list(chosen) for target, chosen in raw.items()},
            "latent": moments,
            "images": {"train": len(self.train), "held_out": len(held.caption)},
            "candidates": {"caption": len(held.candidates), "style": len(held.style)},
        }

    def _best_raw(self, semantic: int) -> dict[str, tuple[int, ...]]:
        """The best raw channels: for captions as many as are semantic, for style the rest."""
        counts = {"caption": semantic, "style": self.channels - semantic}
        tried = {t: parts.raw_candidates(self.channels, n) for t, n in counts.items()}
        compared = {
            target: {str(c): parts.raw(c, self.channels) for c in candidates}
            for target, candidates in tried.items()
        }
        short = self.settings._replace(steps=max(self.settings.steps // SHORT, 1))
        most = max(counts.values())  # as of the probes that follow: the same programs serve
        _, losses = self._trained(compared, most, "choosing raw channels", short)
        return {t: parts.best_raw(tried[t], losses[t], counts[t]) for t in TARGETS}

    def _trained(
        self,
        compared: dict[str, dict[str, np.ndarray]],
        most: int,
        label: str,
        settings: Settings,
    ) -> tuple[dict[str, Probes], dict[str, list[float]]]:
        """Probes by target, and their late losses."""
        probes = {
            target: Probes(compared[target], most, size, settings, self.mesh)
            for target, size in self.dimensions.items()
        }
        late: dict[str, list[Any]] = {target: [] for target in TARGETS}
        steps, losses = settings.steps, []
        batches = data.train_batches(
            self.train,
            self.reader,
            batch_size=self.batch_size,
            seed=settings.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **self.options,
        )
        try:
            for step in track(range(steps), steps, label, " steps"):
                batch = next(batches)
                z, targets = self._inputs(batch)
                device = put_batch(self.mesh, {"z": z, **targets})
                jax.block_until_ready(losses)  # the host would run far ahead
                for target in TARGETS:
                    losses = probes[target].learn(device["z"], device[target])
                    if step >= steps - max(steps // LATE, 1):
                        late[target].append(losses)
        finally:
            batches.close()
        averages = {
            target: np.mean(jax.device_get(late[target]), axis=0).tolist() for target in TARGETS
        }
        return probes, averages

    def _held_out(
        self, probes: dict[str, Probes], matrix: np.ndarray
    ) -> tuple[dict[str, list[np.ndarray]], Held, dict[str, Any]]:
        """Predictions by target and part, what they should be, and moments of the latents."""
        found: dict[str, list[Any]] = {target: [] for target in TARGETS}
        wanted: dict[str, list[np.ndarray]] = {target: [] for target in TARGETS}
        moments = {name: LatentMoments(self.channels) for name in ("raw", "basis")}
        captions: dict[bytes, int] = {}
        candidates, own, squares = [], [], np.zeros(2)
        shown = track(
            self._test_batches(),
            len(self.test),
            "held-out",
            " pairs",
            size=lambda batch: min(self.batch_size, len(self.test) - int(batch["index"][0])),
        )
        for batch in shown:
            z, targets = self._inputs(batch)
            device = put_batch(self.mesh, {"z": z})
            mask = whole_batch(self.mesh, batch["mask"])
            for target in TARGETS:
                predicted = jax.device_get(probes[target].predict(device["z"]))
                found[target].append(np.stack(predicted)[:, mask])
                wanted[target].append(whole_batch(self.mesh, targets[target])[mask])
            whole = {n: whole_batch(self.mesh, v) for n, v in batch.items() if n != "bad"}
            z = whole["latent"][mask].astype(np.float64)
            u = z @ np.asarray(matrix, np.float64).T
            moments["raw"].add(z)
            moments["basis"].add(u)
            squares += [np.square(u @ matrix - z).sum(), np.square(z).sum()]
            for row in np.flatnonzero(mask):
                mine = np.full(len(whole["captions"][row]), -1)
                for i in range(whole["count"][row]):
                    # One candidate for equal texts, and for equal embeddings of different ones.
                    name = whole["names"][row, i].tobytes()
                    embedding = whole["captions"][row, i]
                    same = captions.get(name, captions.get(embedding.tobytes(), len(candidates)))
                    captions[name] = captions[embedding.tobytes()] = mine[i] = same
                    if same == len(candidates):
                        candidates.append(embedding)
                own.append(mine)
        if not own:
            raise RunError("evaluation: none of the held-out pairs could be read")
        held = Held(
            np.concatenate(wanted["caption"]),
            np.concatenate(wanted["style"]),
            np.stack(candidates),
            np.stack(own),
        )
        latent = {name: value.figures() for name, value in moments.items()}
        latent["reconstruction_error"] = float(np.sqrt(squares[0] / squares[1]))
        return {t: list(np.concatenate(found[t], axis=1)) for t in TARGETS}, held, latent

    def _test_batches(self) -> Iterator[dict[str, np.ndarray]]:
        return data.eval_batches(
            self.test,
            self.reader,
            batch_size=self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **self.options,
        )

    def _inputs(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        z = batch["latent"]
        z = np.clip(z, -self.clip, self.clip) if self.clip else z
        return z, mean_targets(self.pairs.prediction, batch)


def mean_targets(prediction: Prediction, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean of each image's caption embeddings, and what its own embedding has beyond it."""
    caption = batch["captions"].sum(axis=1) / batch["count"][:, None].astype(np.float32)
    expected = caption @ prediction.matrix + prediction.offset
    return {"caption": caption, "style": batch["image"] - expected}
