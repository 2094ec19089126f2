"""What an encoder gives: a posterior over latents, and the units that a diffusion model wants."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
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

    Attributes:
      scaling, shift: numbers for all channels.
      mean, std: one number per channel; empty for none. They replace the shift.

    Raises:
      ValueError: a scaling or std that is not positive, only one of mean and std, or both a
        mean and a shift.
    """

    scaling: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

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

    def normalise(self, z: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """To the units of a diffusion model."""
        mean, factor = self._affine()
        return (z - mean) * factor

    def denormalise(self, z: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Back to the units that the decoder takes."""
        mean, factor = self._affine()
        return z / factor + mean

    def check(self, channels: int) -> None:
        """Raises ValueError unless there are no means, or one per channel."""
        if self.mean and len(self.mean) != channels:
            raise ValueError(f"latent: {len(self.mean)} means for {channels} latent channels")

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        mean = np.asarray(self.mean or self.shift, np.float32)
        return mean, np.asarray(self.scaling / np.asarray(self.std or 1.0), np.float32)
