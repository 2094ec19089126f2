"""The jobs: what each computes, with this package and with its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from efae_jax.api import load
from efae_jax.benchmark.inference import program
from efae_jax.benchmark.measure import Contender, Job
from efae_jax.benchmark.sizes import Sizes, choose_sizes
from efae_jax.benchmark.training import dit_step, training_step
from efae_jax.errors import UserError
from efae_jax.models.build import build_autoencoder, compute_dtype
from efae_jax.sharding import fitting_devices

OURS = "efae_jax"
GUIDANCE = 2.0


class Options(NamedTuple):
    """What the command line says about the jobs.

    Attributes:
      model: that encodes, decodes or samples: a work directory, or what `import` takes; random
        weights of SD's shape, or of the EFAE config, unless given.
      peer: beside PyTorch; then on one device.
      batch_size: images of a call; the sizes' own unless given.
      small: sizes that take no time, and say nothing.
      dtype: of the computation: "float32", "bfloat16", or "auto".
    """

    model: str | None = None
    peer: bool = False
    batch_size: int | None = None
    small: bool = False
    dtype: str = "auto"


class Setting(NamedTuple):
    """What all jobs share: options, sizes for this machine, devices, and the models loaded."""

    options: Options
    sizes: Sizes
    devices: Sequence[Any]

    def batch(self, size: int) -> int:
        """The images of a call."""
        return self.options.batch_size or size

    def split(self, batch_size: int) -> Sequence[Any]:
        """The devices that share a call of so many images.

        Raises:
          UserError: where they cannot share it evenly.
        """
        devices = self.devices
        if self.options.peer and devices[0].platform != "cpu":
            devices = devices[:1]
        devices = fitting_devices(devices, batch_size)
        if batch_size % len(devices):
            raise UserError(
                f"--batch-size {batch_size} must be a multiple of the {len(devices)} devices"
            )
        return devices

    @property
    def dtype(self) -> str:
        """Of the computation, "auto" resolved."""
        return np.dtype(compute_dtype(self.options.dtype)).name


def make_setting(options: Options) -> Setting:
    """For the devices of this process."""
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} must be at least 1")
    sizes = choose_sizes(jax.default_backend(), options.small)
    return Setting(options, sizes, jax.devices())


def efae(setting: Setting) -> Job:
    """The EFAE training step of `sizes.efae`."""
    config = _efae_config(setting)
    size = config.train.batch_size
    devices = setting.split(size)
    what = f"configs/efae.py:{setting.sizes.efae}, {_images(config.data.size, size)}"
    build = functools.partial(training_step, config, devices)
    return _job(setting, "efae", what, size, devices, build)


def dit(setting: Setting) -> Job:
    """The training step of a diffusion transformer as velocity field."""
    sizes, size = setting.sizes.dit, setting.batch(setting.sizes.dit_batch)
    device = setting.devices[0]
    tokens = (sizes.side // sizes.patch) ** 2
    what = (
        f"DiT, {tokens} tokens, width {sizes.width}, depth {sizes.depth}, "
        f"{_images((sizes.side,) * 2, size)}"
    )
    build = functools.partial(dit_step, sizes, size, compute_dtype(setting.dtype), device)
    peers = {}
    if setting.options.peer:
        from efae_jax.benchmark.peers.dit import training

        peers = _compiled_or_not(functools.partial(training, sizes, size, setting.dtype))
    return _job(setting, "dit", what, size, [device], build, peers)


def sample(setting: Setting) -> Job:
    """Euler steps of a guided flow: both velocities in one batch of twice the size."""
    steps, size = setting.sizes.sample_steps, setting.batch(setting.sizes.sample_batch)
    model, params, config, name = _model(setting, flow=True)
    devices = setting.split(size)
    side, channels = config.data.size, config.data.channels
    noise = _normal((size, *side, channels))

    def decode(steps: int, params: Any, z: Any, noise: Any) -> Any:
        return model.decode(params, z, noise, steps=steps, guidance=GUIDANCE)

    z = _normal(jax.eval_shape(model.encode, params, noise).shape)
    build = functools.partial(
        program,
        functools.partial(decode, steps),
        params,
        [z, noise],
        devices,
        (functools.partial(decode, 1), steps),
    )
    what = f"{name}, {steps} guided Euler steps, {_images(side, size)}"
    return _job(setting, "sample", what, size, devices, build)


def encode(setting: Setting) -> Job:
    """Images to latents: the posterior's moments, or the latent."""
    size = setting.batch(setting.sizes.batch)
    model, params, config, name = _model(setting, flow=False)
    devices, side = setting.split(size), _side(setting, model)
    x = np.random.default_rng(0).uniform(-1, 1, (size, *side, config.data.channels))
    x = x.astype(np.float32)

    def run(params: Any, x: Any) -> Any:
        return model.encode(params, x)

    build = functools.partial(program, run, params, [x], devices)
    peers = _kl_peers(setting, "encode", config, params, x)
    what = f"{name}, {_images(side, size)}"
    return _job(setting, "encode", what, size, devices, build, peers)


def decode(setting: Setting) -> Job:
    """Latents to images."""
    size = setting.batch(setting.sizes.batch)
    model, params, config, name = _model(setting, flow=False)
    if model.is_flow:
        raise UserError("benchmark: decoding with a flow is the job `sample`")
    devices, side = setting.split(size), _side(setting, model)
    latent = (n // model.factor for n in side)
    z = _normal((size, *latent, model.representation.channels))
    build = functools.partial(program, model.decode, params, [z], devices)
    peers = _kl_peers(setting, "decode", config, params, z)
    what = f"{name}, {_images(side, size)}"
    return _job(setting, "decode", what, size, devices, build, peers)


def kl(setting: Setting) -> Job:
    """The training step of a KL autoencoder with L1, KL, PatchGAN and averaged weights."""
    config = _kl_training_config(setting, "none")
    size = config.train.batch_size
    devices = setting.split(size)
    peers = {}
    if setting.options.peer:
        from efae_jax.benchmark.peers.kl_training import training

        peers = _compiled_or_not(functools.partial(training, config, setting.dtype))
    what = f"AutoencoderKL {tuple(config.model.widths)}, GAN, {_images(config.data.size, size)}"
    build = functools.partial(training_step, config, devices)
    return _job(setting, "kl", what, size, devices, build, peers)


def eq(setting: Setting) -> Job:
    """EQ-VAE's training step in the equivariance branch, at the middle one of its scales."""
    config = _kl_training_config(setting, "eq")
    size = config.train.batch_size
    devices = setting.split(size)
    what = f"EQ-VAE {tuple(config.model.widths)}, GAN, {_images(config.data.size, size)}"
    build = functools.partial(training_step, config, devices, "equivariance")
    return _job(setting, "eq", what, size, devices, build)


JOBS: Mapping[str, Callable[[Setting], Job]] = {
    "efae": efae,
    "dit": dit,
    "sample": sample,
    "encode": encode,
    "decode": decode,
    "kl": kl,
    "eq": eq,
}


def _job(
    setting: Setting,
    name: str,
    what: str,
    images: int,
    devices: Sequence[Any],
    build: Callable[[], Contender],
    peers: Mapping[str, Callable[[], Contender]] | None = None,
) -> Job:
    return Job(
        name, f"{what}, {setting.dtype}", images, len(devices), {OURS: build, **(peers or {})}
    )


def _images(side: Sequence[int], size: int) -> str:
    return f"{size} x {side[0]}x{side[1]}"


def _compiled_or_not(build: Callable[[bool], Contender]) -> dict[str, Callable[[], Contender]]:
    return {
        "PyTorch": functools.partial(build, compiled=False),
        "torch.compile": functools.partial(build, compiled=True),
    }


def _kl_peers(
    setting: Setting, what: str, config: Any, params: Any, array: np.ndarray
) -> dict[str, Callable[[], Contender]]:
    if not setting.options.peer:
        return {}
    from efae_jax.benchmark.peers.kl import inference

    return _compiled_or_not(
        functools.partial(inference, what, config, params, array, setting.dtype)
    )


def _side(setting: Setting, model: Any) -> tuple[int, int]:
    side = setting.sizes.side
    if model.factor is None or side % model.factor:
        raise UserError(
            f"benchmark: images of {side}x{side} do not fit a model of factor {model.factor}"
        )
    return side, side


def _model(setting: Setting, *, flow: bool) -> tuple[Any, Any, Any, str]:
    """(autoencoder, parameters, config, name): --model's, or random weights."""
    options = setting.options
    if options.model is None:
        config = _efae_config(setting) if flow else _kl_config(setting)
        model = build_autoencoder(config)
        params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
        name = f"configs/efae.py:{setting.sizes.efae}" if flow else "AutoencoderKL of SD's shape"
        return model, params, config, name
    loaded = load(options.model, dtype=None if options.dtype == "auto" else options.dtype)
    loaded.require("benchmark --model")
    if loaded.is_flow != flow:
        raise UserError(
            f"--model {options.model} has {'a flow' if loaded.is_flow else 'no flow'} as decoder; "
            f"the jobs for it: {'sample' if loaded.is_flow else 'encode, decode'}"
        )
    return loaded.autoencoder, jax.device_get(loaded.params), loaded.config, options.model


def _efae_config(setting: Setting) -> Any:
    from configs import efae as configs

    config = configs.get_config(setting.sizes.efae)
    with config.unlocked():
        config.train.batch_size = setting.batch(setting.sizes.efae_batch)
        config.train.accumulate = 1
    return _on_random_images(config, setting)


def _kl_config(setting: Setting) -> Any:
    from configs import pretrained

    config = pretrained.get_config("kl")
    with config.unlocked():
        config.model.widths = setting.sizes.widths
        config.model.norm_groups = setting.sizes.norm_groups
    return _on_random_images(config, setting)


def _kl_training_config(setting: Setting, regulariser: str) -> Any:
    from configs import eq_vae

    config = eq_vae.get_config("sd_vae")
    with config.unlocked():
        config.regulariser = regulariser
        config.init_from = ""
        config.model.widths = setting.sizes.train_widths
        config.model.norm_groups = setting.sizes.norm_groups
        config.loss.lpips = 0.0  # needs weights, which are not at hand everywhere
        config.data.size = (setting.sizes.side,) * 2
        config.train.batch_size = setting.batch(setting.sizes.train_batch)
        config.train.accumulate = 1
        if setting.options.small:
            config.model.blocks = 1
            config.eq.min_scale = 0.5  # half of the side is what a PatchGAN can just take
    return _on_random_images(config, setting)


def _on_random_images(config: Any, setting: Setting) -> Any:
    with config.unlocked():
        config.data.source = "glyphs"  # nothing is read: the pixels are random
        config.data.crop = "random"
        config.dtype = setting.options.dtype
    return config


def _normal(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(tuple(shape), np.float32)
