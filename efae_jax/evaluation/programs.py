"""The compiled programs of an evaluation: pure functions of parameters and a batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from efae_jax import groups
from efae_jax.evaluation.networks import Networks
from efae_jax.evaluation.protocols import Protocol
from efae_jax.evaluation.transformations import Action, Transformation
from efae_jax.methods.base import Autoencoder, to_float
from efae_jax.metrics.equivariance import equivariance_error
from efae_jax.metrics.images import to_uint8_truncated
from efae_jax.metrics.spectrum import dct_energies
from efae_jax.sharding import batch_sharding, replicated

_PREPARE, _DECODE, _ENCODE, _SCALE = "prepare", "decode", "encode", "scale"
_NAMES = {_PREPARE: "the encoder", _DECODE: "the decoder", _ENCODE: "the encoder of turned images"}


class Encoded(NamedTuple):
    """A batch as the programs of the transformations take it.

    x, target: what the encoder takes and what the decoder should return; seen: in the target, by
    `Networks.see`; z: the latent that is decoded; mean: the posterior's; index: numbers of the
    images.
    """

    x: Array
    target: Array
    seen: dict[str, Any]
    z: Array
    mean: Array
    index: Array


class Programs:
    """Of one model on one size of images, for batches of one size.

    After `trace` and `compile`, `plain(params, networks, batch)` gives an `Encoded`, split over the
    devices, and figures, latents and pictures, whole; `transformed(t, params, networks, encoded)`
    figures and pictures under a transformation. The images as they are, rotations and flips share
    their programs, to which the group's element is an argument; each scaling has its own.

    Args:
      model: the autoencoder.
      networks: that compare images.
      config: its `eval` says how a flow decodes.
      mesh: batches are split over all of it.
      protocol: whether images come as floats, and how they are compared.
      sample: decode samples of the posterior, by (seed, number of the image), not its mean.
      resampling: of scalings.
      seed: of samples, and of the noise that flows start from.
      size: (height, width) of the data's images.
      channels: of them.
    """

    def __init__(
        self,
        model: Autoencoder,
        networks: Networks,
        config: Any,
        mesh: Mesh,
        *,
        protocol: Protocol,
        sample: bool,
        resampling: str,
        seed: int,
        size: tuple[int, int],
        channels: int,
    ):
        self._model, self._networks, self._sample = model, networks, sample
        self._protocol = protocol
        self._resampling, self._seed = resampling, seed
        self._options = model.decode_options(config.eval)
        shape = (1, *size, channels)
        params = jax.eval_shape(model.init, jax.random.key(0))
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        x, target = jax.eval_shape(model.views, image)
        self.decoded_sides = target.shape[1:3]
        self.latent_shape = jax.eval_shape(model.encode, params, x).shape[1:]
        self.parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        self._action = Action(model, size[0] == size[1], len(self.latent_shape) == 3)
        self._mesh, self._image = mesh, (*size, channels)
        split, whole = batch_sharding(mesh), replicated(mesh)
        self._jitted = {
            _PREPARE: jax.jit(self._prepare, in_shardings=(None, whole, split),
                              out_shardings=(split, whole)),
            _DECODE: jax.jit(self._turn, in_shardings=(None, whole, split, None, None),
                             out_shardings=whole),
            _ENCODE: jax.jit(self._error, in_shardings=(None, split, None), out_shardings=whole),
            _SCALE: jax.jit(self._scale, in_shardings=(None, whole, split),
                            out_shardings=whole, static_argnums=3),
        }  # fmt: skip
        self._traced: dict[Any, Any] = {}
        self._compiled: dict[Any, Any] = {}

    def trace(
        self,
        params: Any,
        networks: Any,
        batch_size: int,
        transformations: Sequence[Transformation],
    ) -> dict[str, str]:
        """Builds what is needed for batches of a size, without compiling it.

        Args:
          params: of the model.
          networks: parameters of the networks.
          batch_size: images; a multiple of the mesh's devices.
          transformations: that are wanted.

        Returns:
          name of a transformation that the model cannot take -> why.

        Raises:
          ValueError: where it cannot take the images themselves.
        """
        pixels = np.float32 if self._protocol.floats else np.uint8
        image = jax.ShapeDtypeStruct((batch_size, *self._image), pixels)
        number = jax.ShapeDtypeStruct((batch_size,), np.int32)
        mask = jax.ShapeDtypeStruct((batch_size,), bool)
        batch = {"image": image, "index": number, "label": number, "mask": mask}
        g = jax.ShapeDtypeStruct((), np.int32)
        prepared = self._jitted[_PREPARE].trace(params, networks, batch)
        encoded, _ = prepared.out_info
        self._compiled, self._traced = {}, {_PREPARE: prepared}
        self._traced[_DECODE] = self._jitted[_DECODE].trace(params, networks, encoded, g, g)
        impossible: dict[str, str] = {}
        for t in transformations:
            try:
                if t.scale is None:
                    self._traced[_ENCODE] = self._jitted[_ENCODE].trace(params, encoded, g)
                else:
                    scaled = self._jitted[_SCALE].trace(params, networks, encoded, t.scale)
                    self._traced[t.scale] = scaled
            except ValueError as error:  # a decoder that takes no other sides, say
                impossible[t.name] = str(error)
        return impossible

    def compile(self, note: Callable[[str], None]) -> None:
        """Compiles what was traced, as many programs at a time as there are cores.

        Args:
          note: is told what is being compiled, and how many programs are left.
        """
        waiting = {key: _NAMES.get(key, f"scale {key}") for key in self._traced}

        def say() -> None:
            names = list(waiting.values())
            note(f"compiling {names[0]}; {len(names)} of {len(self._traced)} programs left")

        say()
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            futures = {pool.submit(t.lower().compile): key for key, t in self._traced.items()}
            try:
                for future in as_completed(futures):
                    key = futures[future]
                    self._compiled[key] = future.result()
                    del waiting[key]
                    if waiting:
                        say()
            finally:
                pool.shutdown(cancel_futures=True)
        self._traced = {}

    @property
    def memory(self) -> int:
        """Bytes that a device needs for the batches, by the compiler, beside the parameters: the
        scratch memory of one program, and what all of them return, of two batches.
        """
        found = [program.memory_analysis() for program in self._compiled.values()]
        scratch = max(memory.temp_size_in_bytes for memory in found)
        return scratch + 2 * sum(memory.output_size_in_bytes for memory in found)

    def plain(
        self, params: Any, networks: Any, batch: dict[str, Array]
    ) -> tuple[Encoded, dict[str, Any]]:
        """What the others take; {"figures", "pictures", "latent", "energy", "index", ...}."""
        encoded, found = self._compiled[_PREPARE](params, networks, batch)
        same = np.int32(0)
        decoded = self._compiled[_DECODE](params, networks, encoded, same, same)
        figures = decoded["figures"] | found.pop("figures")
        return encoded, found | decoded | {"figures": figures}

    def transformed(
        self, t: Transformation, params: Any, networks: Any, encoded: Encoded
    ) -> dict[str, Any]:
        """{"figures": per image, by name, "pictures": (target, decoded) uint8}."""
        if t.scale is not None:
            return self._compiled[t.scale](params, networks, encoded)
        g = np.int32(self._action.index(t.name))
        inverse = np.int32(self._action.group.inverse[g])
        found = self._compiled[_DECODE](params, networks, encoded, g, inverse)
        found["figures"]["error"] = self._compiled[_ENCODE](params, encoded, g)
        return found

    def _prepare(
        self, params: Any, networks: Any, batch: dict[str, Array]
    ) -> tuple[Encoded, dict[str, Any]]:
        model = self._model
        x, target = model.views(to_float(batch["image"]))
        posterior = model.posterior(params, x)
        mean = z = model.clip(posterior.mean)
        if self._sample:
            z = model.clip(posterior.sample_each(self._keys(batch["index"], 0)))
        seen = self._networks.see(networks, target)
        found = {
            "figures": {"target": seen["features"]} if "features" in seen else {},
            "latent": z,
            "energy": {},
            **{name: batch[name] for name in ("index", "label", "mask")},
        }
        if z.ndim == 4:
            found["energy"] = {"latent": dct_energies(z), "image": dct_energies(target)}
        return Encoded(x, target, seen, z, mean, batch["index"]), found

    def _turn(
        self, params: Any, networks: Any, encoded: Encoded, g: Array, inverse: Array
    ) -> dict[str, Any]:
        act, noise = self._action, self._noise(encoded)
        noise = None if noise is None else act.image(g, noise)
        decoded = self._decode(params, act.latent(params, g, encoded.z), noise)
        # The networks know upright images, so it is the decoded image that is turned back.
        upright = act.image(inverse, decoded)
        figures = self._judge(networks, upright, encoded.target, encoded.seen)
        return {"figures": figures, "pictures": _pair(act.image(g, encoded.target), decoded)}

    def _error(self, params: Any, encoded: Encoded, g: Array) -> Array:
        act = self._action
        again = self._model.encode(params, act.image(g, encoded.x))
        return equivariance_error(act.latent(params, g, encoded.mean), again)

    def _scale(self, params: Any, networks: Any, encoded: Encoded, s: float) -> dict[str, Any]:
        def scaled(x: Array) -> Array:
            return groups.scale(x, tuple(round(n * s) for n in x.shape[1:3]), self._resampling)

        small = encoded._replace(target=scaled(encoded.target))
        decoded = self._decode(params, scaled(encoded.z), self._noise(small))
        seen = self._networks.see(networks, small.target)
        figures = self._judge(networks, decoded, small.target, seen)
        if "features" in seen:
            figures["target"] = seen["features"]
        again = self._model.encode(params, scaled(encoded.x))
        figures["error"] = equivariance_error(scaled(encoded.mean), again)
        return {"figures": figures, "pictures": _pair(small.target, decoded)}

    def _judge(
        self, networks: Any, decoded: Array, target: Array, seen: dict[str, Any]
    ) -> dict[str, Array]:
        ssim_range = self._protocol.ssim_range
        return self._networks.judge(networks, decoded, target, seen, ssim_range)

    def _decode(self, params: Any, z: Array, noise: Array | None) -> Array:
        return self._model.decode(params, z, noise, **self._options)

    def _noise(self, encoded: Encoded) -> Array | None:
        """That a flow starts from, for images of the target's sides."""
        if not self._model.is_flow:
            return None
        keys, shape = self._keys(encoded.index, 1), encoded.target.shape[1:]
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def _keys(self, index_B: Array, purpose: int) -> Array:
        key = jax.random.fold_in(jax.random.key(self._seed), purpose)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B)


def _pair(target: Array, decoded: Array) -> tuple[Array, Array]:
    return to_uint8_truncated(target), to_uint8_truncated(decoded)
