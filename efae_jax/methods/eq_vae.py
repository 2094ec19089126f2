"""EQ-VAE: a KL autoencoder whose decoded, transformed latents are the transformed images."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from efae_jax import groups, losses
from efae_jax.convert.perceptual import read_lpips
from efae_jax.errors import UserError
from efae_jax.methods.base import Batch, Context, Method, Outcome, Params, to_float
from efae_jax.models.build import build_autoencoder, compute_dtype
from efae_jax.models.discriminators import PatchGAN, initial_statistics
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS

REGULARISERS = ("eq", "scale", "none")
THREE_SCALES = (1 / 4, 1 / 2, 3 / 4)  # of `uniform_sample_scale` False


class Plan(NamedTuple):
    """What a step does, and at which sides.

    Attributes:
      branch: "plain": autoencode the images; "prior": autoencode them scaled; "equivariance":
        decode scaled and turned latents; "scale": autoencode, and decode scaled latents, too.
      height, width: of the latents that are decoded (of the scaled ones, in "scale").
    """

    branch: str
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.branch}, latent {self.height}x{self.width}"


class EQVAE(Method):
    """Trains a KL autoencoder with LPIPS and a PatchGAN, under one of two regularisers, or none.

    `config.regulariser`:

    - "eq" (Kouzelis et al. 2025, arXiv:2502.09509). A step in the equivariance branch draws
      z ~ q(z | x) and compares decode(s g z) with s g x: a scale s for the whole batch, and for
      every example an element g, not the identity, of the group (`config.group`; rotations
      unless told otherwise). With probability `config.eq.p_prior` a step preserves the prior
      instead: it autoencodes the images, with probability `p_prior_s` scaled by s first.
    - "scale" (Skorokhodov et al. 2025, arXiv:2502.14831). Every step autoencodes the images and
      adds `config.scale.weight` times the reconstruction loss, per number of an image, of
      decode(s z) against s x, with 1 / s one of `config.scale.factors`.
    - "none": the plain autoencoder; the control.

    Scales are m / n of a latent of n positions a side, so that all sides are whole. Branch and
    scale follow from (seed, step) and are the same on all processes; g from (seed, step,
    example). The original draws k of its rotation by k x 90 degrees once per batch, and draws
    everything anew for the discriminator and for every part of an accumulated batch; here the
    discriminator sees what the autoencoder decoded. The original's readme calls `p_prior` the
    probability of prior preservation, as here; its code takes it for that of the equivariance
    branch. At the published 0.5 they agree.

    The loss of latent-diffusion: with e_B the sum over an image's numbers of |x - x'| + LPIPS,

        e_B exp(-logvar) + count logvar + kl KL(q(z | x) || N(0, 1)) - w mean D(x')

    where w = `config.loss.gan` x `losses.adaptive_weight` at the kernel of the decoder's last
    convolution. The original leaves logvar at its start, 0; `config.loss.learn_logvar` trains
    it, as a player of its own (`config.optim_logvar`). The discriminator minimises the halved
    hinge loss.

    Raises:
      UserError: for what does not fit; one line.
    """

    def __init__(self, config: Any):
        _check(config)
        self.config, self.autoencoder = config, build_autoencoder(config)
        model, dtype, loss = self.autoencoder, compute_dtype(config.dtype), config.loss
        if model.shrink != 1 or model.upscale != 1:
            raise UserError(
                "config.method='eq_vae' needs a decoder that returns the encoder's sides: "
                "config.model.shrink=1 and no longer decoder_widths"
            )
        if any(side % model.factor for side in config.data.size):
            height, width = config.data.size
            raise UserError(
                f"config.data.size={height}x{width}: both sides must be multiples of the "
                f"encoder's factor {model.factor}"
            )
        self.whole = tuple(side // model.factor for side in config.data.size)
        self.chosen = _scales(config, self.whole)
        # Unscaled images are those of the plain branch.
        self.p_prior_s = 0 if self.chosen == [self.whole] else config.eq.p_prior_s
        if loss.lpips:
            self.lpips = Net(lambda rngs: LPIPS("vgg", rngs=rngs, dtype=dtype))
            self.frozen = {"lpips": self.lpips.abstract}
        if loss.learn_logvar:
            self.players += ("logvar",)
        if loss.gan:
            self.players += ("discriminator",)
            channels = config.data.channels
            self.discriminator = Net(lambda rngs: PatchGAN(channels, rngs=rngs, dtype=dtype))

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """{"autoencoder"}, and "logvar" and "discriminator" if there are such players."""
        autoencoder_key, discriminator_key = jax.random.split(key)
        params = {"autoencoder": self.autoencoder.init(autoencoder_key)}
        if "logvar" in self.players:
            params["logvar"] = {"value": jnp.float32(self.config.loss.logvar)}
        if "discriminator" in self.players:
            params["discriminator"] = self.discriminator.init(discriminator_key)
        return params

    def init_variables(self) -> Params:
        """The running statistics of the discriminator's batch norm, if there is one."""
        if "discriminator" not in self.players:
            return {}
        return {"discriminator": initial_statistics(self.discriminator.abstract)}

    def load_frozen(self) -> Params:
        """LPIPS' weights, if it is on."""
        if "lpips" not in self.frozen:
            return {}
        return {"lpips": read_lpips("vgg", self.config.loss.perceptual_weights or None)}

    def plan(self, step: int) -> Plan:
        """Branch and sides of a step."""
        config, random = self.config, np.random.default_rng((self.config.seed, step))
        if config.regulariser == "none":
            return Plan("plain", *self.whole)
        if config.regulariser == "scale":
            return Plan("scale", *_pick(random, self.chosen))
        if random.random() >= config.eq.p_prior:
            sides = _pick(random, self.chosen)
            if config.eq.anisotropic:
                sides = (sides[0], _pick(random, self.chosen)[1])
            return Plan("equivariance", *sides)
        if random.random() < self.p_prior_s:
            return Plan("prior", *_pick(random, self.chosen))
        return Plan("plain", *self.whole)

    def plans(self) -> tuple[Plan, ...]:
        """All that may come up."""
        config, eq = self.config, self.config.eq
        if config.regulariser == "none":
            return (Plan("plain", *self.whole),)
        if config.regulariser == "scale":
            return tuple(Plan("scale", *sides) for sides in self.chosen)
        found = []
        if eq.p_prior < 1:
            turned = self.chosen
            if eq.anisotropic:
                turned = [(a, b) for a, _ in self.chosen for _, b in self.chosen]
            found += [Plan("equivariance", *sides) for sides in turned]
        if eq.p_prior * self.p_prior_s > 0:
            found += [Plan("prior", *sides) for sides in self.chosen]
        if eq.p_prior * (1 - self.p_prior_s) > 0:
            found.append(Plan("plain", *self.whole))
        return tuple(dict.fromkeys(found))

    def plans_to_check(self) -> tuple[Plan, ...]:
        """The smallest sides of every branch: what does not fit, does not fit there."""
        smallest: dict[str, Plan] = {}
        for plan in self.plans():
            known = smallest.setdefault(plan.branch, plan)
            if plan[1:] < known[1:]:
                smallest[plan.branch] = plan
        return tuple(smallest.values())

    def loss(
        self,
        player: str,
        params: dict[str, Params],
        batch: Batch,
        keys_B: PRNGKeyArray,
        context: Context,
    ) -> Outcome:
        """The player's loss, as in the class's docstring."""
        if player == "autoencoder":
            return self._autoencoder_loss(params, batch, keys_B, context)
        if player == "logvar":
            value, count = params["logvar"]["value"], self._count(context.plan)
            loss_B = losses.gaussian_nll(context.passed["error"], value, count)
            return Outcome(loss_B, {"value": value}, context.variables, {})
        return self._discriminator_loss(params, context)

    def _autoencoder_loss(
        self, params: dict[str, Params], batch: Batch, keys_B: PRNGKeyArray, context: Context
    ) -> Outcome:
        config, model, plan = self.config.loss, self.autoencoder, context.plan
        own, count = params["autoencoder"], self._count(context.plan)
        logvar = params["logvar"]["value"] if "logvar" in self.players else config.logvar
        x_BHWC, z_BhwC, kl_B, target_BHWC = self._transformed(own, batch, keys_B, plan)

        h_BHWD = model.decoder_features(own, z_BhwC)
        decoded_BHWC = model.last_layer(own, h_BHWD)

        # The gradients at the decoded images are taken first, each once: their norms at the last
        # layer weigh them, and their sum goes back through the decoder.
        def nll(image: Array) -> tuple[Array, Any]:
            error_B, parts = self._error(context.frozen, target_BHWC, image)
            nll_B = losses.gaussian_nll(error_B, logvar, count)
            return nll_B.mean(), (nll_B, error_B, parts)

        decoded = jax.lax.stop_gradient(decoded_BHWC)
        (_, (nll_B, error_B, parts)), gradient = jax.value_and_grad(nll, has_aux=True)(decoded)
        loss_B, passed = nll_B + config.kl * kl_B, {}
        metrics = {"nll": nll_B, "reconstruction": error_B / count, "kl": kl_B, **parts}
        if "discriminator" in self.players:

            def gan(image: Array) -> tuple[Array, Array]:
                statistics = context.variables["discriminator"]
                logits, _ = self.discriminator(
                    params["discriminator"], image, statistics, training=True
                )
                gan_B = losses.generator_loss(logits, "hinge")
                return gan_B.mean(), gan_B

            (_, gan_B), adversarial = jax.value_and_grad(gan, has_aux=True)(decoded)
            started = (context.step >= config.gan_start).astype(jnp.float32)
            weight = config.gan * losses.adaptive_weight(
                *self._at_last_layer(own, h_BHWD, (gradient, adversarial))
            )
            gradient += started * weight * adversarial
            loss_B += started * weight * gan_B
            metrics |= {"gan": gan_B, "weight": weight}
            passed |= {"target": target_BHWC, "decoded": decoded}
        if "logvar" in self.players:
            passed["error"] = error_B
        loss_B += losses.carry_gradient(decoded_BHWC, len(gradient) * gradient)
        if plan.branch == "scale":
            scaled_B = self._scale_loss(own, context.frozen, x_BHWC, z_BhwC, plan)
            metrics["scaled"] = scaled_B
            loss_B += self.config.scale.weight * losses.gaussian_nll(scaled_B * count, logvar, 0)
        return Outcome(loss_B, metrics, context.variables, passed)

    def _transformed(
        self, own: Params, batch: Batch, keys_B: PRNGKeyArray, plan: Plan
    ) -> tuple[Array, Array, Array, Array]:
        """(images as encoded, latents to decode, KL, targets) of a step's branch."""
        model, resampling = self.autoencoder, self.config.resampling
        sample_keys, g_keys = jax.vmap(lambda k: jax.random.split(k, 2), out_axes=1)(keys_B)
        x_BHWC = to_float(batch["image"])
        if plan.branch == "prior":
            x_BHWC = groups.scale(x_BHWC, self._pixels(plan), resampling)
        posterior = model.posterior(own, x_BHWC)
        z_BhwC, target_BHWC = model.clip(posterior.sample_each(sample_keys)), x_BHWC
        if plan.branch == "equivariance":
            # Turning first keeps the sides of a step fixed whatever g is. Both orders agree:
            # scaling to (a, b) and then turning is turning and then scaling to (b, a).
            g_B = groups.random_elements(model.group, g_keys, identity=False)
            z_BhwC, target_BHWC = model.act(own, g_B, z_BhwC), model.act_image(g_B, x_BHWC)
            z_BhwC = groups.scale(z_BhwC, (plan.height, plan.width), resampling)
            target_BHWC = groups.scale(target_BHWC, self._pixels(plan), resampling)
        return x_BHWC, z_BhwC, posterior.kl(), target_BHWC

    def _error(
        self, frozen: Params, target_BHWC: Array, image_BHWC: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        """Sum over an image's numbers of |x - x'| + LPIPS, and the parts' means."""
        count = math.prod(image_BHWC.shape[1:])
        l1_B = jnp.abs(target_BHWC - image_BHWC).mean(axis=(1, 2, 3))
        if not self.config.loss.lpips:
            return count * l1_B, {"l1": l1_B}
        lpips_B = self.lpips(frozen["lpips"], image_BHWC, target_BHWC)
        error_B = count * (l1_B + self.config.loss.lpips * lpips_B)
        return error_B, {"l1": l1_B, "lpips": lpips_B}

    def _scale_loss(
        self, own: Params, frozen: Params, x_BHWC: Array, z_BhwC: Array, plan: Plan
    ) -> Float[Array, " B"]:
        """Mean over an image's numbers of |s x - decode(s z)| + LPIPS."""
        z = groups.scale(z_BhwC, (plan.height, plan.width), self.config.resampling)
        target = groups.scale(x_BHWC, self._pixels(plan), self.config.resampling)
        error_B, _ = self._error(frozen, target, self.autoencoder.decode(own, z))
        return error_B / math.prod(target.shape[1:])

    def _at_last_layer(
        self, own: Params, h_BHWD: Array, gradients: tuple[Array, ...]
    ) -> list[Float[Array, "3 3 D c"]]:
        """Gradients at the decoded images, taken back to the last convolution's kernel."""
        decoder = own["decoder"]

        def decoded(kernel: Array) -> Array:
            last = decoder["conv_out"] | {"kernel": kernel}
            return self.autoencoder.last_layer({"decoder": decoder | {"conv_out": last}}, h)

        h = jax.lax.stop_gradient(h_BHWD)
        _, pull = jax.vjp(decoded, jax.lax.stop_gradient(decoder["conv_out"]["kernel"]))
        return [pull(g)[0] for g in gradients]

    def _discriminator_loss(self, params: dict[str, Params], context: Context) -> Outcome:
        own, statistics = params["discriminator"], context.variables["discriminator"]
        real, statistics = self.discriminator(
            own, context.passed["target"], statistics, training=True
        )
        fake, statistics = self.discriminator(
            own, context.passed["decoded"], statistics, training=True
        )
        loss_B = losses.discriminator_loss(real, fake, "hinge", halved=True)
        started = (context.step >= self.config.loss.gan_start).astype(jnp.float32)
        metrics = {
            "logit_real": real.mean(),
            "logit_fake": fake.mean(),
            "accuracy": losses.discriminator_accuracy(real, fake),
        }
        variables = context.variables | {"discriminator": statistics}
        return Outcome(started * loss_B, metrics, variables, {})

    def _pixels(self, plan: Plan) -> tuple[int, int]:
        return plan.height * self.autoencoder.factor, plan.width * self.autoencoder.factor

    def _count(self, plan: Plan) -> int:
        """Numbers in a decoded image."""
        sides = plan._replace(height=self.whole[0], width=self.whole[1])
        sides = self._pixels(sides if plan.branch == "scale" else plan)
        return math.prod(sides) * self.config.data.channels


def _pick(random: np.random.Generator, sides: list[tuple[int, int]]) -> tuple[int, int]:
    return sides[random.integers(len(sides))]


def _scales(config: Any, whole: tuple[int, int]) -> list[tuple[int, int]]:
    """The sides of scaled latents that steps choose from, rising."""
    cell = math.gcd(*whole)  # scales are m / cell: both sides are then whole

    def sides(m: int) -> tuple[int, int]:
        return m * whole[0] // cell, m * whole[1] // cell

    if config.regulariser == "none":
        return [whole]
    if config.regulariser == "scale":
        factors = tuple(config.scale.factors)
        if not factors or any(f < 2 or f != int(f) or cell % f for f in factors):
            raise UserError(
                f"config.scale.factors={factors}: each must be at least 2 and divide a latent of "
                f"{whole[0]}x{whole[1]}"
            )
        return [sides(cell // int(f)) for f in sorted(factors, reverse=True)]
    eq = config.eq
    if eq.min_scale == 1:
        if config.group.name == "trivial":
            raise UserError(
                "config.group.name='trivial' with config.eq.min_scale=1 transforms nothing; "
                "config.regulariser='none' is the plain autoencoder"
            )
        return [whole]
    if eq.uniform_sample_scale:
        # A scale that gives a whole side may miss it by rounding.
        chosen = list(range(max(1, math.ceil(eq.min_scale * cell - 1e-9)), cell))
    else:
        chosen = [round(s * cell) for s in THREE_SCALES if s >= eq.min_scale and s * cell % 1 == 0]
    if not chosen:
        raise UserError(
            f"config.eq.min_scale={eq.min_scale}: a latent of {whole[0]}x{whole[1]} has no smaller "
            "side from there on; 1 scales nothing"
        )
    if 0 < eq.scale_buckets < len(chosen):
        places = np.linspace(0, len(chosen) - 1, eq.scale_buckets) if eq.scale_buckets > 1 else [
            len(chosen) // 2
        ]  # fmt: skip
        chosen = [chosen[round(place)] for place in places]
    return [sides(m) for m in chosen]


def _check(config: Any) -> None:
    eq, loss = config.eq, config.loss
    if config.model.kind != "kl":
        raise UserError(
            f"config.method='eq_vae' trains models of config.model.kind='kl', not "
            f"{config.model.kind!r}"
        )
    choices = (
        ("regulariser", config.regulariser, REGULARISERS),
        ("resampling", config.resampling, groups.RESAMPLINGS),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"config.{name}={value!r} is not one of {', '.join(allowed)}")
    for name in ("p_prior", "p_prior_s"):
        if not 0 <= eq[name] <= 1:
            raise UserError(f"config.eq.{name}={eq[name]} must be from 0 to 1")
    if not 0 < eq.min_scale <= 1:
        raise UserError(f"config.eq.min_scale={eq.min_scale} must be above 0 and at most 1")
    least = {f"loss.{name}": loss[name] for name in ("lpips", "kl", "gan", "gan_start")}
    least |= {"eq.scale_buckets": eq.scale_buckets, "scale.weight": config.scale.weight}
    for name, value in least.items():
        if not value >= 0:
            raise UserError(f"config.{name}={value} must be at least 0")
