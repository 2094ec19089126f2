"""Files to read for a benchmark: images with the detail of photographs, in folders and shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((500, 375), (375, 500), (640, 480), (800, 600), (1024, 768))  # width, height
LABELS = 10
SHARD_IMAGES = 64


def photograph(number: int) -> Image.Image:
    """Image `number`, a pure function: noise whose octaves fall off as in photographs."""
    width, height = SIZES[number % len(SIZES)]
    random = np.random.default_rng(number)
    image = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, 8):
        grid = random.standard_normal((3 * 2**octave // 4 + 1, 2**octave + 1, 3), np.float32)
        for channel in range(3):
            plane = Image.fromarray(grid[..., channel]).resize((width, height), Image.BICUBIC)
            image[..., channel] += 60 * 0.55**octave * np.asarray(plane)
    image += 3 * random.standard_normal((height, width, 1), np.float32)  # a sensor's noise
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def write_folder(root: Path, images: int) -> None:
    """JPEGs of quality 90 at root/LABEL/NUMBER.jpg."""
    for number in range(images):
        path = root / f"{number % LABELS}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path, quality=90)


def write_shards(folder: Path, root: Path) -> str:
    """The files of a folder of `write_folder` as tar shards; returns a pattern that names them."""
    files = sorted(root.rglob("*.jpg"), key=lambda path: path.name)
    folder.mkdir(parents=True)
    for start in range(0, len(files), SHARD_IMAGES):
        with tarfile.open(folder / f"{start // SHARD_IMAGES:05d}.tar", "w") as tar:
            for path in files[start : start + SHARD_IMAGES]:
                for name, content in _members(path):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "*.tar")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    yield path.name, path.read_bytes()
    yield f"{path.stem}.cls", path.parent.name.encode()
