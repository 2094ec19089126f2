"""An autoencoder whose decoder is a conditional flow, with a group acting on its latents."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from efae_jax import flow, groups, sampling
from efae_jax.models.acted_latent import ActedLatent
from efae_jax.models.functional import Net, Params
from efae_jax.models.latent import Normalisation, Posterior


class FlowAutoencoder(ActedLatent):
    """Encoder E, velocity field v(x_t, t, z), and a representation rho of a group on latents.

    Parameters are a plain tree: {"encoder": ..., "velocity": ...} and, for a learned
    representation Q rho Q^T, {"basis": the unconstrained matrix that gives Q}.

    Args:
      encoder: images x[B,H,W,c] to latents z[B,h,w,C] or z[B,C].
      velocity: (x_t[B,H,W,c], t[B], z) to dx_t/dt.
      representation: of the group, on the C channels of the latent.
      learned: None, or how Q comes from the free matrix: "cayley" or "expm".
      clamp: limit of the latent's absolute value, or None.
      normalisation: to the units of a diffusion model.
      factor: image side / latent side; None for a latent without positions.
    """

    is_flow = True
    upscale = 1

    def __init__(
        self,
        encoder: Net,
        velocity: Net,
        representation: groups.Representation,
        learned: str | None = None,
        clamp: float | None = None,
        normalisation: Normalisation | None = None,
        factor: int | None = None,
    ):
        super().__init__(representation, clamp, normalisation)
        self.encoder, self.velocity_net = encoder, velocity
        self.learned, self.factor = learned, factor

    def init(self, key: PRNGKeyArray) -> Params:
        """Draws the parameters; jit it."""
        encoder_key, velocity_key, basis_key = jax.random.split(key, 3)
        params = {
            "encoder": self.encoder.init(encoder_key),
            "velocity": self.velocity_net.init(velocity_key),
        }
        if self.learned:
            shape = (self.representation.channels,) * 2
            params["basis"] = 0.02 * jax.random.normal(basis_key, shape)
        return params

    def views(self, x: Float[Array, "B H W c"]) -> tuple[Array, Array]:
        """What the encoder takes and what the decoder should return: both are the image."""
        return x, x

    def posterior(self, params: Params, x: Float[Array, "B H W c"]) -> Posterior:
        """All mass on the latent: the encoder is deterministic."""
        return Posterior(self.encode(params, x))

    def encode(self, params: Params, x: Float[Array, "B H W c"]) -> Float[Array, "B ..."]:
        """z = E(x), for pixels in [-1, 1], clamped if the model says so."""
        return self.clip(self.encoder(params["encoder"], x))

    def matrices(self, params: Params) -> Float[Array, "G C C"]:
        """rho(g) for every element: fixed, or Q rho(g) Q^T with the learned Q."""
        if not self.learned:
            return self.representation.matrices
        basis = groups.orthogonal(params["basis"], self.learned)
        return groups.change_basis(self.representation.matrices, basis)

    @staticmethod
    def decode_options(config: Any) -> dict[str, Any]:
        """How `config.eval` asks to decode: the flow's steps, solver and guidance."""
        if config.steps < 1:
            raise ValueError(f"config.eval.steps={config.steps} must be at least 1")
        return {"steps": config.steps, "solver": config.solver, "guidance": config.guidance}

    def velocity(self, params: Params, x: Array, t_B: Array, z: Array) -> Array:
        """dx_t/dt at x_t = x, given the latent z."""
        return self.velocity_net(params["velocity"], x, t_B, z)

    def field(self, params: Params, z: Array, guidance: float = 1.0) -> flow.Velocity:
        """The velocity as a function of (x, t) alone, guided by `guidance`."""
        return flow.guided(lambda x, t, c: self.velocity(params, x, t, c), z, guidance)

    def decode(
        self,
        params: Params,
        z: Float[Array, "B ..."],
        noise: Float[Array, "B H W c"],
        *,
        steps: int,
        solver: str = "euler",
        guidance: float = 1.0,
        trajectory: bool = False,
    ) -> Any:
        """A sample of p(x | z): the flow carries `noise` to an image.

        Transforming the noise along with the latent, decode(rho(g) z, g e), is what an
        equivariant field turns into g decode(z, e).

        Returns:
          images, not clipped to [-1, 1]; with `trajectory`, (images, the N + 1 states).
        """
        field = self.field(params, z, guidance)
        return sampling.sample(field, noise, steps, solver, trajectory)
