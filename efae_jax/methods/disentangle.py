"""Disentangling: an orthogonal basis of the latent's channels, semantic ones before style."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from efae_jax.data.pairs import Pairs, read_summary
from efae_jax.errors import UserError
from efae_jax.methods.base import Batch, Context, Method, Outcome, Params
from efae_jax.models.build import compute_dtype
from efae_jax.models.disentangler import build_disentangler, change_channels

# Of the difference from a target, and of W^T W - 1: the readme's loss and its program's.
FORMS = ("distance", "mse", "l1")


class Disentangle(Method):
    """Finds u = W z, W orthogonal, whose first channels tell what an image shows, the others how.

    Beside W it trains an embedder of the semantic channels, whose target is a caption's embedding
    t, and one of the style channels, whose target is what the image's embedding i has beyond what
    the caption lets expect (`data.pairs.Prediction`; i - t in CLIP's space). Each step takes one
    of an image's captions. Latents are clipped to +-`config.latent.clip`.

        "distance":  sum (e - target)^2 of both embedders,   + w sum (W^T W - 1)^2
        "mse":       mean (e - target)^2 of both embedders,  + w mean (W^T W - 1)^2
        "l1":        mean |e - target| of both embedders,    + w sum (W^T W - 1)^2

    with w = `config.loss.orthogonality`. "mse" is the published description, "l1" its program;
    "distance" measures embeddings, which are of length one, whatever their dimension. With
    `config.model.orthogonality` "cayley" or "expm" W is orthogonal at every step and w means
    nothing; with "soft" the result is Q of W's QR decomposition.

    Raises:
      UserError, ValueError: for what does not fit; one line.
    """

    players = ("disentangler",)

    def __init__(self, config: Any):
        if config.loss.form not in FORMS:
            raise UserError(
                f"config.loss.form={config.loss.form!r} is not one of {', '.join(FORMS)}"
            )
        for name in ("loss.orthogonality", "latent.clip"):
            group, field = name.split(".")
            if not config[group][field] >= 0:
                raise UserError(f"config.{name}={config[group][field]} must be at least 0")
        if min(config.model.width, config.model.blocks + 1) < 1:
            raise UserError(
                f"config.model: width={config.model.width} must be at least 1, and "
                f"blocks={config.model.blocks} at least 0"
            )
        if config.init_from:
            raise UserError(
                f"config.init_from={config.init_from!r}: only an autoencoder starts from another; "
                "a basis starts from the raw channels"
            )
        self.config = config
        self.disentangler = build_disentangler(config, compute_dtype(config.dtype))
        text, image = config.data.text, config.data.image
        self.frozen = {
            "matrix": jax.ShapeDtypeStruct((text, image), jnp.float32),
            "offset": jax.ShapeDtypeStruct((image,), jnp.float32),
        }

    @property
    def product(self) -> Any:
        return self.disentangler

    @staticmethod
    def completed(config: Any) -> Any:
        """With the sizes of the latents and embeddings of `config.data.path`, and which they are.

        `config.model.semantic` 0 becomes half of the channels.

        Raises:
          UserError: when the folder is not there, or a field that was given says otherwise.
        """
        summary = read_summary(config.data.path)
        found = {
            "latent": tuple(summary["latents"]["shape"]),
            "text": summary["text"]["dimension"],
            "image": summary["image"]["dimension"],
            "identity": _identity(summary),
        }
        config = config.copy_and_resolve_references()
        with config.unlocked():
            for name, value in found.items():
                if config.data[name] and config.data[name] != value:
                    raise UserError(
                        f"config.data.{name}={config.data[name]} is not {value}, that of "
                        f"{config.data.path}; leave it out"
                    )
                config.data[name] = value
            config.model.semantic = config.model.semantic or found["latent"][-1] // 2
        return config

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """{"disentangler": {"transform", "semantic", "style"}}."""
        return {"disentangler": self.disentangler.init(key)}

    def load_frozen(self) -> Params:
        """How captions' embeddings predict images': the matrix and the offset."""
        prediction = Pairs(Path(self.config.data.path)).prediction
        return {"matrix": prediction.matrix, "offset": prediction.offset}

    def loss(
        self,
        player: str,
        params: dict[str, Params],
        batch: Batch,
        keys_B: PRNGKeyArray,
        context: Context,
    ) -> Outcome:
        """The losses of both embedders and of the matrix, per example."""
        del player  # there is one
        form, own = self.config.loss.form, params["disentangler"]
        pick_B = jax.vmap(lambda key, count: jax.random.randint(key, (), 0, count))(
            keys_B, batch["count"]
        )
        text_BT = jnp.take_along_axis(batch["captions"], pick_B[:, None, None], axis=1)[:, 0]
        style_BI = style_target(context.frozen, text_BT, batch["image"])
        W = self.disentangler.matrix(own)
        u = change_channels(W, clip(batch["latent"], self.config.latent.clip))
        found = self.disentangler.embed(own, u)
        metrics = {
            name: distance(form, embedding, target)
            for name, embedding, target in zip(
                ("semantic", "style"), found, (text_BT, style_BI), strict=True
            )
        }
        excess = orthogonality_loss(form, W)
        loss_B = metrics["semantic"] + metrics["style"]
        if self.disentangler.orthogonality == "soft":
            loss_B = loss_B + self.config.loss.orthogonality * excess
        return Outcome(loss_B, {**metrics, "orthogonality": excess}, context.variables, {})


def _identity(summary: dict[str, Any]) -> str:
    """A hash of what pairs are made of: images, split, model, embedders."""
    latents = summary["latents"]
    parts = [summary[name] for name in ("data", "test_fraction", "images", "text", "image")]
    parts += [latents["model"]["sha256"], latents["shards"]]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def clip(z: jax.Array, limit: float) -> jax.Array:
    """z within +-limit; 0 means no limit."""
    return jnp.clip(z, -limit, limit) if limit else z


def style_target(prediction: Params, text_BT: jax.Array, image_BI: jax.Array) -> jax.Array:
    """What the images' embeddings have beyond A^T t + b."""
    expected = jnp.matmul(text_BT, prediction["matrix"], precision=jax.lax.Precision.HIGHEST)
    return image_BI - expected - prediction["offset"]


def orthogonality_loss(form: str, W: jax.Array) -> jax.Array:
    """mean (W^T W - 1)^2 with "mse", else the sum."""
    gram = jnp.matmul(W.T, W, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(gram - jnp.eye(len(W)))
    return squares.mean() if form == "mse" else squares.sum()


def distance(form: str, embedding_BD: jax.Array, target_BD: jax.Array) -> jax.Array:
    """How far embeddings are from their targets, for each example: a form of `FORMS`."""
    difference = embedding_BD - target_BD
    if form == "l1":
        return jnp.abs(difference).mean(axis=-1)
    squares = jnp.square(difference)
    return squares.mean(axis=-1) if form == "mse" else squares.sum(axis=-1)
