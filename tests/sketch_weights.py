"""Weights of a disentangler as the original program writes them."""

from __future__ import annotations

import numpy as np
import safetensors.numpy
from weights import random_state_dict


def saved_state_dict(path, matrix, semantic=1):
    """Two embedders of width 2, with one block each, to 5 and to 6 numbers; returns the path."""
    shapes = {}
    sides = (("sem_embedder", semantic, 5), ("style_embedder", len(matrix) - semantic, 6))
    for side, inputs, dimension in sides:
        shapes |= {
            f"{side}.in_conv.weight": (2, inputs, 1, 1),
            f"{side}.in_conv.bias": (2,),
            f"{side}.blocks.0.in_conv.0.weight": (4, 2, 3, 3),
            f"{side}.blocks.0.in_conv.1.weight": (4,),
            f"{side}.blocks.0.in_conv.1.bias": (4,),
            f"{side}.blocks.0.block.0.weight": (8, 4, 1, 1),
            f"{side}.blocks.0.block.0.bias": (8,),
            f"{side}.blocks.0.block.2.weight": (4, 8, 1, 1),
            f"{side}.blocks.0.block.2.bias": (4,),
            **{f"{side}.embedder.1.{n}": (4,) for n in ("weight", "bias")},
            f"{side}.embedder.3.weight": (dimension, 4),
            f"{side}.embedder.3.bias": (dimension,),
        }
    tensors = random_state_dict(shapes)
    tensors["z_transform.weight"] = np.array(matrix, np.float32, order="C")
    path.write_bytes(safetensors.numpy.save(tensors))
    return path
