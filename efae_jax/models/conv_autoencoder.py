"""Autoencoders with a deterministic, convolutional decoder: AutoencoderKL, Aura's, TAESD."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Int, PRNGKeyArray

from efae_jax import groups
from efae_jax.models.functional import Net, Params
from efae_jax.models.latent import Normalisation, Posterior


class ConvAutoencoder:
    """Encoder and decoder, the units of the latent, and a group that acts on it.

    Latents are in the model's own units everywhere; `normalise` gives those of a diffusion
    model. Parameters are {"encoder": ..., "decoder": ...}.

    Args:
      encoder: images x[B,H,W,c] in [-1, 1] to z[B,h,w,C], or to moments [B,h,w,2C].
      decoder: z to images.
      representation: of the group, on the C channels.
      factor: image side / latent side of the encoder.
      variational: the encoder gives moments.
      clamp: limit of a latent's absolute value, or None.
      normalisation: to the units of a diffusion model.
      upscale: side that the decoder returns / side that the encoder takes.
      shrink: side of the data / side that the encoder takes; a multiple of `upscale`.
    """

    is_flow = False

    def __init__(
        self,
        encoder: Net,
        decoder: Net,
        representation: groups.Representation,
        *,
        factor: int,
        variational: bool = False,
        clamp: float | None = None,
        normalisation: Normalisation = Normalisation(),  # noqa: B008  (it is frozen)
        upscale: int = 1,
        shrink: int = 1,
    ):
        normalisation.check(representation.channels)
        if shrink < 1 or shrink % upscale:
            raise ValueError(
                f"model: the decoder returns {upscale} times the side that the encoder takes, so "
                f"the data's side must be a multiple of that: shrink={shrink} is not"
            )
        self.encoder, self.decoder = encoder, decoder
        self.group, self.representation = representation.group, representation
        self.factor, self.variational, self.clamp = factor, variational, clamp
        self.normalisation, self.upscale, self.shrink = normalisation, upscale, shrink
        self.normalise, self.denormalise = normalisation.normalise, normalisation.denormalise

    def init(self, key: PRNGKeyArray) -> Params:
        """Draws the parameters; jit it."""
        encoder_key, decoder_key = jax.random.split(key)
        return {
            "encoder": self.encoder.init(encoder_key),
            "decoder": self.decoder.init(decoder_key),
        }

    def views(
        self, x_BHWC: Float[Array, "B H W c"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B H W c"]]:
        """What the encoder takes and what the decoder should return, of images as the data
        gives them: area-resized where encoder, decoder and data have different sides."""
        return shrink(x_BHWC, self.shrink), shrink(x_BHWC, self.shrink // self.upscale)

    def posterior(self, params: Params, x: Float[Array, "B H W c"]) -> Posterior:
        """q(z | x), for pixels in [-1, 1]; deterministic unless the model is variational."""
        out = self.encoder(params["encoder"], x)
        return Posterior.from_moments(out) if self.variational else Posterior(self.clip(out))

    def encode(self, params: Params, x: Float[Array, "B H W c"]) -> Float[Array, "B h w C"]:
        """The latent, or the posterior's mode, clamped if the model says so."""
        return self.clip(self.posterior(params, x).mean)

    def clip(self, z: Array | np.ndarray) -> Any:
        """Latents within the clamp, on the device or the host as they are."""
        return z if self.clamp is None else z.clip(-self.clamp, self.clamp)

    def matrices(self, params: Params) -> Float[Array, "G C C"]:
        """rho(g) for every element."""
        del params
        return self.representation.matrices

    def act(
        self, params: Params, g_B: Int[Array, " B"], z: Float[Array, "B h w C"]
    ) -> Float[Array, "B h w C"]:
        """rho(g) z, with one element (its index in the group) per example."""
        return groups.act_latent(self.group, self.matrices(params), g_B, z)

    def act_image(
        self, g_B: Int[Array, " B"], x: Float[Array, "B H W c"]
    ) -> Float[Array, "B H W c"]:
        """g x: the same elements acting on images."""
        return groups.act_image(self.group, g_B, x)

    @staticmethod
    def decode_options(config: Any) -> dict[str, Any]:
        """There is one way to decode."""
        del config
        return {}

    def decode(
        self, params: Params, z: Float[Array, "B h w C"], noise: Any = None
    ) -> Float[Array, "B H W c"]:
        """Images, not clipped to [-1, 1]. There is nothing to sample, so `noise` is ignored."""
        del noise
        return self.decoder(params["decoder"], z)


def shrink(x_BHWC: Float[Array, "B H W c"], factor: int) -> Float[Array, "B H/f W/f c"]:
    """Area resizing: the mean of every factor x factor pixels."""
    if factor == 1:
        return x_BHWC
    if x_BHWC.shape[1] % factor or x_BHWC.shape[2] % factor:
        raise ValueError(
            f"data: images of {x_BHWC.shape[1]}x{x_BHWC.shape[2]} cannot be shrunk by {factor}; "
            "it must divide both sides"
        )
    return reduce(x_BHWC, "b (h p) (w q) c -> b h w c", "mean", p=factor, q=factor)
