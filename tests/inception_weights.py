"""Weights of the FID's InceptionV3 under their published names, made from nothing but these."""

from __future__ import annotations

import functools

import numpy as np

from efae_jax.convert import inception, layout
from efae_jax.models.functional import Net
from efae_jax.models.inception import InceptionV3

NET = Net(lambda rngs: InceptionV3(rngs=rngs))


def shapes():
    """Name -> shape, of all that the published files hold."""
    flat = layout.flatten(NET.abstract)
    made = {e.theirs: layout.torch_shape(e, flat[e.ours]) for e in inception.table(NET.abstract)}
    norms = [name.removesuffix("weight") for name in made if name.endswith(".bn.weight")]
    made |= {f"{norm}num_batches_tracked": () for norm in norms}
    return made | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


@functools.cache
def state_dict():
    """The recipe of the golden numbers: each tensor follows from its place among the names."""
    return {
        name: np.array(0)
        if name.endswith("num_batches_tracked")
        else _tensor(name, shape, np.random.default_rng(i)).astype(np.float32)
        for i, (name, shape) in enumerate(sorted(shapes().items()))
    }


def _tensor(name, shape, r):
    if name.endswith("running_var"):
        return 0.5 + r.random(shape)
    if name.endswith(("running_mean", "bias")):
        return 0.1 * r.standard_normal(shape)
    if name.endswith(".bn.weight"):
        return 0.5 + r.random(shape)
    return r.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
