"""A small model of the original's kind; no parameter is zero, as some are when new."""

from __future__ import annotations

import jax
import numpy as np

from efae_jax.convert import efae

# Unlike the golden model in channels, heads and patch, and its image is not square.
ARCHITECTURE = {
    "channels": 3,
    "width": 64,
    "depth": 2,
    "heads": 2,
    "patch": 4,
    "latent_dim": 256,
    "group": "z2_h",
    "representation": "252*trivial + 4*sign",
}
IMAGE_SHAPE = (2, 16, 24, 3)


def random_params(architecture=ARCHITECTURE, seed=0):
    """Kernels of unit gain, scales around 1, biases around 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(name == "scale") + np.float32(0.2) * values

    abstract = {name: net.abstract for name, net in efae.nets(architecture).items()}
    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_inputs(seed=1):
    """Images, times and noise for `IMAGE_SHAPE`."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, IMAGE_SHAPE).astype(np.float32)
    noise = rng.standard_normal(IMAGE_SHAPE).astype(np.float32)
    return x, np.array([0.2, 0.9], np.float32), noise
