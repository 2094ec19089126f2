"""Trained models as objects: what `efae_jax.load` returns."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from efae_jax import sampling
from efae_jax.checkpoint import FOLDER, Checkpoints, read_config
from efae_jax.errors import UserError
from efae_jax.methods import make_method
from efae_jax.methods.base import Autoencoder, to_float
from efae_jax.sharding import make_mesh, tree_shardings


class Restored(NamedTuple):
    """A trained model: the autoencoder, its averaged weights, its config, the step."""

    model: Autoencoder
    params: Any
    config: Any
    step: int


def restore(workdir: Path, config: Any, mesh: Mesh, step: int | None = None) -> Restored:
    """A checkpoint's autoencoder with its averaged weights, laid out on a mesh.

    Args:
      workdir: of the run.
      config: of the run.
      mesh: from `sharding.make_mesh`.
      step: of the checkpoint; the newest unless given.

    Raises:
      UserError: when the work directory holds no such checkpoint.
    """
    workdir = Path(workdir)
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no checkpoint; train first, or give another directory")
    method = make_method(config)
    player = method.players[0]
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
        shapes = {"ema": jax.eval_shape(method.init, jax.random.key(0))}
        shardings = tree_shardings(shapes, config.mesh.rules, mesh)
        abstract = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        state, _ = checkpoints.restore(abstract, step)
    finally:
        checkpoints.close()
    return Restored(method.autoencoder, state["ema"][player], config, step)


class Model:
    """A trained autoencoder, ready to use; every method is jitted.

    Attributes:
      group: of the latent's symmetries; `group.elements` are their names.
      config: that trained it.
      params: its averaged weights.
    """

    def __init__(self, restored: Restored):
        self._model, self.params = restored.model, restored.params
        self.config, self.step = restored.config, restored.step
        self.group = self._model.group

    def encode(self, x: UInt8[Array, "B H W c"] | Float[Array, "B H W c"]) -> Float[Array, "B ..."]:
        """Latents of images: uint8, or floats in [-1, 1], NHWC."""
        x = jnp.asarray(x)
        if x.ndim != 4 or x.shape[-1] != self.config.data.channels:
            raise ValueError(
                f"encode: images must be [B, H, W, {self.config.data.channels}], not {x.shape}"
            )
        if x.dtype != jnp.uint8 and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"encode: pixels are uint8, or floats in [-1, 1], not {x.dtype}")
        return self._encode(self.params, to_float(x) if x.dtype == jnp.uint8 else x)

    def act(self, g: str | Int[Array, " B"], z: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """rho(g) z, for one element by name ("h") or an index per example."""
        return self._act(self.params, self._indices(g, z.shape[0]), z)

    def act_image(self, g: str | Int[Array, " B"], x: Array) -> Array:
        """g x, for images of any dtype."""
        return self._model.act_image(self._indices(g, x.shape[0]), jnp.asarray(x))

    def decode(
        self,
        z: Float[Array, "B ..."],
        key: PRNGKeyArray,
        steps: int | None = None,
        *,
        solver: str | None = None,
        guidance: float | None = None,
    ) -> Float[Array, "B H W c"]:
        """Samples of p(x | z), in [-1, 1].

        Args:
          z: latents.
          key: of the noise that the flow starts from.
          steps, solver, guidance: of the flow; those of `config.eval` unless given.
        """
        c = self.config.eval
        if steps is not None and steps < 1:
            raise ValueError(f"decode: steps={steps} must be at least 1")
        return self._decode(
            self.params,
            z,
            key,
            c.steps if steps is None else steps,
            c.solver if solver is None else solver,
            c.guidance if guidance is None else guidance,
        )

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
        x = jnp.asarray(x)
        if x.dtype != jnp.uint8:
            raise ValueError(f"bits_per_dimension: images are uint8, not {x.dtype}")
        return self._bits(self.params, x, key, steps, probes)

    def _indices(self, g: str | Array, batch: int) -> Array:
        if not isinstance(g, str):
            if np.size(g) and not 0 <= np.min(g) <= np.max(g) < self.group.order:
                raise ValueError(
                    f"elements of {self.group.name} have the indices 0 to {self.group.order - 1}"
                )
            return jnp.asarray(g)
        if g not in self.group.elements:
            raise ValueError(
                f"{g!r} is not an element of {self.group.name}: {', '.join(self.group.elements)}"
            )
        return jnp.full(batch, self.group.elements.index(g))

    @functools.cached_property
    def _encode(self) -> Any:
        return jax.jit(self._model.encode)

    @functools.cached_property
    def _act(self) -> Any:
        return jax.jit(self._model.act)

    @functools.cached_property
    def _decode(self) -> Any:
        def decode(params: Any, z: Array, key: Array, steps: int, solver: str, guidance: float):
            shape = (z.shape[0], *self._image_size(z), self.config.data.channels)
            noise = jax.random.normal(key, shape)
            x = self._model.decode(params, z, noise, steps=steps, solver=solver, guidance=guidance)
            return jnp.clip(x, -1, 1)

        return jax.jit(decode, static_argnums=(3, 4, 5))

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
        height, width = self.config.data.size
        if z.ndim == 2:
            return height, width
        abstract = jax.ShapeDtypeStruct((1, height, width, self.config.data.channels), jnp.float32)
        side = jax.eval_shape(self._model.encode, self.params, abstract).shape[1]
        return z.shape[1] * height // side, z.shape[2] * height // side


def load(workdir: str | os.PathLike[str], step: int | None = None) -> Model:
    """The trained model of a work directory, on this machine's devices.

    Args:
      workdir: of a training run on any number of devices, or of an import.
      step: of the checkpoint; the newest unless given.

    Raises:
      UserError: when no model is there.
    """
    return Model(restore(Path(workdir), config_of(workdir), make_mesh(), step))


def config_of(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config that a work directory was made with, for the devices of this machine.

    Raises:
      UserError: when it holds none.
    """
    config = ConfigDict(read_config(Path(workdir)))
    if "mesh" in config:
        config.mesh.data, config.mesh.fsdp = -1, 1
    return config
