"""What an encoder gives: a posterior over latents, and the units that a diffusion model wants."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian q(z | x); without a log-variance, all its mass is on the mean.

    Attributes:
      mean: [B,h,w,C], which is its mode.
      log_variance: of the same shape, within `LOG_VARIANCE_RANGE`; None if deterministic.
    """

    mean: Float[Array, "B h w C"]
    log_variance: Float[Array, "B h w C"] | None = None

    @classmethod
    def from_moments(cls, moments: Float[Array, "B h w 2*C"]) -> Posterior:
        """From mean and log-variance one after the other on the channels."""
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return cls(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B h w C"]:
        """mean + std n, n standard normal."""
        if self.log_variance is None:
            return self.mean
        noise = jax.random.normal(key, self.mean.shape)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def sample_each(self, keys_B: PRNGKeyArray) -> Float[Array, "B h w C"]:
        """The same with a key for every example, whose draw then depends on no other."""
        if self.log_variance is None:
            return self.mean
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys_B)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, " B"]:
        """KL(q(z | x) || N(0, 1)) in nats, summed over positions and channels.

        0.5 sum(mean^2 + variance - 1 - log variance); undefined for a deterministic encoder.
        """
        if self.log_variance is None:
            raise ValueError("kl: a deterministic encoder has no posterior density")
        terms = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """From a model's own latents to those that a diffusion model is trained on, and back.

        normalise(z) = (z - shift) scaling               with a scaling and a shift factor,
        normalise(z) = (z - mean) / std * scaling        with mean and std per channel.

    FLUX.2's diffusion model sees patches: p x p positions of C channels become one of p^2 C, in
    the order (channel, row, column), before mean and std, which are per packed channel. A group
    acts on z as it was before, where rotations and flips permute positions and nothing else.

    Attributes:
      scaling, shift: numbers for all channels.
      mean, std: one number per channel; empty for none. They replace the shift.
      patch: p; 1 packs nothing.

    Raises:
      ValueError: a scaling or std that is not positive, only one of mean and std, or both a
        mean and a shift.
    """

    scaling: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    patch: int = 1

    def __post_init__(self) -> None:
        if not self.scaling > 0 or any(not s > 0 for s in self.std):
            raise ValueError("latent: scaling and every std must be positive")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"latent: {len(self.mean)} means but {len(self.std)} standard deviations; give "
                "both, one per channel, or neither"
            )
        if self.mean and self.shift:
            raise ValueError("latent: a shift and means per channel exclude each other")

    def normalise(self, z: Float[Array, "... C"]) -> Float[Array, "... D"]:
        """To the units of a diffusion model.

        Args:
          z: [..., C]; with patches [..., h, w, C], which becomes [..., h/p, w/p, C p^2].

        Raises:
          ValueError: sides that the patches do not divide.
        """
        mean, factor = self._affine()
        return (self._packed(z) - mean) * factor

    def denormalise(self, z: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Back to the units, and the positions, that the decoder takes.

        Raises:
          ValueError: channels that are not whole patches.
        """
        self._check_packed(z)
        mean, factor = self._affine()
        return self._unpacked(z / factor + mean)

    def check(self, channels: int) -> None:
        """Raises ValueError unless there are no means, or one per (packed) channel."""
        if self.mean and len(self.mean) != channels * self.patch**2:
            raise ValueError(
                f"latent: {len(self.mean)} means for {channels * self.patch**2} latent channels"
            )

    def _packed(self, z: Array) -> Array:
        if self.patch == 1:
            return z
        if len(z.shape) < 3 or any(side % self.patch for side in z.shape[-3:-1]):
            raise ValueError(
                f"latent: patches of {self.patch}x{self.patch} do not divide {z.shape}; height "
                f"and width must be multiples of {self.patch}"
            )
        p = self.patch
        return rearrange(z, "... (h p) (w q) c -> ... h w (c p q)", p=p, q=p)

    def _check_packed(self, z: Array) -> None:
        if self.patch > 1 and (len(z.shape) < 3 or z.shape[-1] % self.patch**2):
            raise ValueError(
                f"latent: {z.shape} is not packed; the last of at least three axes must be a "
                f"multiple of {self.patch**2}"
            )

    def _unpacked(self, z: Array) -> Array:
        if self.patch == 1:
            return z
        p = self.patch
        return rearrange(z, "... h w (c p q) -> ... (h p) (w q) c", p=p, q=p)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        mean = np.asarray(self.mean or self.shift, np.float32)
        return mean, np.asarray(self.scaling / np.asarray(self.std or 1.0), np.float32)
