"""Evaluations made up for the tests of what people see of them."""

from __future__ import annotations

import json
import zlib
from html.parser import HTMLParser

import numpy as np
from PIL import Image

TRANSFORMATIONS = {
    "r90": ("rotation", "rotation 90°"),
    "r180": ("rotation", "rotation 180°"),
    "h": ("flip", "horizontal flip"),
    "s0.5": ("scale", "scale 0.5"),
}
VOID = {"meta", "link", "img", "input", "br"}


def make_record(seed: int = 0, channels: int = 4, **changes):
    """A record with every figure; no two figures are equal."""
    rng = np.random.default_rng(seed)

    def quality():
        draw = rng.uniform(size=4).tolist()
        return {
            "psnr": 10 + 20 * draw[0],
            "ssim": draw[1],
            "lpips": draw[2],
            "frechet": 100 * draw[3],
        }

    transformations = [
        {"name": name, "kind": kind, "label": label, "error": rng.uniform(), **quality()}
        for name, (kind, label) in TRANSFORMATIONS.items()
    ]
    errors = {
        kind: float(np.mean([t["error"] for t in transformations if t["kind"] == kind]))
        for kind in ("rotation", "flip", "scale")
    }
    mean, std = rng.normal(size=channels), rng.uniform(0.5, 2, size=channels)
    edges = np.linspace(-6, 6, 25)
    centre = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-0.5 * ((centre - mean[:, None]) / std[:, None]) ** 2)
    density /= density.sum(axis=1, keepdims=True) * 0.5
    frequency, image_frequency = np.arange(1, 8) / 8, np.arange(1, 32) / 32
    return {
        "format": "efae_jax evaluation 1",
        "name": f"runs/model{seed}",
        "model": {
            "kind": "kl",
            "source": "owner/name",
            "step": 600,
            "sha256": f"{seed:08x}" * 8,
            "parameters": 83_653_863,
            "factor": 8,
            "latent_shape": [8, 8, channels],
            "group": "z2xz2",
            "representation": "",
            "dtype": "float32",
            "format": "diffusers",
        },
        "data": {
            "source": "folder",
            "path": "photos",
            "split": "test",
            "images": 1000,
            "unreadable": 2,
            "size": [64, 64],
            "keys": "ab" * 32,
        },
        "protocol": {
            "name": "eq-vae",
            "latent": "a sample of the posterior",
            "psnr": "per image, on uint8",
            "lpips": "VGG16",
            "frechet": "mean over positions",
            "equivariance error": "of the posterior's mean",
            "transformed": "bilinear",
            "latent space": "in the model's own units",
        },
        "frechet": "vgg16",
        "reconstruction": quality(),
        "transformations": transformations,
        "errors": errors,
        "latent": {
            "mean": mean.tolist(),
            "std": std.tolist(),
            "excess_kurtosis": rng.uniform(size=channels).tolist(),
            "correlation": np.eye(channels).tolist(),
            "mean_abs_correlation": rng.uniform(),
            "high_frequency": rng.uniform(),
            "high_frequency_image": 0.0211,
            "spectrum": {
                "frequency": frequency.tolist(),
                "latent": (frequency**-1.5).tolist(),
                "image_frequency": image_frequency.tolist(),
                "image": (image_frequency**-2.5).tolist(),
            },
            "histogram": {"edges": edges.tolist(), "density": density.tolist()},
            "intrinsic_dimension": 10 + 20 * rng.uniform(),
            "intrinsic_dimension_images": 1000,
            "velocity_irreducible_variance": {
                "value": 100 * rng.uniform(),
                "per_dimension": rng.uniform(),
                "classes": 10,
                "images": 900,
                "determined": True,
            },
        },
        "missing": {},
        "images": 1000,
        "seed": 7,
        "seconds": 251.5,
        "device": "cpu",
        "devices": 1,
        "versions": {"efae_jax": "0.4.0", "jax": "0.10.2"},
        **changes,
    }


def without(record, figure, why):
    """The same record without one of the figures of images."""
    rows = [{**t, figure: None} for t in record["transformations"]]
    return {
        **record,
        "reconstruction": {**record["reconstruction"], figure: None},
        "transformations": rows,
        "missing": {figure: why},
    }


def write_evaluation(folder, record, images=1, inputs=0, side=16):
    """Writes a record and its pictures; `inputs` seeds what does not depend on the model."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(record))
    given = np.random.default_rng(inputs)
    made = np.random.default_rng(zlib.crc32(record["name"].encode()))
    for n in range(images):
        for name in ("input", *(f"{t['name']}-target" for t in record["transformations"])):
            _save(pictures / f"{name}-{n}.png", given, side)
        for name in (
            "reconstruction",
            "pca",
            *(f"{t['name']}-decoded" for t in record["transformations"]),
        ):
            _save(pictures / f"{name}-{n}.png", made, side)
    return folder


def _save(path, rng, side):
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)


class Page(HTMLParser):
    """What a page holds, read by nothing that repairs it: tags must close in their order.

    tags: [(name, attributes)]; text: all of it but style; tables: [[[cell]]] of texts, where
    a cell that is emphasised ends in *; widths: [[columns that a row takes]].
    """

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.widths, self.text, self._open = [], [], [], "", []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.widths.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.widths[-1].append(0)
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.widths[-1][-1] += int(dict(attributes).get("colspan", 1))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "strong":
            self.tables[-1][-1][-1] += "*"

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if "tr" in self._open and ("td" in self._open or "th" in self._open):
            self.tables[-1][-1][-1] += data

    def of(self, tag):
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]
