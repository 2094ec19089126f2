"""Which implementation of attention is chosen, what it lowers to, and that all give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efae_jax.models import attention as module
from efae_jax.models.attention import attention, choose_implementation, cuda_capability

HOPPER, AMPERE, VOLTA = (9, 0), (8, 0), (7, 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_width", "expected"),
    [
        (HOPPER, jnp.bfloat16, 64, "cudnn"),
        (AMPERE, jnp.float16, 128, "cudnn"),
        (AMPERE, np.dtype(jnp.bfloat16), 8, "cudnn"),
        (HOPPER, jnp.float32, 64, "xla"),
        (HOPPER, jnp.bfloat16, 512, "xla"),  # AutoencoderKL's single head
        (HOPPER, jnp.bfloat16, 60, "xla"),
        (VOLTA, jnp.float16, 64, "xla"),
        (None, jnp.bfloat16, 64, "xla"),
    ],
)
def test_cudnn_within_its_limits_only(capability, dtype, head_width, expected):
    assert choose_implementation(capability, dtype, head_width) == expected


@pytest.mark.parametrize(
    ("backend", "name", "expected"),
    [
        ("gpu", "9.0", (9, 0)),
        ("gpu", "12.1", (12, 1)),
        ("gpu", "gfx90a", None),
        ("cpu", "9.0", None),
        ("tpu", "", None),
    ],
)
def test_capability_of_the_device(monkeypatch, backend, name, expected):
    class Device:
        compute_capability = name

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert cuda_capability() == expected


def total(q, k, v):
    return attention(q, k, v).astype(jnp.float32).sum()


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (total, ["fmhaSoftmax("]),
        (jax.grad(total, (0, 1, 2)), ["fmhaSoftmax(", "fmhaSoftmaxBackward("]),
        (jax.grad(jax.checkpoint(total)), ["fmhaSoftmax(", "fmhaSoftmaxBackward("]),
        (lambda q, k, v: jax.vmap(attention)(q[None], k[None], v[None]), ["fmhaSoftmax("]),
    ],
    ids=["forward", "grad", "remat", "vmap"],
)
def test_lowers_to_cudnn_for_cuda(monkeypatch, function, calls):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(cudnn, "check_cudnn_version"):
        pytest.skip("this JAX looks for cuDNN elsewhere")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # there is none here
    monkeypatch.setattr(module, "cuda_capability", lambda: HOPPER)
    q = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    text = jax.jit(function).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    for call in calls:
        assert f"__cudnn${call}" in text


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_is_softmax_attention(transform):
    """Here, whatever is chosen; written out beside it."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 3, 8))
    weights = jax.nn.softmax(jnp.einsum("blhd,bshd->bhls", q, k) / np.sqrt(8), axis=-1)
    expected = jnp.einsum("bhls,bshd->blhd", weights, v)
    if transform is jax.vmap:
        found = jax.vmap(attention)(q[None], k[None], v[None])[0]
    else:
        found = transform(attention)(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
