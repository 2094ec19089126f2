"""What a training method tells the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

Params = dict[str, Any]
Batch = dict[str, Array]


# Of the networks that judge images in training, which are float32: TF32 on a GPU, where the
# originals have it, and as near on a TPU, whose own choice would round to bfloat16.
JUDGES_PRECISION = "tensorfloat32"


def to_float(image: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """8-bit images to [-1, 1]: u / 127.5 - 1."""
    return image.astype("float32") / 127.5 - 1


class Autoencoder(Protocol):
    """What evaluation, export and users need of a model, whatever trained it.

    `params` is the model's own tree; images are floats in [-1, 1], NHWC; group elements
    are indices, one per example.

    Attributes:
      group: that acts on images and latents.
      is_flow: the decoder samples, starting from noise.
      has_encoder, has_decoder: whether there are parameters for it.
    """

    group: Any
    is_flow: bool
    has_encoder: bool
    has_decoder: bool

    def views(self, x: Float[Array, "B H W c"]) -> tuple[Array, Array]:
        """What the encoder takes and what the decoder should return, of the data's images."""

    def encode(self, params: Params, x: Float[Array, "B H W c"]) -> Float[Array, "B ..."]:
        """Images to latents."""

    def act(
        self, params: Params, g_B: Int[Array, " B"], z: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """rho(g) z."""

    def act_image(self, g_B: Int[Array, " B"], x: Float[Array, "B H W c"]) -> Array:
        """g x."""

    def decode_options(self, config: Any) -> dict[str, Any]:
        """The options of `decode` that `config.eval` asks for."""

    def decode(self, params: Params, z: Array, noise: Array | None, **options: Any) -> Array:
        """Latents to images; only a flow needs noise, of the images' shape."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss may depend on beside parameters, examples and their keys.

    Attributes:
      step: number of steps done before this one.
      variables: what the method carries from step to step and nobody trains.
      passed: what the players before this one handed on in this step.
      frozen: weights that nobody trains, as `Method.load_frozen` gave them.
      plan: what `Method.plan` chose for this step; a constant of the compiled program.
    """

    step: Int[Array, ""]
    variables: Params
    passed: dict[str, Array]
    frozen: Params
    plan: Hashable


class Weighted(NamedTuple):
    """A figure of some of the examples only, or of each by its share.

    Over a batch, its parts, and the steps between two reports it is sum(weighted) / sum(weight):
    a mean over the examples that it is of, however few of a batch they are. Of no example at all
    there is no figure.

    Attributes:
      weighted: value x weight, one per example.
      weight: at least 0.
    """

    weighted: Float[Array, " B"]
    weight: Float[Array, " B"]


class Outcome(NamedTuple):
    """What a loss gives.

    Attributes:
      loss_B: one value per example; its mean is minimised.
      metrics: further figures, scalars, one per example, or `Weighted`.
      variables: those of the context, updated.
      passed: arrays with the examples first, for the players that come after.
    """

    loss_B: Float[Array, " B"]
    metrics: dict[str, Array | Weighted]
    variables: Params
    passed: dict[str, Array]


class Method:
    """One way to train: who is trained, from where, by which loss.

    The loop updates the players in order, each by its own loss and optimiser. One
    player is plain training; an autoencoder and a discriminator make a GAN.

    Attributes:
      players: their names, in the order of their updates. The first is what users get, an
        "autoencoder" unless a method says otherwise; its optimiser is `config.optim`, another
        player's `config.optim_NAME`.
      autoencoder: the model whose parameters are those of the first player.
      frozen: shapes of the weights that nobody trains.
    """

    players: tuple[str, ...] = ("autoencoder",)
    autoencoder: Autoencoder
    frozen: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    @property
    def product(self) -> Any:
        """What evaluation and users see: the autoencoder."""
        return self.autoencoder

    @staticmethod
    def completed(config: Any) -> Any:
        """The config with what follows from the data that it names, before a run starts."""
        return config

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """The parameters of every player. It is jitted, with the outputs sharded."""
        raise NotImplementedError

    def init_variables(self) -> Params:
        """The variables at the start; small, and traced with `init`."""
        return {}

    def load_frozen(self) -> Params:
        """The weights that nobody trains, from files, as `frozen` says."""
        return {}

    def load_pretrained(self) -> dict[str, Params]:
        """Parts of players' parameters that replace those of `init` when a run starts."""
        return {}

    def plan(self, step: int) -> Hashable:
        """What of step `step` (from 0) decides about shapes: each value compiles a program.

        It must follow from the config and the step alone, so that all processes agree and
        a resumed run repeats it; and take few values.
        """
        del step
        return None

    def plans(self) -> tuple[Hashable, ...]:
        """All values that `plan` takes."""
        return (None,)

    def plans_to_check(self) -> tuple[Hashable, ...]:
        """Those of them that together meet every size that might not fit.

        A run traces their steps before it writes anything.
        """
        return self.plans()

    def loss(
        self,
        player: str,
        params: dict[str, Params],
        batch: Batch,
        keys_B: PRNGKeyArray,
        context: Context,
    ) -> Outcome:
        """A player's loss.

        The batch is the whole, global batch, or a part of it under gradient accumulation.

        Args:
          player: whose loss.
          params: of all players; the gradient is taken for `player`'s only.
          batch: the arrays of `data.make_reader`: of images, "image" uint8[B,H,W,C] and "label"
            int32[B].
          keys_B: a random key per example, so that the draw for an example depends
            neither on the mesh nor on gradient accumulation.
          context: everything else.
        """
        raise NotImplementedError
