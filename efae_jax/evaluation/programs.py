"""The compiled programs of an evaluation: pure functions of parameters and a batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from efae_jax import groups
from efae_jax.evaluation.networks import Networks
from efae_jax.evaluation.transformations import Action, Transformation
from efae_jax.methods.base import Autoencoder, to_float
from efae_jax.metrics.equivariance import equivariance_error
from efae_jax.metrics.images import to_uint8_truncated
from efae_jax.metrics.spectrum import dct_energies
from efae_jax.sharding import batch_sharding, replicated


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
    """Of one model on one size of images.

    `plain(params, networks, batch)` gives an `Encoded`, split over the devices, and figures,
    latents and pictures, whole; `transformed(t, params, networks, encoded)` figures and pictures
    under a transformation. Rotations and flips share a program, each scaling has its own.

    Args:
      model: the autoencoder.
      networks: that compare images.
      config: its `eval` says how a flow decodes.
      mesh: batches are split over all of it.
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
        sample: bool,
        resampling: str,
        seed: int,
        size: tuple[int, int],
        channels: int,
    ):
        self._model, self._networks, self._sample = model, networks, sample
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
        split, whole = batch_sharding(mesh), replicated(mesh)
        self.plain = jax.jit(self._plain, in_shardings=(None, whole, split),
                             out_shardings=(split, whole))  # fmt: skip
        self._turned = jax.jit(self._turn, in_shardings=(None, whole, split, None, None),
                               out_shardings=whole)  # fmt: skip
        self._scaled = jax.jit(self._scale, in_shardings=(None, whole, split),
                               out_shardings=whole, static_argnums=3)  # fmt: skip

    def transformed(
        self, t: Transformation, params: Any, networks: Any, encoded: Encoded
    ) -> dict[str, Any]:
        """{"figures": per image, by name, "pictures": (target, decoded) uint8}."""
        if t.scale is None:
            g = self._action.index(t.name)
            return self._turned(params, networks, encoded, g, self._action.group.inverse[g])
        return self._scaled(params, networks, encoded, t.scale)

    def _plain(
        self, params: Any, networks: Any, batch: dict[str, Array]
    ) -> tuple[Encoded, dict[str, Any]]:
        model = self._model
        x, target = model.views(to_float(batch["image"]))
        posterior = model.posterior(params, x)
        mean = z = model.clip(posterior.mean)
        if self._sample:
            z = model.clip(posterior.sample_each(self._keys(batch["index"], 0)))
        seen = self._networks.see(networks, target)
        encoded = Encoded(x, target, seen, z, mean, batch["index"])
        decoded = self._decode(params, z, self._noise(encoded))
        figures = self._networks.judge(networks, decoded, target, seen)
        if "features" in seen:
            figures["target"] = seen["features"]
        found = {
            "figures": figures,
            "pictures": _pair(target, decoded),
            "latent": z,
            "energy": {},
            **{name: batch[name] for name in ("index", "label", "mask")},
        }
        if z.ndim == 4:
            found["energy"] = {"latent": dct_energies(z), "image": dct_energies(target)}
        return encoded, found

    def _turn(
        self, params: Any, networks: Any, encoded: Encoded, g: Array, inverse: Array
    ) -> dict[str, Any]:
        act, noise = self._action, self._noise(encoded)
        noise = None if noise is None else act.image(g, noise)
        decoded = self._decode(params, act.latent(params, g, encoded.z), noise)
        # The networks know upright images, so it is the decoded image that is turned back.
        figures = self._networks.judge(
            networks, act.image(inverse, decoded), encoded.target, encoded.seen
        )
        again = self._model.encode(params, act.image(g, encoded.x))
        figures["error"] = equivariance_error(act.latent(params, g, encoded.mean), again)
        return {"figures": figures, "pictures": _pair(act.image(g, encoded.target), decoded)}

    def _scale(self, params: Any, networks: Any, encoded: Encoded, s: float) -> dict[str, Any]:
        def scaled(x: Array) -> Array:
            return groups.scale(x, tuple(round(n * s) for n in x.shape[1:3]), self._resampling)

        small = encoded._replace(target=scaled(encoded.target))
        decoded = self._decode(params, scaled(encoded.z), self._noise(small))
        seen = self._networks.see(networks, small.target)
        figures = self._networks.judge(networks, decoded, small.target, seen)
        if "features" in seen:
            figures["target"] = seen["features"]
        again = self._model.encode(params, scaled(encoded.x))
        figures["error"] = equivariance_error(scaled(encoded.mean), again)
        return {"figures": figures, "pictures": _pair(small.target, decoded)}

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
