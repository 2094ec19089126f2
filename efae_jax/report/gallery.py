"""The pictures of evaluations, as they lie in a page: beside one another, inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from efae_jax.errors import UserError
from efae_jax.report.records import Record, label_of

FOLDER = "pictures"
COUNT = (6, 4)  # images shown of one model, of several
SMALL, MOST = 128, 512  # pixels: up to here as they are, and the longer side of the others
QUALITY = 90

_X, _TX = Markup("<var>x</var>"), Markup("<var>t x</var>")
_Z = Markup("E(<var>x</var>)")
_DECODED = {
    _X: Markup("decode(E(<var>x</var>))"),
    _TX: Markup("decode(<var>t</var> E(<var>x</var>))"),
}


class Picture(NamedTuple):
    """A picture for an `<img>`: a data URI, its size in pixels, words for who does not see it."""

    uri: str
    width: int
    height: int
    alt: str

    @property
    def pixelated(self) -> bool:
        """Whether it is enlarged by whole pixels."""
        return max(self.width, self.height) <= SMALL


class Place(NamedTuple):
    """A picture over its caption: the models it is of (none if of all of them), and a formula.

    Without a formula the model's name stands there.
    """

    picture: Picture
    models: list[int]
    formula: Markup | None


Card = list[Place]  # what is shown of one image


class Transformed(NamedTuple):
    """The cards of a transformation."""

    label: str
    cards: list[Card]
    name: str


class Gallery(NamedTuple):
    """Cards of plain reconstructions, of principal components, and of every transformation."""

    reconstructions: list[Card]
    components: list[Card]
    transformed: list[Transformed]


def make_gallery(records: Sequence[Record], folders: Sequence[Path]) -> Gallery:
    """The pictures in `pictures/` of every evaluation's folder; no cards where there are none.

    Models whose targets are the same, pixel for pixel, stand behind one target.

    Raises:
      UserError: for a file that is no picture.
    """
    places = [Path(folder) / FOLDER for folder in folders]
    count = COUNT[len(places) > 1]
    reconstructions = [_card(places, "input", "reconstruction", n, _X) for n in range(count)]
    components = [_components(places, n) for n in range(count)]
    if len(places) == 1:  # beside the reconstructions
        both = zip(reconstructions, components, strict=True)
        reconstructions, components = [a and a + b for a, b in both], []
    labels = {t["name"]: label_of(t) for record in records for t in record["transformations"]}
    transformed = [
        Transformed(label, _some(
            [_card(places, f"{name}-target", f"{name}-decoded", n, _TX) for n in range(count)]
        ), name)
        for name, label in labels.items()
    ]  # fmt: skip
    return Gallery(_some(reconstructions), _some(components), [t for t in transformed if t.cards])


def _some(cards: list[Card]) -> list[Card]:
    return [card for card in cards if card]


def _card(places: Sequence[Path], target: str, decoded: str, n: int, what: Markup) -> Card:
    """A target and what the models made of it; then the next target, where models differ in it."""
    groups: list[tuple[np.ndarray, list[int]]] = []
    for i, place in enumerate(places):
        path = place / f"{target}-{n}.png"
        if path.exists():
            pixels = np.asarray(_open(path))
            for other, models in groups:
                if np.array_equal(pixels, other):
                    models.append(i)
                    break
            else:
                groups.append((pixels, [i]))
    card = []
    for _, models in groups:
        whose = models if len(groups) > 1 else []
        card.append(Place(_read(places[models[0]], f"{target}-{n}"), whose, what))
        for i in models:
            if picture := _read(places[i], f"{decoded}-{n}"):
                card.append(Place(picture, [i], _DECODED[what] if len(places) == 1 else None))
    return card


def _components(places: Sequence[Path], n: int) -> Card:
    """The latents of an image."""
    pictures = ((i, _read(place, f"pca-{n}")) for i, place in enumerate(places))
    formula = _Z if len(places) == 1 else None
    return [Place(picture, [i], formula) for i, picture in pictures if picture]


def _read(place: Path, name: str) -> Picture | None:
    path = place / f"{name}.png"
    if not path.exists():
        return None
    image = _open(path)
    small = max(image.size) <= SMALL
    if not small:
        image.thumbnail((MOST, MOST), Image.Resampling.LANCZOS)
    uri = _uri(image, "png", optimize=True) if small else _uri(image, "webp", quality=QUALITY)
    return Picture(uri, *image.size, name.replace("-", " "))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from error


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
