"""Which implementation of attention is chosen, what it lowers to, and that all give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efae_jax.models import attention as module
from efae_jax.models.attention import (
    attention,
    choose_implementation,
    cuda_capability,
    late_division,
)

HOPPER, AMPERE, VOLTA = (9, 0), (8, 0), (7, 0)


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "head_width", "expected"),
    [
        ("gpu", HOPPER, jnp.bfloat16, 64, "cudnn"),
        ("gpu", AMPERE, jnp.float16, 128, "cudnn"),
        ("gpu", AMPERE, np.dtype(jnp.bfloat16), 8, "cudnn"),
        ("gpu", HOPPER, jnp.float32, 64, "xla"),
        ("gpu", HOPPER, jnp.bfloat16, 512, "xla"),  # AutoencoderKL's single head
        ("gpu", HOPPER, jnp.bfloat16, 60, "xla"),
        ("gpu", VOLTA, jnp.float16, 64, "xla"),
        ("gpu", None, jnp.bfloat16, 64, "xla"),
        ("tpu", None, jnp.bfloat16, 64, "xla"),
        ("tpu", None, jnp.float32, 64, "xla"),
        ("cpu", None, jnp.float32, 64, "late_division"),
        ("cpu", None, jnp.bfloat16, 64, "xla"),
    ],
)
def test_each_within_its_limits_only(backend, capability, dtype, head_width, expected):
    assert choose_implementation(backend, capability, dtype, head_width) == expected


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


def written_out(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bhls,bshd->blhd", weights, v)


@pytest.mark.parametrize("function", [attention, late_division])
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["", "scores that exp cannot take"])
def test_is_softmax_attention(function, scale):
    """Values, gradients, under remat and vmap; as many keys as queries or not."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 3, 8))
    q, k, v = scale * q, k[:, :5], v[:, :5]

    def everything(f):
        loss = lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v)))  # noqa: E731
        each = jax.vmap(f)(q[None], k[None], v[None])[0]
        return f(q, k, v), each, jax.grad(jax.checkpoint(loss), (0, 1, 2))(q, k, v)

    found, expected = (jax.jit(everything, static_argnums=0)(f) for f in (function, written_out))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The gradient for k has q, so scaled, as a factor of its rounding errors.
        np.testing.assert_allclose(a, b, atol=1e-6 * max(10, scale, float(jnp.abs(b).max())))
