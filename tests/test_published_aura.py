"""AuraEquiVAE's presets beside the numbers of the program: vqgan-training at 03e0440 and 379fe36.

The numbers are written down from those programs and the released run's launcher, not from
`configs/`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import tiny_aura
from tiny_nets import operations, quick_jit

from configs import aura_equivae
from efae_jax import recipes
from efae_jax.errors import UserError
from efae_jax.methods import make_method
from efae_jax.methods.base import Context
from efae_jax.models.build import build_autoencoder
from efae_jax.models.functional import Net
from efae_jax.models.starts import pytorch_start

RELEASED = {
    # The model: ae.py and the launcher.
    "model.widths": (256, 512, 1024, 1024),
    "model.blocks": 2,
    "model.latent_channels": 16,
    "model.attention": True,
    "model.wavelet": False,
    "model.quant": False,
    "model.norm_groups": 32,
    "model.norm_eps": 1e-6,
    "model.start": "pytorch",
    "group.name": "z2xz2",
    "group.representation": "12*trivial + 2*sign_h + 2*sign_v",
    "group.in_objective": True,
    "latent.clamp": 8.0,
    "latent.noise": "multiplicative",
    "latent.noise_size": 0.1,
    "latent.penalty": 1.0,
    # The images: CenterCrop(256) and nothing else; decoded whole.
    "data.size": (256, 256),
    "data.crop": "native",
    "data.flip": False,
    "crop.rate": 0.0,
    # The losses.
    "loss.gradient": "elementwise",
    "loss.lpips": 1.0,
    "loss.augment": False,
    "loss.gan": 1.0,
    "loss.gan_loss": "thresholded",
    "loss.gan_start": 20,
    "loss.gan_in_discriminator": 1.0,
    "loss.reconstruction": "pooled",
    "loss.reconstruction_weight": 0.2,
    "loss.discriminator": "released",
    "loss.discriminator_loss": "bce",
    "loss.halved": False,
    "loss.lecam": 0.0,
    # The optimisers.
    "optim.lr": 0.015625 / 256,
    "optim.rates": (("conv_in/", 1e-4),),
    "optim.b1": 0.9,
    "optim.b2": 0.95,
    "optim.weight_decay": 1e-3,
    "optim.schedule": "cosine",
    "optim.warmup": 200,
    "optim.clip": 0.0,
    "optim_discriminator.lr": 1e-4,
    "optim_discriminator.b1": 0.9,
    "optim_discriminator.b2": 0.95,
    "optim_discriminator.weight_decay": 1e-3,
    "optim_discriminator.schedule": "constant",
    "optim_discriminator.warmup": 0,
    "ema.decay": 0.0,
    # 16 images on each of 8 GPUs.
    "train.batch_size": 128,
    "train.accumulate": 8,
    "train.steps": 50_000,
}
FIRST_STAGE = {"loss.gan": 0.0, "loss.gan_in_discriminator": 0.0, "train.steps": 62_001}
LATER = {
    "data.size": (512, 512),
    "data.crop": "mixed",
    "data.flip": True,
    "crop.rate": 0.0,
    "model.shrink": 2,
    "model.start": "flax",
    "latent.noise": "none",
    "latent.noise_size": 0.0,
    "latent.penalty": 0.1,
    "loss.gradient": "global",
    "loss.gan_loss": "bce",
    "loss.gan_start": 0,
    "loss.gan_in_discriminator": 0.0,
    "loss.reconstruction": "none",
    "loss.reconstruction_weight": 0.0,
    "loss.discriminator": "later",
    "loss.discriminator_loss": "bce",
    "loss.halved": True,
    "loss.lecam": 0.1,
    "optim_discriminator.lr": 2e-4,
}
PRESETS = {
    "f8c16": RELEASED,
    "f8c16_first": RELEASED | FIRST_STAGE,
    "later": RELEASED | LATER,
}


@pytest.mark.parametrize("variant", PRESETS)
def test_a_preset_is_what_the_program_does(variant):
    config = aura_equivae.get_config(variant)
    found = {}
    for name in PRESETS[variant]:
        section, field = name.split(".")
        value = config[section][field]
        found[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    assert found == PRESETS[variant]
    assert recipes.mixed(config) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop.rate", 0.5), ("data.flip", True), ("data.crop", "center"), ("data.crop", "random")],
)
def test_what_the_later_program_does_to_images_is_a_mixture_in_the_released_recipe(field, value):
    config = tiny_aura("released")
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=f"config.{field}={value!r}.*recipe='custom'"):
        make_method(config)


# How the networks start.


def test_pytorchs_start_is_uniform_by_what_an_output_sees():
    config = tiny_aura(model__start="pytorch", model__widths=(64, 64), model__norm_groups=4)
    config.model.attention = True
    model = build_autoencoder(config)
    params = jax.device_get(quick_jit(model.init)(jax.random.key(0)))
    block = params["encoder"]["levels"]["0"]["blocks"]["0"]
    for name in ("conv1", "conv2"):  # 3 x 3 x 64 numbers
        bound = 1 / 24
        for leaf in (block[name]["kernel"], block[name]["bias"]):
            assert bound * 0.9 < np.abs(leaf).max() <= bound
        assert np.std(block[name]["kernel"]) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    np.testing.assert_array_equal(block["norm1"]["scale"], 1)
    np.testing.assert_array_equal(block["norm1"]["bias"], 0)
    # The attention's last matrix has a start of its own: normal, 0.2 / sqrt(64).
    out = params["encoder"]["middle"]["attention"]["out"]["kernel"]
    assert np.std(out) == pytest.approx(0.2 / 8, rel=0.05)
    assert np.abs(out).max() > 2.5 * 0.2 / 8
    again = jax.device_get(quick_jit(model.init)(jax.random.key(1)))
    other = again["encoder"]["levels"]["0"]["blocks"]["0"]["conv1"]["kernel"]
    assert not np.array_equal(other, block["conv1"]["kernel"])


def test_layers_are_drawn_apart_and_what_is_kept_is_kept():
    layer = {"kernel": jnp.zeros((4, 64)), "bias": jnp.zeros(64)}
    params = {"a": layer, "b": layer, "head": {"linear": layer}, "norm": {"scale": jnp.ones(4)}}
    found = pytorch_start(params, jax.random.key(0), kept=("^head/linear/", "b/bias"))
    assert np.abs(found["a"]["kernel"] - found["b"]["kernel"]).max() > 0.1
    assert np.abs(found["a"]["kernel"]).max() <= 0.5
    np.testing.assert_array_equal(found["b"]["bias"], 0)
    np.testing.assert_array_equal(found["head"]["linear"]["kernel"], 0)
    np.testing.assert_array_equal(found["norm"]["scale"], 1)


def test_there_is_no_other_start():
    with pytest.raises(UserError, match="config.model.start='keras' is not one of flax, pytorch"):
        build_autoencoder(tiny_aura(model__start="keras"))


# The two players.

SIDE, BATCH = 8, 8


class Linear(nnx.Module):
    """Logits of every pixel: a mean of what is around it, from zero."""

    def __init__(self, *, rngs):
        self.hidden = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.head = nnx.Conv(
            8, 1, (1, 1), use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, x):
        return self.head(jax.nn.relu(self.hidden(x)))[..., 0]


def trained_logits(in_discriminator, steps=300):
    """Mean logits of images and of their blurred copies after training on fixed pairs."""
    config = tiny_aura(
        loss__gan=1.0,
        loss__gan_start=20,
        loss__gan_in_discriminator=in_discriminator,
        loss__discriminator_loss="bce",
    )
    method = make_method(config)
    method.discriminator = Net(lambda rngs: Linear(rngs=rngs))
    real = np.random.default_rng(0).uniform(-1, 1, (BATCH, SIDE, SIDE, 1)).astype(np.float32)
    fake = (real + np.roll(real, 1, 1) + np.roll(real, 1, 2)) / 3
    passed = {"target": real, "decoded": fake}
    adam = optax.adam(1e-2)

    def one(carry, step):
        params, state = carry

        def loss(params):
            context = Context(step, {}, passed, {}, None)
            outcome = method.loss("discriminator", {"discriminator": params}, {}, None, context)
            return outcome.loss_B.mean(), outcome.metrics

        gradient, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = adam.update(gradient, state)
        figures = {name: metrics[name] for name in ("logit_real", "logit_fake")}
        return (optax.apply_updates(params, updates), state), figures

    params = method.discriminator.init(jax.random.key(0))
    start = (params, adam.init(params))
    _, figures = jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(steps)))(start)
    return jax.device_get(figures)


def test_the_generators_gradient_in_the_discriminator_lifts_the_logits_of_decodings():
    plain, released = trained_logits(0.0), trained_logits(1.0)
    # Until the GAN starts they are one and the same.
    np.testing.assert_array_equal(plain["logit_fake"][:21], released["logit_fake"][:21])
    # Where images lie above all decodings, the logits of decodings stay at zero, or rise with them.
    assert np.abs(plain["logit_fake"]).max() < 0.3
    assert released["logit_fake"][50] > 1
    assert released["logit_fake"][-1] > released["logit_fake"][100] > released["logit_fake"][50]
    assert released["logit_real"][-1] > plain["logit_real"][-1] > 3


def test_the_released_discriminator_starts_undecided():
    method = make_method(tiny_aura("released", data__size=(32, 32)))
    params = quick_jit(method.discriminator.init)(jax.random.key(0))
    params["trunk"] = jax.tree.map(lambda leaf: leaf + 0.01, params["trunk"])
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(quick_jit(method.discriminator.__call__)(params, x), 0)


def test_judges_compute_in_float32_where_the_autoencoder_does_not():
    config = tiny_aura("released", data__size=(32, 32), dtype="bfloat16")
    method = make_method(config)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    for net, arguments in ((method.lpips, (x, x)), (method.discriminator, (x,))):
        program = jax.make_jaxpr(net.__call__)(net.abstract, *arguments).jaxpr
        convolutions = [
            e for e in operations(program) if e.primitive.name == "conv_general_dilated"
        ]
        assert convolutions
        for equation in convolutions:
            assert {v.aval.dtype.name for v in equation.invars} == {"float32"}
            # TF32 on a GPU, and as near on a TPU.
            assert set(equation.params["precision"]) == {jax.lax.Precision.HIGH}
    decoder = method.autoencoder.decoder
    z = jax.ShapeDtypeStruct((2, 16, 16, 6), jnp.float32)
    inside = jax.make_jaxpr(decoder.__call__)(decoder.abstract, z).jaxpr
    types = {
        v.aval.dtype.name
        for e in operations(inside)
        if e.primitive.name == "conv_general_dilated"
        for v in e.invars
    }
    assert types == {"bfloat16"}
