"""What the tests of efae_jax.data share: a config, small image files, a source of known pixels."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from efae_jax.data.left_out import LeftOut


def data_config(**changes) -> ml_collections.ConfigDict:
    fields = {
        "source": "folder",
        "path": "",
        "data_dir": "",
        "size": (8, 8),
        "channels": 3,
        "crop": "center",
        "flip": False,
        "pad": 0,
        "train_split": "train",
        "test_split": "test",
        "test_fraction": 0.0,
        "num_train": 10,
        "num_test": 4,
        "max_bad": 0,
        "max_pixels": 1_000_000,
    }
    return ml_collections.ConfigDict({**fields, **changes})


def picture(number: int, width: int = 12, height: int = 10) -> Image.Image:
    """A smooth picture without symmetry; the number shifts its colours."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    channels = [200 * x, 150 * y + 20, 90 * x * y + number % 50]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(
    path: Any, files: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> None:
    """Writes (name, content) pairs."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class Numbers:
    """`count` records; record i is a 4 x 4 image with i in the first pixel, a ramp elsewhere.

    The records in `broken` are a damaged file.
    """

    num_classes = 7
    class_names = ()

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.left_out = LeftOut()
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if index in self.broken:
            return {"image": b"not an image", "label": 0}
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) + 100
        image[0, 0] = index
        return {"image": image, "label": index % 7}

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"number {index}"
