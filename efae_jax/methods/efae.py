"""EFAE: an encoder trained end to end with a flow decoder on -log p(g x | rho(g) z)."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from efae_jax import flow, groups, losses
from efae_jax.errors import UserError
from efae_jax.methods.base import Batch, Context, Method, Outcome, Params, to_float
from efae_jax.methods.by_time import by_time
from efae_jax.methods.noise import NOISE_KINDS, perturb
from efae_jax.models.build import build_flow_autoencoder


class EFAE(Method):
    """Minimises E over x, g, z = E(x) of -log p(g x | rho(g) z).

    The encoder sees x, never g x; g is uniform over the group, one element per example.
    -log p is bounded by the flow-matching loss (`flow.matching_loss`). The latent is
    regularised on its way to the decoder (`perturb`), and by `penalty` x mean z^2.

    With `config.group.in_objective` False, g stays the identity: the control.
    """

    def __init__(self, config: Any):
        if config.model.kind != "flow":
            raise UserError(
                f"config.method='efae' trains a model of kind 'flow', not {config.model.kind!r}"
            )
        self.autoencoder = build_flow_autoencoder(config)
        self.config = config
        if config.flow.time not in flow.TIME_DENSITIES:
            raise UserError(
                f"config.flow.time={config.flow.time!r} is not one of "
                f"{', '.join(flow.TIME_DENSITIES)}"
            )
        if not 0 <= config.flow.drop_rate < 1:
            raise UserError(f"config.flow.drop_rate={config.flow.drop_rate} must be in [0, 1)")
        for name in ("noise_size", "penalty"):
            if config.latent[name] < 0:
                raise UserError(f"config.latent.{name}={config.latent[name]} must be at least 0")
        if config.latent.noise not in NOISE_KINDS:
            raise UserError(
                f"config.latent.noise={config.latent.noise!r} is not one of "
                f"{', '.join(NOISE_KINDS)}"
            )

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """{"autoencoder": {"encoder", "velocity", and "basis" of a learned representation}}."""
        return {"autoencoder": self.autoencoder.init(key)}

    def loss(
        self,
        player: str,
        params: dict[str, Params],
        batch: Batch,
        keys_B: PRNGKeyArray,
        context: Context,
    ) -> Outcome:
        """Flow-matching loss of g x given rho(g) z, plus penalty x mean z^2, per example."""
        del player  # there is one
        config, model = self.config, self.autoencoder
        params = params["autoencoder"]
        x_BHWC = to_float(batch["image"])
        g_keys, noise_keys, time_keys, drop_keys, latent_keys = jax.vmap(
            lambda k: jax.random.split(k, 5), out_axes=1
        )(keys_B)

        z = model.encode(params, x_BHWC)
        squares_B = losses.latent_penalty(z)
        z = perturb(latent_keys, z, config.latent.noise, config.latent.noise_size)
        z = flow.drop(drop_keys, z, config.flow.drop_rate)
        if config.group.in_objective:
            g_B = groups.random_elements(model.group, g_keys)
            x_BHWC, z = model.act_image(g_B, x_BHWC), model.act(params, g_B, z)

        noise_BHWC = jax.vmap(lambda k: jax.random.normal(k, x_BHWC.shape[1:]))(noise_keys)
        t_B = jax.vmap(
            lambda k: flow.sample_time(
                k, config.flow.time, config.flow.time_loc, config.flow.time_scale
            )
        )(time_keys)
        matching_B = flow.matching_loss(model.field(params, z), x_BHWC, noise_BHWC, t_B)
        loss_B = matching_B + config.latent.penalty * squares_B
        metrics = {"flow": matching_B, "latent_square": squares_B}
        metrics |= by_time("flow", matching_B, t_B)
        return Outcome(loss_B, metrics, context.variables, {})
