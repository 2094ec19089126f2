"""Networks that compile in a second or two, with parameters of which none is zero."""

from __future__ import annotations

import functools

import jax
import numpy as np

from efae_jax.models.dit import DiT
from efae_jax.models.encoder import ConvEncoder
from efae_jax.models.functional import Net
from efae_jax.models.unet import UNet

# Compiles in half the time; for programs that run only a few times.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LATENT = 4
IMAGE = (2, 16, 24, 3)  # not square


@functools.cache
def dit(factor=8, **changes):
    sizes = {"channels": 3, "width": 16, "depth": 1, "heads": 2, "patch": 4} | changes
    return Net(lambda rngs: DiT(latent_channels=LATENT, factor=factor, rngs=rngs, **sizes))


@functools.cache
def unet(factor=8, **changes):
    sizes = {"channels": 3, "widths": (8, 16), "blocks": 1, "stem": 2} | changes
    return Net(lambda rngs: UNet(latent_channels=LATENT, factor=factor, rngs=rngs, **sizes))


@functools.cache
def encoder(**changes):
    sizes = {"channels": 3, "widths": (8, 16), "blocks": 1, "stem": 4} | changes
    return Net(lambda rngs: ConvEncoder(latent_channels=LATENT, rngs=rngs, **sizes))


FIELDS = {"dit": dit, "unet": unet}


def random_params(net, seed=0):
    """Kernels of unit gain, scales around 1, biases around 0: nothing starts at zero.

    The values depend on names and shapes only, so that variants of a net share them.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(path[-1].key == "scale") + np.float32(0.2) * values

    return jax.tree_util.tree_map_with_path(draw, net.abstract)


def inputs(factor=8, seed=1):
    """x_t, t and z for `IMAGE`; factor None gives vectors z."""
    rng = np.random.default_rng(seed)
    batch, height, width, _ = IMAGE
    sides = () if factor is None else (height // factor, width // factor)
    x = rng.standard_normal(IMAGE).astype(np.float32)
    z = rng.standard_normal((batch, *sides, LATENT)).astype(np.float32)
    return x, np.array([0.2, 0.7], np.float32), z


@functools.cache
def compiled(net):
    """The net as a compiled function of its parameters and inputs."""
    return quick_jit(net.__call__)


def fresh(net, *arguments):
    """The output of a new net."""
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the usual generator
    return quick_jit(lambda key: net(net.init(key), *arguments))(key)


def operations(jaxpr):
    """Every equation of a program, those inside its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def assert_remat_changes_nothing(make, *arguments, blocks):
    """Every block is recomputed; the output stays; every parameter has its gradient."""
    net = make(remat=True)
    params = random_params(net)
    names = [e.primitive.name for e in operations(jax.make_jaxpr(net)(params, *arguments).jaxpr)]
    assert sum(name.startswith("remat") for name in names) == blocks

    def loss(net, params):
        return (net(params, *arguments) ** 2).mean()

    value, gradient = quick_jit(jax.value_and_grad(lambda p: loss(net, p)))(params)
    plain = functools.partial(loss, compiled(make()))
    np.testing.assert_allclose(value, plain(params), rtol=1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf), path
    # Along the gradient the loss without rematerialisation changes by the gradient's norm.
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    at = lambda s: plain(jax.tree.map(lambda p, g: p + s / norm * g, params, gradient))  # noqa: E731
    step = 0.02 * value / norm
    np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), norm, rtol=0.02)


def assert_bfloat16_computes(make, *arguments):
    """Products in bfloat16, norms and softmax in float32, float32 in and out, and near float32."""
    half = make(dtype=jax.numpy.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.abstract)} == {"float32"}
    params = random_params(half)
    types = {}
    for equation in operations(jax.make_jaxpr(half.__call__)(params, *arguments).jaxpr):
        kinds = types.setdefault(equation.primitive.name, set())
        kinds.update(v.aval.dtype.name for v in equation.invars)
    for name in {"dot_general", "conv_general_dilated"} & set(types):
        assert types[name] == {"bfloat16"}, name
    for name in {"exp", "rsqrt", "cos"} & set(types):
        assert types[name] == {"float32"}, name
    got = compiled(half)(params, *arguments)
    exact = np.asarray(compiled(make())(params, *arguments))
    assert got.dtype == np.float32
    assert 0 < np.std(got - exact) < 0.03 * np.std(exact)
