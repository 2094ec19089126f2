"""What going to a basis and back costs: nothing, if it is orthogonal."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from efae_jax.api import load
from efae_jax.data.pairs import Pairs
from efae_jax.errors import UserError
from efae_jax.metrics.images import psnr
from efae_jax.models.disentangler import change_channels

IMAGES = 16  # of the held-out ones, the first


def decoded_difference(
    pairs: Pairs, matrix: Float[np.ndarray, "C C"], indices: list[int]
) -> dict[str, Any]:
    """decode(Q^T Q z) against decode(z), for the first of some pairs, by the pairs' own model.

    Returns:
      {"psnr" (dB, mean), "largest" (difference of two pixels in [-1, 1]), "images"}, or
      {"missing": why}, where the model is not to be had.
    """
    summary = pairs.summary
    try:
        model = load(summary["model_source"])
        model.require("the reconstruction", ["decoder"])
    except UserError as error:
        return {"missing": f"the model of the latents cannot be read: {error}"}
    if model.identity["sha256"] != summary["latents"]["model"]["sha256"]:
        return {"missing": f"{summary['model_source']} is not the model of the latents any more"}
    options = {"key": jax.random.key(0)} if model.is_flow else {}
    change, quality, largest = jax.jit(change_channels), [], 0.0
    try:
        for i in indices[:IMAGES]:
            z = pairs[i]["latent"][None]
            back = change(matrix.T, change(matrix, z))
            plain, through = (model.decode(model.denormalise(v), **options) for v in (z, back))
            quality.append(float(psnr(through, plain)[0]))
            largest = max(largest, float(np.abs(np.asarray(through) - np.asarray(plain)).max()))
    except jax.errors.JaxRuntimeError as error:  # out of memory; the figures before are not lost
        return {"missing": f"decoding failed: {error}".split("\n")[0]}
    return {"psnr": float(np.mean(quality)), "largest": largest, "images": len(quality)}
