"""What a training method tells the training loop."""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

Params = dict[str, Any]
Batch = dict[str, Array]


def to_float(image: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """8-bit images to [-1, 1]: u / 127.5 - 1."""
    return image.astype("float32") / 127.5 - 1


class Autoencoder(Protocol):
    """What evaluation, export and users need of a model, whatever trained it.

    `params` is the model's own tree; images are floats in [-1, 1], NHWC; group elements
    are indices, one per example.
    """

    group: Any

    def encode(self, params: Params, x: Float[Array, "B H W c"]) -> Float[Array, "B ..."]:
        """Images to latents."""

    def act(
        self, params: Params, g_B: Int[Array, " B"], z: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """rho(g) z."""

    def act_image(self, g_B: Int[Array, " B"], x: Float[Array, "B H W c"]) -> Array:
        """g x."""

    def decode(self, params: Params, z: Array, noise: Array, **options: Any) -> Array:
        """Latents to images; a deterministic decoder ignores the noise."""


class Method(Protocol):
    """One way to train: who is trained, from where, by which loss.

    The loop updates the players in order, each by its own loss and optimiser. One
    player is plain training; an autoencoder and a discriminator make a GAN.

    Attributes:
      players: their names, in the order of their updates.
      autoencoder: the model that evaluation and users see; its parameters are those of
        the first player.
    """

    players: tuple[str, ...]
    autoencoder: Autoencoder

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """The parameters of every player. It is jitted, with the outputs sharded."""

    def loss(
        self, player: str, params: dict[str, Params], batch: Batch, keys_B: PRNGKeyArray
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        """A player's loss and any further figures, per example.

        Args:
          player: whose loss.
          params: of all players; the gradient is taken for `player`'s only.
          batch: "image" uint8[B,H,W,C], "label" int32[B].
          keys_B: a random key per example, so that the draw for an example depends
            neither on the mesh nor on gradient accumulation.
        """
