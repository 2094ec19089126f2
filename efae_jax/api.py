"""Trained and imported models as objects: what `efae_jax.load` returns."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from efae_jax import convert, json_files, sampling
from efae_jax.basis import Basis, read_beside
from efae_jax.checkpoint import FOLDER, Checkpoints, read_config
from efae_jax.convert import hub, layout, units, wrappers
from efae_jax.errors import UserError
from efae_jax.methods.base import Autoencoder, to_float
from efae_jax.models.build import build_autoencoder
from efae_jax.models.latent import Posterior
from efae_jax.models.tiled import tiled_decode, tiled_encode, tiled_posterior
from efae_jax.paths import is_remote, printable, user_path, workdir_path
from efae_jax.sharding import make_mesh, tree_shardings

log = logging.getLogger(__name__)
PIXEL_LIMIT = 1.25  # bicubic resizing overshoots
PLAYER = "autoencoder"  # under this name every method trains the model that users see


class Restored(NamedTuple):
    """A trained or imported model: the autoencoder, its (averaged) weights, config, step."""

    model: Autoencoder
    params: Any
    config: Any
    step: int


def restore(workdir: epath.PathLike, config: Any, mesh: Mesh, step: int | None = None) -> Restored:
    """A checkpoint's autoencoder with its averaged weights, laid out on a mesh.

    Args:
      workdir: of the run.
      config: of the run.
      mesh: from `sharding.make_mesh`.
      step: of the checkpoint; the newest unless given.

    Raises:
      UserError: when the work directory holds no such checkpoint.
    """
    model = _build(config)
    params, step = restore_player(workdir, config, mesh, PLAYER, model.init, step)
    return Restored(model, params, config, step)


def restore_player(
    workdir: epath.PathLike,
    config: Any,
    mesh: Mesh,
    player: str,
    init: Callable[[PRNGKeyArray], Any],
    step: int | None = None,
) -> tuple[Any, int]:
    """The averaged weights of one of a checkpoint's players, and the checkpoint's step.

    Args:
      workdir, config, mesh, step: as for `restore`.
      player: its name.
      init: makes its parameters from a key; looked at for their shapes.

    Raises:
      UserError: when the work directory holds no such checkpoint.
    """
    workdir = epath.Path(workdir)
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no checkpoint; train first, or give another directory")
    checkpoints = Checkpoints(workdir)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{workdir} holds no complete checkpoint yet")
        step = max(steps) if step is None else step
        if step not in steps:
            raise UserError(
                f"{workdir} holds no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps))}"
            )
        shapes = {"ema": {player: jax.eval_shape(init, jax.random.key(0))}}
        shardings = tree_shardings(shapes, config.mesh.rules, mesh)
        abstract = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        state, _ = checkpoints.restore(abstract, step)
    finally:
        checkpoints.close()
    return state["ema"][player], step


def _build(config: Any) -> Autoencoder:
    if config.model.kind == "disentangler":
        raise UserError(
            "this is a disentangling run, which holds a basis of a model's latent and no model; "
            "efae_jax.read_basis reads it, and --basis takes it"
        )
    try:
        return build_autoencoder(config)
    except ValueError as error:  # the models know no UserError
        raise UserError(str(error)) from error


class Model:
    """An autoencoder, ready to use; every method is jitted. Latents are in its own units.

    Attributes:
      group: of the latent's symmetries; `group.elements` are their names.
      config: that describes it.
      params: its (averaged) weights.
      step: of the training run that it comes from.
      factor: side of the images that `encode` takes / side of the latent; None for a latent
        without positions.
      upscale: side of the images that `decode` gives / side of those that `encode` takes.
      is_flow: `decode` samples, from noise.
      autoencoder: its pure functions of parameters, for programs of one's own.
      has_encoder, has_decoder: of a half of TAESD, one is False: it only decodes or encodes.
      basis: of the latent's channels, semantic ones first, that travels with the model, for
        `efae_jax.Disentangled`; or None.
    """

    def __init__(self, restored: Restored, basis: Basis | None = None):
        self._model, self.params = restored.model, restored.params
        self.config, self.step = restored.config, restored.step
        self.group = self._model.group
        self.factor, self.upscale = self._model.factor, self._model.upscale
        self.is_flow, self.autoencoder = self._model.is_flow, self._model
        self.has_encoder, self.has_decoder = self._model.has_encoder, self._model.has_decoder
        self.basis = basis

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What this model is: kind, source, step, and the sha256 of its weights."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path, simple=True, separator="/").encode())
            digest.update(np.asarray(leaf, order="C").tobytes())
        model = self.config.model
        return {
            "kind": model.kind,
            "source": model.get("source", ""),
            "step": self.step,
            "sha256": digest.hexdigest(),
        }

    def require(self, what: str, sides: Sequence[str] = ("encoder", "decoder")) -> None:
        """Raises a UserError where a part is missing that something needs.

        Args:
          what: needs them, for the message.
          sides: "encoder", "decoder" or both.
        """
        for side in sides:
            if not getattr(self, f"has_{side}"):
                source = Path(str(self.config.model.get("source", "")))
                (other,) = {"encoder", "decoder"} - {side}
                wanted = source.stem.removesuffix(other) + side if other in source.stem else ""
                raise UserError(
                    f"{what} needs the {side}, and {printable(str(source))} gave the {other} "
                    f"alone: put the file {printable(wanted or f'*_{side}')}{source.suffix} "
                    "beside it, and load both"
                )

    def normalise(self, z: Float[Array, "... C"]) -> Float[Array, "... D"]:
        """Latents in the units of a diffusion model: by scaling, shift, or mean and std.

        D is C, but for FLUX.2, whose 2x2 positions are packed into D = 4 C channels, in half the
        height and width. `act` takes latents in the model's own units, unpacked.
        """
        return self._model.normalise(z)

    def denormalise(self, z: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """Back to the model's own units, which `decode` takes."""
        return self._model.denormalise(z)

    def encode(
        self, x: UInt8[Array, "B H W c"] | Float[Array, "B H W c"], *, tile: int | None = None
    ) -> Float[Array, "B ..."]:
        """Latents of images: uint8, or floats in [-1, 1], NHWC. The mode of a posterior.

        Args:
          x: images.
          tile: pixels a side; larger images are encoded tile by tile, one after the other, from
            and to arrays on the host, in the memory of a tile (`models.tiled.tiled_encode`).
        """
        self.require("encode", ["encoder"])
        if tile is None:
            return self._encode(self.params, self._pixels(x))
        return tiled_encode(self._model, self.params, self._images(np.asarray(x)), tile=tile)

    def posterior(
        self, x: UInt8[Array, "B H W c"] | Float[Array, "B H W c"], *, tile: int | None = None
    ) -> Posterior:
        """q(z | x): its mean, log-variance (None if deterministic), samples and KL.

        Args:
          x, tile: as for `encode`.
        """
        self.require("posterior", ["encoder"])
        if tile is None:
            return self._posterior(self.params, self._pixels(x))
        return tiled_posterior(self._model, self.params, self._images(np.asarray(x)), tile=tile)

    def _pixels(self, x: Any) -> Float[Array, "B H W c"]:
        x = jnp.asarray(self._images(x if isinstance(x, np.ndarray) else jnp.asarray(x)))
        return to_float(x) if x.dtype == jnp.uint8 else x

    def _images(self, x: Any) -> Any:
        if x.ndim != 4 or x.shape[-1] != self.config.data.channels:
            raise ValueError(
                f"encode: images must be [B, H, W, {self.config.data.channels}], not {x.shape}"
            )
        if x.dtype != jnp.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"encode: pixels are uint8, or floats in [-1, 1], not {x.dtype}")
        # Of arrays on a device, looking would wait for them.
        if isinstance(x, np.ndarray) and x.dtype != np.uint8 and x.size:
            low, high = float(x.min()), float(x.max())
            if not -PIXEL_LIMIT <= low <= high <= PIXEL_LIMIT:
                raise ValueError(
                    f"encode: floats must lie in [-1, 1], found {low:g} to {high:g}; give uint8 "
                    "for 8-bit pixels"
                )
        return x

    def act(self, g: str | Int[Array, " B"], z: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """rho(g) z, for one element by name ("h") or an index per example."""
        self._check_latents("act", z)
        return self._act(self.params, self._indices(g, z.shape[0]), z)

    def act_image(self, g: str | Int[Array, " B"], x: Array) -> Array:
        """g x, for images of any dtype."""
        return self._model.act_image(self._indices(g, x.shape[0]), jnp.asarray(x))

    def decode(
        self,
        z: Float[Array, "B ..."],
        key: PRNGKeyArray | None = None,
        steps: int | None = None,
        *,
        solver: str | None = None,
        guidance: float | None = None,
        noise: Float[Array, "B H W c"] | None = None,
        clip: bool = True,
        tile: int | None = None,
    ) -> Float[Array, "B H W c"]:
        """Images of latents; of a flow, samples of p(x | z).

        Args:
          z: latents.
          key: of the noise that a flow starts from; other decoders need none.
          steps, solver, guidance: of a flow; those of `config.eval` unless given.
          noise: that a flow starts from, instead of a key.
          clip: to [-1, 1].
          tile: pixels a side of the encoder's images; larger ones are decoded tile by tile
            (`models.tiled.tiled_decode`), not a flow's.
        """
        self.require("decode", ["decoder"])
        given = {"steps": steps, "solver": solver, "guidance": guidance}
        given = {name: value for name, value in given.items() if value is not None}
        options = self._model.decode_options(self.config.eval)
        if extra := [name for name in given if name not in options]:
            raise ValueError(f"decode: {', '.join(extra)} belong to flow decoders only")
        options |= given
        if options.get("steps", 1) < 1:
            raise ValueError(f"decode: steps={steps} must be at least 1")
        self._check_latents("decode", z)
        if tile is not None:
            x = tiled_decode(self._model, self.params, np.asarray(z), tile=tile)
            return np.clip(x, -1, 1) if clip else x
        if self._model.is_flow and key is None and noise is None:
            raise ValueError("decode: a flow decoder samples; give it a jax.random.key")
        return self._decode(self.params, z, key, noise, clip, tuple(sorted(options.items())))

    def bits_per_dimension(
        self,
        x: UInt8[Array, "B H W c"],
        key: PRNGKeyArray,
        steps: int = 50,
        *,
        probes: int | None = 1,
    ) -> Float[Array, " B"]:
        """-log2 p(x | E(x)) per dimension of 8-bit images, one value per image.

        The images are dequantised uniformly, and the flow is followed from the image to
        the noise by Heun's method, integrating its divergence (`sampling.log_likelihood`).

        Args:
          x: images.
          key: of the dequantisation and of the probes.
          steps: of the solver.
          probes: Hutchinson probes; None for the exact trace, which costs one product
            for every number of an image.
        """
        if not self._model.is_flow:
            raise ValueError("bits_per_dimension: only a flow decoder gives a likelihood")
        x = jnp.asarray(x)
        if x.dtype != jnp.uint8:
            raise ValueError(f"bits_per_dimension: images are uint8, not {x.dtype}")
        return self._bits(self.params, x, key, steps, probes)

    def _check_latents(self, what: str, z: Any) -> None:
        channels = self._model.representation.channels
        axes = ["B", "h", "w", str(channels)] if self.factor else ["B", str(channels)]
        if np.ndim(z) != len(axes) or np.shape(z)[-1] != channels:
            raise ValueError(f"{what}: latents must be [{', '.join(axes)}], not {np.shape(z)}")

    def _indices(self, g: str | Array, batch: int) -> Array:
        if not isinstance(g, str):
            if np.size(g) and not 0 <= np.min(g) <= np.max(g) < self.group.order:
                raise ValueError(
                    f"elements of {self.group.name} have the indices 0 to {self.group.order - 1}"
                )
            return jnp.asarray(g)
        g = {"hv": "r180"}.get(g, g)
        if g not in self.group.elements:
            raise ValueError(
                f"{g!r} is not an element of {self.group.name}: {', '.join(self.group.elements)}"
            )
        return jnp.full(batch, self.group.elements.index(g))

    @functools.cached_property
    def _encode(self) -> Any:
        return jax.jit(self._model.encode)

    @functools.cached_property
    def _posterior(self) -> Any:
        return jax.jit(self._model.posterior)

    @functools.cached_property
    def _act(self) -> Any:
        return jax.jit(self._model.act)

    @functools.cached_property
    def _decode(self) -> Any:
        def decode(params: Any, z: Array, key: Any, noise: Any, clip: bool, options: tuple):
            if self._model.is_flow and noise is None:
                shape = (z.shape[0], *self._image_size(z), self.config.data.channels)
                noise = jax.random.normal(key, shape)
            x = self._model.decode(params, z, noise, **dict(options))
            return jnp.clip(x, -1, 1) if clip else x

        return jax.jit(decode, static_argnums=(4, 5))

    @functools.cached_property
    def _bits(self) -> Any:
        def bits(params: Any, image: Array, key: Array, steps: int, probes: int | None):
            x = to_float(image)
            field = self._model.field(params, self._model.encode(params, x))
            noise_key, probe_key = jax.random.split(key)
            log_p = sampling.log_likelihood(
                field,
                sampling.dequantise(noise_key, x),
                steps,
                key=None if probes is None else probe_key,
                probes=probes or 0,
            )
            return sampling.bits_per_dimension(log_p, math.prod(x.shape[1:]))

        return jax.jit(bits, static_argnums=(3, 4))

    def _image_size(self, z: Array) -> tuple[int, int]:
        """Latents of other sides than the config's decode to images of other sides."""
        if self.factor is None:
            return tuple(self.config.data.size)
        return z.shape[1] * self.factor, z.shape[2] * self.factor


def load(
    source: str | os.PathLike[str],
    step: int | None = None,
    dtype: str | None = None,
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> Model:
    """A model on this machine's devices.

    Args:
      source: the work directory of a training run (on any number of devices) or of an
        import; or weights that `efae_jax import` reads: a file, a folder, or the id or address
        of a repository on the hub, such as "stabilityai/sd-vae-ft-ema". Of a file with several
        models, FILE::KEY; of a half of TAESD, a model that only encodes or only decodes.
      step: of a work directory's checkpoint; the newest unless given.
      dtype: of the computation, "float32", "bfloat16" or "auto"; the config's unless given.
      scaling_factor, shift_factor: units of the latent, for `normalise`; they take the place of
        those that the model states.

    Raises:
      UserError: when no model is there, or its weights are not finite.
    """
    model, asks = load_asking(
        source, step, dtype, scaling_factor=scaling_factor, shift_factor=shift_factor
    )
    if asks:
        log.warning("%s: %s", source, asks)
    return model


def load_asking(
    source: str | os.PathLike[str],
    step: int | None = None,
    dtype: str | None = None,
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> tuple[Model, str]:
    """`load` without a warning where nobody has stated the latent's units.

    Returns:
      the model, and that warning; empty where there is nothing to ask.
    """
    source = user_path(source)
    given = convert.Options(scaling_factor=scaling_factor, shift_factor=shift_factor)
    if not is_workdir(source):
        return _load_weights(source, step, dtype, given)
    config = config_of(source)
    _set_dtype(config, dtype)
    for note in units.override(config, scaling_factor, shift_factor):
        log.warning("%s: %s", source, note)
    restored = restore(source, config, make_mesh(), step)
    _require_finite(restored.params, source)
    return _with_basis(source, restored), units.unstated_note(config)


def _require_finite(params: Any, source: str | os.PathLike[str]) -> None:
    flat = layout.flatten(params)
    problems = layout.finite_problems({name: np.asarray(a) for name, a in flat.items()})
    layout.require(problems, f"{source} cannot be used")


def is_workdir(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the work directory of a training run or of an import.

    Raises:
      UserError: when it is one that holds no checkpoint.
    """
    if hub.is_url(os.fspath(path)):
        return False
    path = workdir_path(path) if is_remote(path) else Path(user_path(path))
    config = json_files.read_object(path / "config.json", "a model's config")
    if config is None or (path / FOLDER).is_dir():
        return config is not None
    if "method" in config:  # diffusers' config.json has none
        raise UserError(f"{path} holds no checkpoint; train first, or give another directory")
    return False


def _load_weights(
    source: str | os.PathLike[str], step: int | None, dtype: str | None, given: convert.Options
) -> tuple[Model, str]:
    if step is not None:
        raise UserError(f"{source} is no work directory, so it has no checkpoint of step {step}")
    imported = convert.read_model(source, options=given)
    for note in imported.notes:
        log.warning("%s: %s", source, note)
    if imported.ignored:
        counts = ", ".join(f"{count} tensors {start}*" for start, count in imported.ignored.items())
        log.warning("%s: not part of the autoencoder, not loaded: %s", source, counts)
    _set_dtype(imported.config, dtype)
    params = jax.device_put(imported.params)
    restored = Restored(_build(imported.config), params, imported.config, 0)
    return _with_basis(source, restored), imported.asks


def _with_basis(source: str | os.PathLike[str], restored: Restored) -> Model:
    channels = restored.model.representation.channels
    path = path_of(source)
    return Model(restored, None if path is None else read_beside(path, channels))


def path_of(source: str | os.PathLike[str]) -> epath.Path | None:
    """The path in what `load` takes, without a key behind it; None for an address of the web."""
    text, _ = wrappers.split(user_path(source))
    return None if hub.is_url(text) else epath.Path(text)


def _set_dtype(config: ConfigDict, dtype: str | None) -> None:
    if dtype is not None:
        with config.unlocked():
            config.dtype = dtype


def config_of(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config that a work directory was made with, for the devices of this machine.

    Raises:
      UserError: when it holds none.
    """
    config = ConfigDict(read_config(workdir))
    if "mesh" in config:
        config.mesh.data, config.mesh.fsdp = -1, 1
    return config
