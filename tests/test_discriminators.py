"""Discriminators: golden numbers, PyTorch's batch norm, many devices, starts, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_lpips import needs_weights

from efae_jax import losses
from efae_jax.convert import layout, perceptual
from efae_jax.models.discriminators import (
    BatchNorm,
    PatchGAN,
    VGGPatchDiscriminator,
    initial_statistics,
    trunk_stages,
)
from efae_jax.models.functional import Net
from efae_jax.models.vgg import VGG16, scale_input
from efae_jax.sharding import batch_sharding, make_mesh, replicated

FIXTURES = ROOT.parent / "shared" / "fixtures"
needs_golden = pytest.mark.skipif(not FIXTURES.exists(), reason="no golden numbers here")


def golden(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def nhwc(x):
    return np.transpose(x, (0, 2, 3, 1))


def images(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# On VGG16.


def vgg(form, **options):
    return Net(lambda rngs: VGGPatchDiscriminator(form, rngs=rngs, **options))


@needs_golden
@needs_weights
def test_golden_logits_of_the_later_form():
    arrays = golden("aura_losses")
    tensors = {k.removeprefix("sd/"): a for k, a in arrays.items() if k.startswith("sd/")}
    params = perceptual.patch_heads(tensors) | {"trunk": perceptual.read_vgg16()}
    logits = jax.jit(vgg("later").__call__)(params, nhwc(arrays["in/image"]))
    assert logits.shape == (2, 16, 16)
    expected = arrays["out/patch_logits"]
    error = np.abs(logits.reshape(2, -1) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("form", "side", "logits"),
    [
        ("released", (256, 256), (64, 64)),
        ("released", (4, 11), (1, 2)),
        ("later", (256, 256), (16, 16)),
        ("later", (16, 16), (1, 1)),
        ("later", (33, 62), (2, 3)),
        ("later", (127, 111), (7, 6)),
    ],
)
def test_one_logit_for_every_4_or_16_pixels(form, side, logits):
    net = vgg(form)
    x = jax.ShapeDtypeStruct((2, *side, 3), jnp.float32)
    assert jax.eval_shape(net.__call__, net.abstract, x).shape == (2, *logits)


@pytest.mark.parametrize(("form", "smallest"), [("released", 4), ("later", 16)])
def test_smaller_images_are_refused(form, smallest):
    net = vgg(form)
    x = jax.ShapeDtypeStruct((1, smallest, smallest - 1, 3), jnp.float32)
    with pytest.raises(ValueError, match=f"{smallest}x{smallest - 1} .* at least {smallest}"):
        jax.eval_shape(net.__call__, net.abstract, x)


def test_unknown_form():
    with pytest.raises(ValueError, match="'new' does not exist; allowed: released, later"):
        vgg("new")


def shapes(tree):
    return {name: leaf.shape for name, leaf in layout.flatten(tree).items() if "kernel" in name}


def test_parameters_of_the_released_form_are_seven_convolutions_and_one_bias_free_head():
    abstract = vgg("released").abstract
    assert trunk_stages("released") == 3
    assert len(abstract["trunk"]["convs"]) == 7
    assert shapes(abstract["head"]) == {"kernel": (1, 1, 256, 1)}
    assert list(abstract["head"]) == ["kernel"]


def test_heads_of_the_later_form_end_in_zero_and_begin_with_numbers():
    net = vgg("later")
    assert list(shapes(net.abstract["heads"]).values()) == [
        *[(4, 4, 64, 32), (4, 4, 32, 1)],
        *[(4, 4, 128, 64), (2, 2, 64, 1)],
        *[(2, 2, 256, 128), (2, 2, 128, 1)],
        (2, 2, 512, 1),
        (1, 1, 512, 1),
    ]
    heads = jax.jit(lambda key: net.init(key)["heads"])(jax.random.key(0))
    for head in heads.values():
        *first, last = head["convs"].values()
        assert not np.any(last["kernel"])
        assert not np.any(last["bias"])
        assert all(np.any(conv["kernel"]) for conv in first)


def random_like(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: (0.05 * rng.standard_normal(p.shape)).astype(np.float32), abstract
    )


def test_logits_of_the_later_form_are_the_sum_over_heads():
    net = vgg("later")
    params, x = random_like(net.abstract), images(0, 1, 16, 32, 3)
    call = jax.jit(net.__call__)
    zero = jax.tree.map(np.zeros_like, params["heads"])
    parts = [
        call({**params, "heads": {**zero, name: head}}, x) for name, head in params["heads"].items()
    ]
    assert all(np.any(part) for part in parts)
    np.testing.assert_allclose(sum(parts), call(params, x), rtol=1e-4, atol=1e-5)


def test_released_form_is_a_linear_map_of_relu3_3_and_trains_its_trunk():
    net = vgg("released")
    params, x = random_like(net.abstract), images(0, 1, 8, 12, 3)

    def mean(params):
        logits = net(params, x)
        return logits.mean(), logits

    gradient, logits = jax.jit(jax.grad(mean, has_aux=True))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    trunk = Net(lambda rngs: VGG16(3, rngs=rngs))
    relu3_3 = jax.jit(trunk.__call__)(params["trunk"], scale_input(x))[2]
    expected = np.einsum("bhwc,c->bhw", relu3_3, params["head"]["kernel"][0, 0, :, 0])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)


# PatchGAN.


def patchgan(**options):
    return Net(lambda rngs: PatchGAN(rngs=rngs, **options))


TINY = {"features": 4, "layers": 2}


@pytest.fixture(scope="module")
def tiny():
    """(net, params)."""
    net = patchgan(**TINY)
    return net, jax.jit(net.init)(jax.random.key(0))


def read_patchgan(arrays):
    """(params, statistics) of LDM's discriminator."""
    prefix = "sd/discriminator.main."
    tensors = {
        k.removeprefix(prefix): a
        for k, a in arrays.items()
        if k.startswith(prefix) and "num_batches" not in k
    }
    kernels = [
        layout.Entry(f"{n}.weight", f"convs/{i}/kernel", layout.CONV)
        for i, n in enumerate((0, 2, 5, 8, 11))
    ]
    biases = [
        layout.Entry(f"{n}.bias", f"convs/{i}/bias", layout.SAME) for i, n in ((0, 0), (4, 11))
    ]
    norms, statistics = [], {}
    for i, n in enumerate((3, 6, 9)):
        norms += layout.norm(str(n), f"norms/{i}")
        statistics[str(i)] = {
            "mean": tensors.pop(f"{n}.running_mean"),
            "var": tensors.pop(f"{n}.running_var"),
        }
    table = kernels + biases + norms
    assert not layout.name_problems((e.theirs for e in table), tensors)
    assert not layout.tensor_problems(table, tensors, patchgan().abstract)
    return layout.to_ours(table, tensors), statistics


@needs_golden
def test_golden_numbers_of_ldms_patchgan():
    arrays = golden("ldm_loss")
    params, statistics = read_patchgan(arrays)
    start = initial_statistics(params)
    jax.tree.map(np.testing.assert_array_equal, start, statistics)
    call = jax.jit(lambda p, x, s: patchgan()(p, x, s, training=True))
    real, statistics = call(params, nhwc(arrays["in/x"]), statistics)
    fake, statistics = call(params, nhwc(arrays["out/recon"]), statistics)
    assert real.shape == (2, 6, 6)
    loss = losses.discriminator_loss(real, fake, "hinge", halved=True).mean()
    np.testing.assert_allclose(real.mean(), arrays["out/logits_real"], rtol=1e-4)
    np.testing.assert_allclose(fake.mean(), arrays["out/logits_fake"], rtol=1e-4)
    np.testing.assert_allclose(loss, arrays["out/disc_loss"], rtol=1e-5)
    g_loss = losses.generator_loss(fake, "hinge").mean()
    np.testing.assert_allclose(g_loss, arrays["out/g_loss"], rtol=1e-4)


def test_patchgan_equals_pytorch_modules_in_training_and_in_evaluation(tiny):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    net, params = tiny
    modules = []
    for i, conv in params["convs"].items():
        i, kernel = int(i), np.transpose(conv["kernel"], (3, 2, 0, 1))
        out, inside = kernel.shape[:2]
        layer = nn.Conv2d(inside, out, 4, 2 if i < 2 else 1, 1, bias="bias" in conv)
        layer.weight.data = torch.tensor(kernel)
        if "bias" in conv:
            layer.bias.data = torch.tensor(np.array(conv["bias"]))
        modules.append(layer)
        if 0 < i < 3:
            norm = nn.BatchNorm2d(out)
            norm.weight.data = torch.tensor(np.array(params["norms"][str(i - 1)]["scale"]))
            norm.bias.data = torch.tensor(np.array(params["norms"][str(i - 1)]["bias"]))
            modules.append(norm)
        if i < 3:
            modules.append(nn.LeakyReLU(0.2))
    theirs = nn.Sequential(*modules)
    run = jax.jit(net.__call__, static_argnames="training")
    statistics = initial_statistics(params)

    def check(x, training):
        nonlocal statistics
        theirs.train(training)
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy()[:, 0]
        logits, statistics = run(params, x, statistics, training=training)
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
        norms = [m for m in theirs if isinstance(m, nn.BatchNorm2d)]
        for ours, norm in zip(statistics.values(), norms, strict=True):
            np.testing.assert_allclose(ours["mean"], norm.running_mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(ours["var"], norm.running_var, rtol=1e-4)

    for seed in range(3):
        check(0.3 + images(seed, 3, 16, 20, 3), training=True)
    check(images(3, 3, 16, 20, 3), training=False)


def test_batch_of_eight_devices_has_the_statistics_and_gradients_of_one(tiny):
    net, params = tiny
    # Every device sees images of another brightness and contrast.
    x = images(0, 8, 12, 12, 3) * np.linspace(0.2, 2, 8, dtype=np.float32)[:, None, None, None]
    x += np.arange(8, dtype=np.float32)[:, None, None, None] / 4

    def loss(params, x, statistics):
        logits, statistics = net(params, x, statistics, training=True)
        return jnp.mean(jnp.square(logits)), (logits, statistics)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    statistics = initial_statistics(params)
    one = step(params, x, statistics)
    mesh = make_mesh()
    eight = step(
        *jax.device_put((params,), replicated(mesh)),
        jax.device_put(x, batch_sharding(mesh)),
        jax.device_put(statistics, replicated(mesh)),
    )
    assert len(eight[0][1][0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def normed(net, params, x, statistics, training):
    run = jax.jit(net.__call__, static_argnames="training")
    return run(params, x, statistics, training=training)


def test_batch_norm_in_training_gives_zero_mean_and_unit_variance_whatever_comes_in():
    net = Net(lambda rngs: BatchNorm(3, rngs=rngs))
    params = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
    # A mean far above the spread: one pass in float32 would lose the variance.
    x = 1000 + images(0, 4, 5, 6, 3)
    start = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    y, moved = normed(net, params, x, start, True)
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(y.var(axis=(0, 1, 2)), 1, rtol=1e-3)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(moved["mean"], 0.1 * exact.mean(axis=(0, 1, 2)), rtol=1e-5)
    unbiased = exact.var(axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(moved["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_keeps_them(tiny):
    net, params = tiny
    statistics = jax.tree.map(lambda a: a + 0.5, initial_statistics(params))
    x = images(0, 2, 12, 12, 3)
    logits, kept = normed(net, params, x, statistics, False)
    jax.tree.map(np.testing.assert_array_equal, kept, statistics)
    # Without batch statistics no image sees another.
    alone, _ = normed(net, params, np.stack([x[0], 0 * x[1]]), statistics, False)
    np.testing.assert_allclose(alone[0], logits[0], rtol=1e-5)
    trained, _ = normed(net, params, x, statistics, True)
    assert np.abs(trained - logits).max() > 1e-3


def test_running_statistics_receive_no_gradient_and_give_none(tiny):
    net, params = tiny
    x = images(0, 2, 12, 12, 3)

    def moved(params):
        _, statistics = net(params, x, initial_statistics(params), training=True)
        return sum(leaf.sum() for leaf in jax.tree.leaves(statistics))

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(moved))(params)))


def test_widths_of_the_patchgan():
    assert shapes(patchgan().abstract) == {
        "convs/0/kernel": (4, 4, 3, 64),
        "convs/1/kernel": (4, 4, 64, 128),
        "convs/2/kernel": (4, 4, 128, 256),
        "convs/3/kernel": (4, 4, 256, 512),
        "convs/4/kernel": (4, 4, 512, 1),
    }
    deep = patchgan(features=2, layers=5).abstract["convs"]
    assert [conv["kernel"].shape[-1] for conv in deep.values()] == [2, 4, 8, 16, 16, 16, 1]


def test_start_of_the_patchgan():
    params = jax.jit(patchgan(features=16).init)(jax.random.key(0))
    assert ["bias" in conv for conv in params["convs"].values()] == [True, *[False] * 3, True]
    for conv in params["convs"].values():
        np.testing.assert_allclose(np.std(conv["kernel"]), 0.02, rtol=0.1)
    scales = np.concatenate([norm["scale"] for norm in params["norms"].values()])
    np.testing.assert_allclose([scales.mean(), scales.std()], [1, 0.02], rtol=0.15)
    biases = [norm["bias"] for norm in params["norms"].values()]
    biases += [params["convs"][i]["bias"] for i in "04"]
    assert not any(np.any(bias) for bias in biases)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_side_of_the_patchgan_leaves_one_logit(layers):
    net = patchgan(features=2, layers=layers)
    side = 3 * 2**layers

    def call(height, width):
        x = jnp.zeros((2, height, width, 3))
        start = initial_statistics(net.abstract)
        return jax.eval_shape(lambda p, x: net(p, x, start, training=True)[0], net.abstract, x)

    assert call(side, side).shape == (2, 1, 1)
    with pytest.raises(ValueError, match=f"{side}x{side - 1} .* at least {side}"):
        call(side, side - 1)


def test_bfloat16_convolves_in_it_and_normalises_in_float32(tiny):
    net, params = tiny
    half = patchgan(**TINY, dtype=jnp.bfloat16)
    x, start = images(0, 4, 16, 20, 3), initial_statistics(params)
    logits, statistics = normed(half, params, x, start, True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((logits, statistics))} == {"float32"}
    expected, _ = normed(net, params, x, start, True)
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_a_single_value_cannot_be_normalised():
    net = Net(lambda rngs: BatchNorm(3, rngs=rngs))
    start = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    with pytest.raises(ValueError, match="a single value"):
        net(net.abstract, jnp.zeros((1, 1, 1, 3)), start, training=True)
