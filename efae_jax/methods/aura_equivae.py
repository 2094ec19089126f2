"""AuraEquiVAE: a convolutional autoencoder on which the flips act, by perceptual and GAN losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from efae_jax import groups, losses, recipes
from efae_jax.convert.perceptual import read_lpips, read_vgg16
from efae_jax.errors import UserError
from efae_jax.methods.base import (
    JUDGES_PRECISION,
    Batch,
    Context,
    Method,
    Outcome,
    Params,
    to_float,
)
from efae_jax.methods.noise import NOISE_KINDS, perturb
from efae_jax.models.build import build_autoencoder
from efae_jax.models.discriminators import VGG_FORMS, VGGPatchDiscriminator, trunk_stages
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS

GRADIENTS = ("none", "elementwise", "global")
RECONSTRUCTIONS = {
    "none": None,
    "pooled": losses.pooled_l1,
    "low_pass": losses.heatmap_l1,
    "l1": lambda target, x: jnp.mean(jnp.abs(target - x), axis=(1, 2, 3)),
}
FLIPS = groups.group("z2xz2")
# Small windows teach the decoder little: the original takes at least 12 of 32 positions a side.
SMALLEST_WINDOW = 3 / 8


class Window(NamedTuple):
    """The sides of the part of a latent that a step decodes, in positions."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"latent window {self.height}x{self.width}"


class AuraEquiVAE(Method):
    """Trains decode(rho(g) E(x)) towards g x under LPIPS, a GAN loss and an L1 term.

    A step: z = clamp(E(x)); noise on z; for every example an element g of the group (for
    Z2 x Z2: each flip with probability 1/2) on latent and target; with probability
    `config.crop.rate` a random window of latent and target, its side the same for the whole
    batch; decode. Every loss's gradient with respect to the decoded image may be normalised
    (`losses.normalise_gradient`), which sets the terms' strengths by their weights alone.
    Then the discriminator learns from the same decoded images.

    The released program does not clear the discriminator's gradient behind the autoencoder's
    backward pass, so that its discriminator minimises the autoencoder's GAN loss as well, without
    any normalisation: `config.loss.gan_in_discriminator` times max(0, D(x) - D(x') - 0.1), D(x)
    constant, from `gan_start` on. The term lifts the logits of decodings, and both logits drift
    up. The later program clears it.

    The original draws g once per batch; here it is drawn per example. The later program updates
    the discriminator first, so that the autoencoder sees the new one, and LeCam's anchors before
    its loss; here the autoencoder comes first, and the anchors are those of the step before, as
    both gradients of the released program are of the old weights. LPIPS and the discriminator
    compute in float32 whatever `config.dtype` is, as the original's: a normalised gradient would
    lift their rounding to its own size.

    `config.loss.recipe` names one of the original's recipes (`recipes.RECIPES`), or is "custom".
    With `config.group.in_objective` False, g stays the identity: the control.

    Raises:
      UserError: for a mix of recipes, and for what does not fit; all of it in one line.
    """

    def __init__(self, config: Any):
        self.config, self.autoencoder = config, build_autoencoder(config)
        _check(config)
        model, loss = self.autoencoder, config.loss
        cell = model.shrink * model.factor
        if any(side % cell for side in config.data.size):
            height, width = config.data.size
            raise UserError(
                f"config.data.size={height}x{width}: both sides must be multiples of {cell}, the "
                "encoder's factor times config.model.shrink"
            )
        self.whole = Window(*(side // cell for side in config.data.size))
        sides = config.crop.sides if config.crop.rate else ()
        self.windows = tuple(_window(fraction, self.whole) for fraction in sides)
        if loss.lpips:
            self.lpips = Net(lambda rngs: LPIPS("vgg", rngs=rngs), precision=JUDGES_PRECISION)
            self.frozen = {"lpips": self.lpips.abstract}
        if loss.gan:
            self.players = ("autoencoder", "discriminator")
            self.discriminator = Net(
                lambda rngs: VGGPatchDiscriminator(loss.discriminator, rngs=rngs),
                precision=JUDGES_PRECISION,
            )

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """{"autoencoder", and "discriminator" if there is a GAN loss}."""
        autoencoder_key, discriminator_key = jax.random.split(key)
        params = {"autoencoder": self.autoencoder.init(autoencoder_key)}
        if "discriminator" in self.players:
            params["discriminator"] = self.discriminator.init(discriminator_key)
        return params

    def init_variables(self) -> Params:
        """LeCam's anchors, if it is on."""
        if not self.config.loss.lecam:
            return {}
        return {"anchors": {"real": jnp.zeros(()), "fake": jnp.zeros(())}}

    def load_frozen(self) -> Params:
        """LPIPS' weights, if it is on."""
        if "lpips" not in self.frozen:
            return {}
        return {"lpips": read_lpips("vgg", self.config.loss.perceptual_weights or None)}

    def load_pretrained(self) -> dict[str, Params]:
        """The discriminator's trunk starts as the classifier VGG16."""
        if "discriminator" not in self.players:
            return {}
        stages = trunk_stages(self.config.loss.discriminator)
        trunk = read_vgg16(self.config.loss.perceptual_weights or None, stages)
        return {"discriminator": {"trunk": trunk}}

    def plan(self, step: int) -> Window:
        """The window of a step: the whole latent, or one of `config.crop.sides`."""
        random = np.random.default_rng((self.config.seed, step))
        if random.random() >= self.config.crop.rate:
            return self.whole
        return self.windows[random.integers(len(self.windows))]

    def plans(self) -> tuple[Window, ...]:
        """The whole latent, and every window if windows are taken."""
        return (self.whole, *self.windows) if self.config.crop.rate else (self.whole,)

    def loss(
        self,
        player: str,
        params: dict[str, Params],
        batch: Batch,
        keys_B: PRNGKeyArray,
        context: Context,
    ) -> Outcome:
        """The sum of the player's terms, times their weights."""
        if player == "discriminator":
            return self._discriminator_loss(params, context)
        return self._autoencoder_loss(params, batch, keys_B, context)

    def _autoencoder_loss(
        self, params: dict[str, Params], batch: Batch, keys_B: PRNGKeyArray, context: Context
    ) -> Outcome:
        config, model = self.config.loss, self.autoencoder
        own = params["autoencoder"]
        g_keys, latent_keys, window_keys, flip_keys = jax.vmap(
            lambda k: jax.random.split(k, 4), out_axes=1
        )(keys_B)
        x_BHWC, target_BHWC = model.views(to_float(batch["image"]))
        clean_BhwC = model.encode(own, x_BHWC)
        penalty_B = losses.latent_penalty(clean_BhwC)
        latent = self.config.latent
        z_BhwC = perturb(latent_keys, clean_BhwC, latent.noise, latent.noise_size)
        if self.config.group.in_objective:
            g_B = groups.random_elements(model.group, g_keys)
            z_BhwC, target_BHWC = model.act(own, g_B, z_BhwC), model.act_image(g_B, target_BHWC)
        z_BhwC, target_BHWC = cut(window_keys, z_BhwC, target_BHWC, context.plan)
        decoded_BHWC = model.decode(own, z_BhwC)

        loss_B, metrics = latent.penalty * penalty_B, {"latent_square": penalty_B}

        def add(name: str, term: Any, weight: Float[Array, ""] | float) -> None:
            """Adds weight x term(decoded image), with the gradient normalised."""
            nonlocal loss_B
            if config.gradient == "none":
                metrics[name] = term(decoded_BHWC)
                loss_B = loss_B + weight * metrics[name]
                return
            # The weight comes after the normalisation, whose epsilon is meant for the plain term.
            metrics[name] = term(losses.normalise_gradient(decoded_BHWC, config.gradient, weight))
            others = jax.lax.stop_gradient((weight - 1) * metrics[name])
            loss_B = loss_B + metrics[name] + others

        if config.lpips:

            def lpips(image: Array) -> Array:
                pair = image, target_BHWC
                if config.augment:  # both images alike
                    flip_B = groups.random_elements(FLIPS, flip_keys)
                    pair = (groups.act_image(FLIPS, flip_B, x) for x in pair)
                return self.lpips(context.frozen["lpips"], *pair)

            add("lpips", lpips, config.lpips)
        if config.reconstruction != "none":
            reconstruction = RECONSTRUCTIONS[config.reconstruction]
            add(
                "reconstruction",
                lambda image: reconstruction(target_BHWC, image),
                config.reconstruction_weight,
            )
        passed = {}
        if config.gan:

            def gan(image: Array) -> Array:
                fake = self.discriminator(params["discriminator"], image)
                real = None
                if config.gan_loss == "thresholded":
                    real = self.discriminator(params["discriminator"], target_BHWC)
                return losses.generator_loss(fake, config.gan_loss, real)

            add("gan", gan, config.gan * self._started(context))
            passed = {"target": target_BHWC, "decoded": jax.lax.stop_gradient(decoded_BHWC)}
        statistics = losses.latent_statistics(jax.lax.stop_gradient(clean_BhwC))
        metrics |= {f"latent_{name}": value for name, value in statistics.items()}
        return Outcome(loss_B, metrics, context.variables, passed)

    def _discriminator_loss(self, params: dict[str, Params], context: Context) -> Outcome:
        config = self.config.loss
        real = self.discriminator(params["discriminator"], context.passed["target"])
        fake = self.discriminator(params["discriminator"], context.passed["decoded"])
        loss_B = losses.discriminator_loss(
            real, fake, config.discriminator_loss, halved=config.halved
        )
        metrics = {
            "logit_real": real.mean(),
            "logit_fake": fake.mean(),
            "accuracy": losses.discriminator_accuracy(real, fake),
        }
        if config.gan_in_discriminator:
            metrics["gan"] = losses.generator_loss(fake, config.gan_loss, real)
            weight = config.gan_in_discriminator * self._started(context)
            loss_B = loss_B + weight * metrics["gan"]
        variables = context.variables
        if config.lecam:
            # Against the anchors as the steps before this one left them.
            metrics["lecam"] = losses.lecam(real, fake, variables["anchors"])
            loss_B = loss_B + config.lecam * metrics["lecam"]
            anchors = losses.update_anchors(variables["anchors"], real, fake)
            variables = variables | {"anchors": anchors}
        return Outcome(loss_B, metrics, variables, {})

    def _started(self, context: Context) -> Float[Array, ""]:
        """Whether the autoencoder hears the discriminator: 0 or 1."""
        return (context.step >= self.config.loss.gan_start).astype(jnp.float32)


def cut(
    keys_B: PRNGKeyArray,
    z_BhwC: Float[Array, "B h w C"],
    x_BHWC: Float[Array, "B H W c"],
    window: Window,
) -> tuple[Float[Array, "B n m C"], Float[Array, "B N M c"]]:
    """A window of every latent, anywhere in it, and the part of the image that belongs to it.

    Args:
      keys_B: of the places.
      z_BhwC, x_BHWC: latents and images; H / h = W / w is whole.
      window: (n, m), in positions of the latent.
    """
    height, width = z_BhwC.shape[1:3]
    if window == (height, width):
        return z_BhwC, x_BHWC
    scale = x_BHWC.shape[1] // height

    def one(key: PRNGKeyArray, z: Array, x: Array) -> tuple[Array, Array]:
        last = jnp.array([height - window.height, width - window.width])
        row, column = jax.random.randint(key, (2,), 0, last + 1)
        part = jax.lax.dynamic_slice(z, (row, column, 0), (*window, z.shape[-1]))
        sides = window.height * scale, window.width * scale
        image = jax.lax.dynamic_slice(x, (row * scale, column * scale, 0), (*sides, x.shape[-1]))
        return part, image

    return jax.vmap(one)(keys_B, z_BhwC, x_BHWC)


def _window(fraction: float, sides: Window) -> Window:
    window = Window(*(round(fraction * side) for side in sides))
    whole = all(abs(fraction * s - n) < 1e-6 for s, n in zip(sides, window, strict=True))
    if not SMALLEST_WINDOW <= fraction < 1 or not whole:
        raise UserError(
            f"config.crop.sides: {fraction} of a latent of {sides[0]}x{sides[1]} is not allowed; "
            f"it must be from {SMALLEST_WINDOW} to below 1 and give whole positions; "
            "config.crop.rate=0 takes no windows"
        )
    return window


def _check(config: Any) -> None:
    loss, latent = config.loss, config.latent
    if config.model.kind == "flow":
        raise UserError("config.method='aura_equivae' needs a convolutional model, not a flow")
    choices = (
        ("loss.recipe", loss.recipe, (*recipes.RECIPES, "custom")),
        ("loss.gradient", loss.gradient, GRADIENTS),
        ("loss.reconstruction", loss.reconstruction, tuple(RECONSTRUCTIONS)),
        ("loss.discriminator", loss.discriminator, VGG_FORMS),
        ("loss.gan_loss", loss.gan_loss, ("thresholded", "bce", "hinge")),
        ("loss.discriminator_loss", loss.discriminator_loss, ("bce", "hinge")),
        ("latent.noise", latent.noise, NOISE_KINDS),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"config.{name}={value!r} is not one of {', '.join(allowed)}")
    weights = ("lpips", "gan", "gan_in_discriminator", "reconstruction_weight", "lecam")
    numbers = [(f"loss.{name}", loss[name]) for name in weights]
    numbers += [("loss.gan_start", loss.gan_start), ("latent.penalty", latent.penalty)]
    numbers.append(("latent.noise_size", latent.noise_size))
    for name, value in numbers:
        if not value >= 0:
            raise UserError(f"config.{name}={value} must be at least 0")
    if not 0 <= config.crop.rate <= 1 or (config.crop.rate and not config.crop.sides):
        raise UserError(
            f"config.crop.rate={config.crop.rate} must be from 0 to 1, and config.crop.sides "
            "name a side unless it is 0"
        )
    if wrong := recipes.mixed(config):
        raise UserError(
            f"config.loss.recipe={loss.recipe!r} is mixed with other settings: {'; '.join(wrong)}; "
            "give config.loss.recipe='custom' if that is meant"
        )
    for name in ("lecam", "gan_in_discriminator"):
        if loss[name] and not loss.gan:
            raise UserError(f"config.loss.{name}={loss[name]} needs a discriminator; see loss.gan")
    if (loss.reconstruction == "none") != (not loss.reconstruction_weight):
        raise UserError(
            f"config.loss.reconstruction={loss.reconstruction!r} and "
            f"reconstruction_weight={loss.reconstruction_weight} contradict each other"
        )
