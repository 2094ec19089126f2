"""The FID's InceptionV3 and its weights: golden numbers, files, mistakes."""

from __future__ import annotations

import ast
import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from inception_weights import NET, shapes, state_dict
from tiny_nets import operations
from weights import SHARED, assert_close, assert_same_bytes, error_of, needs, nhwc

from efae_jax.convert import hub, layout
from efae_jax.convert.fingerprint import identify
from efae_jax.convert.inception import read_inception
from efae_jax.models.frechet_features import torch_fidelity_input
from efae_jax.models.inception import _average_pool

GOLDEN = SHARED / "fixtures" / "inception_fid.npz"
needs_golden = needs("fixtures/inception_fid.npz")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Safetensors with all that the published files hold."""
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    safetensors.numpy.save_file(state_dict(), path)
    return path


@pytest.fixture(scope="module")
def params(path):
    return read_inception(path)


@pytest.fixture(scope="module")
def taps():
    return jax.jit(lambda params, x: NET(params, x, method="taps"))


# Of each tap, for two images: its sum, and its sum weighted by cos 0, cos 1, cos 2, ...
RECORDED = {
    64: [[41.08289, 0.813403], [40.79934, 0.760399]],
    192: [[209.7504, -0.324354], [209.7882, -0.407316]],
    768: [[2661.844, 52.8926], [2646.915, 51.47327]],
    2048: [[13046.02, -144.9015], [13030.53, -146.9443]],
}


def test_recorded_numbers(params, taps):
    """What this program gave when it agreed with the golden numbers to 4e-7."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3))
    found = taps(params, torch_fidelity_input(pixels))
    assert {size: tap.shape for size, tap in found.items()} == {n: (2, n) for n in RECORDED}
    for size, recorded in RECORDED.items():
        weights = np.stack([np.ones(size), np.cos(np.arange(size))], axis=1)
        largest = np.abs(found[size]).max()
        sums = np.asarray(found[size], np.float64) @ weights
        np.testing.assert_allclose(sums, recorded, rtol=1e-5, atol=1e-4 * largest)


@needs_golden
def test_golden_numbers_of_the_published_program(params, taps):
    with np.load(GOLDEN) as golden:
        found = taps(params, torch_fidelity_input(nhwc(golden["in/images"])))
        for size, tap in found.items():
            assert_close(tap, golden[f"out/f{size}"], 1e-5)


@needs_golden
def test_names_and_shapes_are_the_published_ones():
    with np.load(GOLDEN) as golden:
        named = zip(golden["in/state_dict_keys"], golden["in/state_dict_shapes"], strict=True)
        assert {str(n): ast.literal_eval(str(shape)) for n, shape in named} == shapes()


def test_only_the_last_features_unless_all_are_asked_for():
    found = jax.eval_shape(NET.__call__, NET.abstract, jnp.zeros((3, 299, 299, 3)))
    assert found.shape == (3, 2048)


def test_convolutions_have_the_highest_precision():
    program = jax.make_jaxpr(NET.__call__)(NET.abstract, jnp.zeros((1, 299, 299, 3))).jaxpr
    convs = [e for e in operations(program) if e.primitive.name == "conv_general_dilated"]
    assert len(convs) == 94
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert {e.params["precision"] for e in convs} == {highest}


def test_average_pools_do_not_count_the_padding():
    np.testing.assert_allclose(_average_pool(jnp.ones((1, 4, 5, 2))), 1, rtol=1e-6)


def test_files_of_torch_save_give_the_same(params, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(tensor) for name, tensor in state_dict().items()}
    path = tmp_path / "weights.pth"
    # The published files are older than PyTorch's zip format.
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert_same_bytes(read_inception(path), params)


@pytest.mark.parametrize(
    "changes",
    [
        {"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)},
        {"AuxLogits.conv0.conv.weight": np.zeros((128, 768, 1, 1))},
    ],
)
def test_torchvisions_network_is_called_so(changes, tmp_path):
    """The same names and shapes up to the last feature, and other weights."""
    changes = {name: a.astype(np.float32) for name, a in changes.items()}
    path = tmp_path / "inception_v3_google.safetensors"
    safetensors.numpy.save_file(state_dict() | changes, path)
    message = error_of(read_inception, path)
    assert f"{path} is torchvision's InceptionV3" in message
    assert "pt_inception-2015-12-05-6726825d.pth" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fc.weight": None, "fc.bias": None}, "2 missing: fc.bias, fc.weight"),
        ({"fc.bias": np.zeros(5, np.float32)}, "fc.bias is (5,), expected (1008,)"),
        ({"fc.bias": np.full(1008, np.nan, np.float32)}, "1 of 472 tensors hold numbers that"),
        ({"Conv2d_3b_1x1.bn.bias": np.full(80, np.inf, np.float16)}, "finite: Conv2d_3b_1x1.bn.b"),
    ],
)
def test_the_whole_network_is_looked_at(changes, expected, tmp_path):
    tensors = {n: a for n, a in (state_dict() | changes).items() if a is not None}
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(tensors, path)
    assert expected in error_of(read_inception, path)


def test_a_name_that_states_another_fingerprint_is_said(tmp_path, caplog):
    content = b"no weights"
    digest = hashlib.sha256(content).hexdigest()
    for name in (f"net-{digest[:8]}.pth", "net.pth", "net-2015-12-05.pth"):
        (tmp_path / name).write_bytes(content)
        assert identify(tmp_path / name) == {"file": name, "sha256": digest}
    assert not caplog.text
    other = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    other.write_bytes(content)
    assert identify(other)["sha256"] == digest
    assert f"begins with {digest[:8]}, that of the published one with 6726825d" in caplog.text
    assert "cannot read" in error_of(identify, tmp_path / "none-6726825d.pth")


def test_all_mistakes_are_listed_in_one_line(tmp_path):
    tensors = {n: a for n, a in state_dict().items() if not n.startswith("Mixed_")}
    del tensors["Conv2d_1a_3x3.bn.running_var"]
    tensors["Conv2d_3b_1x1.conv.weight"] = np.zeros((80, 64, 3, 3), np.float32)
    tensors["Conv2d_3b_1x1.bn.bias"] = np.zeros(80, np.int32)
    tensors["fc2.weight"] = tensors["Conv2d_9.bn.num_batches_tracked"] = np.zeros(3)
    path = tmp_path / "weights.npz"
    np.savez(path, **tensors)
    message = error_of(read_inception, path)
    # 89 convolutions of five tensors each are in the blocks.
    for part in (
        f"{path} does not hold the FID's InceptionV3: 446 missing: Conv2d_1a_3x3.bn.running_var, "
        "Mixed_5b.branch1x1.bn.bias",
        "Mixed_7c.branch_pool.conv.weight; 1 left over: fc2.weight; ",
        "Conv2d_3b_1x1.conv.weight is (80, 64, 3, 3), expected (80, 64, 1, 1)",
        "Conv2d_3b_1x1.bn.bias is int32",
    ):
        assert part in message


def test_files_of_the_hub(path, params, monkeypatch, tmp_path):
    assert "one of the hub is named owner/name/FILE" in error_of(read_inception, "owner/name")
    asked = []

    def fetch(source):
        asked.append(source)
        return path

    monkeypatch.setattr(hub, "fetch", fetch)
    assert_same_bytes(read_inception("owner/name/weights.pth"), params)
    assert asked == ["owner/name/weights.pth"]
    assert "cannot read /no/file.pth" in error_of(read_inception, "/no/file.pth")
    # What is here is not looked for there.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    shutil.copy(path, tmp_path / "owner" / "name" / "weights.pth")
    monkeypatch.chdir(tmp_path)
    assert_same_bytes(read_inception("owner/name/weights.pth"), params)
    assert len(asked) == 1


def test_kernels_are_transposed_and_statistics_kept(params):
    flat = layout.flatten(params)
    weight = state_dict()["Mixed_6b.branch7x7_2.conv.weight"]
    kernel = flat["Mixed_6b/branch7x7_2/conv/kernel"]
    np.testing.assert_array_equal(kernel, weight.transpose(2, 3, 1, 0))
    assert kernel.shape == (1, 7, 128, 128)
    for ours, theirs in (("mean", "running_mean"), ("var", "running_var"), ("scale", "weight")):
        np.testing.assert_array_equal(
            flat[f"Mixed_7c/branch_pool/bn/{ours}"],
            state_dict()[f"Mixed_7c.branch_pool.bn.{theirs}"],
        )
