"""Folders of latents with embeddings, as `embed` writes them, and latents with a planted basis."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from efae_jax.data.array_records import write_records
from efae_jax.data.latents import shard_path, write_shard
from efae_jax.data.pairs import embeddings_path
from efae_jax.data.splits import is_held_out
from efae_jax.embed.prediction import LeastSquares


class Planted(NamedTuple):
    """Pairs whose captions are functions of the first rows of Q z, and styles of the others.

    `matrix` is Q [C,C]; the rest are arguments of `write_pairs`.
    """

    matrix: np.ndarray
    latents: np.ndarray
    captions: list[np.ndarray]
    images: np.ndarray


def planted(
    count, channels=4, semantic=None, side=2, dimension=6, seed=0, matrix=None, noise=0.3
) -> Planted:
    """Latents z = Q^T u. Captions are those of u's first `semantic` channels (half of them), an
    image is the caption beside what the other channels say; both of tanh of means over positions.

    Q is drawn at random unless given. Images have one to three captions, all of unit length.
    """
    rng = np.random.default_rng((seed, 2_718))  # apart from all that is drawn from a seed alone
    semantic = semantic or channels // 2
    if matrix is None:
        matrix = np.linalg.qr(rng.standard_normal((channels, channels)))[0]
    u = rng.standard_normal((count, 1, 1, channels))
    u = u + noise * rng.standard_normal((count, side, side, channels))
    says = np.tanh(u.mean(axis=(1, 2)))
    shown, looks = says[:, :semantic], says[:, semantic:]
    text = unit(shown @ rng.standard_normal((semantic, dimension)))
    style = unit(looks @ rng.standard_normal((channels - semantic, dimension)))
    captions = [
        unit(t + 0.02 * rng.standard_normal((1 + i % 3, dimension))) for i, t in enumerate(text)
    ]
    images = unit(np.concatenate([text, style], axis=1))
    return Planted(matrix, (u @ matrix).astype(np.float32), captions, images)


def unit(x):
    """Rows of length one."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def write_pairs(
    folder, latents, captions, images, prediction=None, test_fraction=0.2, counts=None, texts=None
):
    """A folder for `data.pairs.Pairs`; keys are "0", "1", ...

    Args:
      folder: is made.
      latents: [N,h,w,C]. captions: N arrays [k,T]. images: [N,I].
      prediction: of image embeddings from captions'; by least squares of the training pairs
        unless given.
      counts: of pairs in each shard; one shard unless given.
      texts: the captions themselves, N lists; all different unless given.
      texts: of the captions, a list for each image; all different unless given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = [str(i) for i in range(len(latents))]
    texts = texts or [
        [f"caption {n} of {i}" for n in range(len(c))] for i, c in enumerate(captions)
    ]
    (text,), (image,) = captions[0].shape[1:], images.shape[1:]
    fit = LeastSquares(text, image)
    for key, caption, embedding in zip(keys, captions, images, strict=True):
        if not is_held_out(key, test_fraction):
            fit.add(caption, embedding)
    prediction = prediction or fit.solve()
    places, counts = np.arange(len(keys)), list(counts or [len(keys)])
    assert sum(counts) == len(keys)
    for number, part in enumerate(np.split(places, np.cumsum(counts)[:-1])):
        shards = len(counts)
        write_shard(
            shard_path(folder, number, shards, "array_record"),
            ({"latent": latents[i], "label": 0, "key": keys[i], "index": int(i)} for i in part),
            "array_record",
        )
        write_records(
            embeddings_path(folder, number, shards),
            (
                {
                    "index": int(i),
                    "texts": texts[i]
                    if texts
                    else [f"caption {n} of {i}" for n in range(len(captions[i]))],
                    "captions": captions[i],
                    "image": images[i],
                }
                for i in part
            ),
        )
    np.savez(
        folder / "pairs.npz",
        keys=np.array(keys),
        latents=places,
        embeddings=places,
        **{f"{name}_mean": mean for name, mean in fit.means(prediction).items()},
        **prediction._asdict(),
    )
    of_latents = {
        "format": "array_record",
        "shards": counts,
        "shape": list(latents.shape[1:]),
        "model": {"kind": "planted", "sha256": "0" * 64, "latent": {}},
    }
    (folder / "latents.json").write_text(json.dumps(of_latents))
    summary = {
        "images": len(keys),
        "held_out": sum(is_held_out(key, test_fraction) for key in keys),
        "captions": sum(map(len, captions)),
        "text": {"name": "planted", "space": "planted text", "dimension": text},
        "image": {"name": "planted", "space": "planted image", "dimension": image},
        "data": {"source": "planted", "images": len(keys), "keys": "0" * 64},
        "style": "the image's embedding less its least-squares prediction from the caption's",
        "test_fraction": test_fraction,
        "model_source": "planted",
        "embeddings": counts,
        "latents": of_latents,
    }
    (folder / "pairs.json").write_text(json.dumps(summary))
    return folder
