"""A network that tells images apart and compiles at once."""

import numpy as np
from einops import rearrange


class CornerMeans:
    """Stands for InceptionV3, which takes a minute to compile: means of an image's quarters."""

    size, smallest_side = 12, 1

    def __init__(self, name):
        self.name = name

    def __call__(self, params, pixels_BHWC):
        assert pixels_BHWC.dtype == np.uint8
        quarters = rearrange(pixels_BHWC, "b (p h) (q w) c -> b (p q c) (h w)", p=2, q=2)
        return quarters.astype(np.float32).mean(axis=-1) * params["weight"]
