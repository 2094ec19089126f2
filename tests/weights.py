"""Weights for the tests of the formats: made, compared, refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from efae_jax.convert import layout
from efae_jax.errors import UserError

SHARED = Path(__file__).parents[2] / "shared"


def needs(name):
    """Skips a test where a file of golden numbers or of published weights is not there."""
    path = SHARED / name
    return pytest.mark.skipif(not path.exists(), reason=f"no {name} here")


def error_of(function, *args, **kwargs):
    """The message of the user's error that a call must end in; a single line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def assert_same_bytes(a, b):
    """Same names, shapes, types and bits."""
    a, b = layout.flatten(a), layout.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert a[name].tobytes() == b[name].tobytes(), name


def random_state_dict(shapes, dtype=np.float32, seed=0):
    """Weights of unit gain, scales around 1, biases around 0: no two tensors are alike."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            return values / np.sqrt(np.prod(shape[1:]))
        return 0.2 * values + name.endswith("weight")

    return {name: draw(name, shape).astype(dtype) for name, shape in shapes.items()}


def torch_shapes(table, abstract):
    """Name -> shape of the state dict that a table gives of a model's abstract parameters."""
    flat = layout.flatten(abstract)
    return {entry.theirs: layout.torch_shape(entry, flat[entry.ours]) for entry in table}


def assert_close(ours, golden, relative=1e-4):
    """Within `relative` of the largest golden number."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    assert ours.shape == golden.shape
    np.testing.assert_allclose(ours, golden, rtol=0, atol=relative * np.abs(golden).max())


def nhwc(x):
    """From PyTorch's NCHW."""
    return np.transpose(np.asarray(x), (0, 2, 3, 1))
