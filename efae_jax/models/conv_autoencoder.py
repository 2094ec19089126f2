"""Autoencoders with a deterministic, convolutional decoder: AutoencoderKL, Aura's, TAESD."""

from __future__ import annotations

from typing import Any

import jax
from einops import reduce
from jaxtyping import Array, Float, PRNGKeyArray

from efae_jax import groups
from efae_jax.models.acted_latent import ActedLatent
from efae_jax.models.functional import Net, Params
from efae_jax.models.latent import Normalisation, Posterior


class ConvAutoencoder(ActedLatent):
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
      missing: "encoder" or "decoder" where only the other has parameters; "" for a whole model.
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
        normalisation: Normalisation | None = None,
        upscale: int = 1,
        shrink: int = 1,
        missing: str = "",
    ):
        super().__init__(representation, clamp, normalisation)
        if shrink < 1 or shrink % upscale:
            raise ValueError(
                f"model: the decoder returns {upscale} times the side that the encoder takes, so "
                f"the data's side must be a multiple of that: shrink={shrink} is not"
            )
        self.encoder, self.decoder = encoder, decoder
        self.factor, self.variational = factor, variational
        self.upscale, self.shrink = upscale, shrink
        self.has_encoder, self.has_decoder = missing != "encoder", missing != "decoder"

    def init(self, key: PRNGKeyArray) -> Params:
        """Draws the parameters; jit it."""
        encoder_key, decoder_key = jax.random.split(key)
        params = {}
        if self.has_encoder:
            params["encoder"] = self.encoder.init(encoder_key)
        if self.has_decoder:
            params["decoder"] = self.decoder.init(decoder_key)
        return params

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

    def decoder_features(
        self, params: Params, z: Float[Array, "B h w C"]
    ) -> Float[Array, "B H W D"]:
        """What the decoder's last convolution takes (not of TAESD)."""
        return self.decoder(params["decoder"], z, method="features")

    def last_layer(self, params: Params, h: Float[Array, "B H W D"]) -> Float[Array, "B H W c"]:
        """The decoder's last convolution, params["decoder"]["conv_out"]."""
        return self.decoder(params["decoder"], h, method="last_layer")


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
