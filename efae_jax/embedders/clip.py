"""Captions and images in the joint space of a CLIP, by open_clip or by transformers."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from efae_jax.embedders.base import ImageBatches, TextBatches
from efae_jax.embedders.pretrained import (
    device,
    digest,
    load_transformer,
    loading,
    locate,
    need,
)
from efae_jax.errors import UserError

_HUB = "hf-hub:"  # open_clip's own prefix


class Towers(NamedTuple):
    """The two sides of a CLIP, as functions to rows of equal dimension."""

    name: str
    texts: Callable[[list[str]], np.ndarray]
    images: Callable[[list[Image.Image]], np.ndarray]


def clip_embedders(source: str, batch_size: int) -> tuple[TextBatches, ImageBatches]:
    """The two towers of one model, which is dropped with the last of both.

    Args:
      source: "open_clip:MODEL/WEIGHTS", where WEIGHTS is a name or a file,
        "open_clip:hf-hub:OWNER/NAME", or "transformers:" with OWNER/NAME on the hub or a folder.

    Raises:
      UserError: no such model, one that is no CLIP, or a package is missing.
    """
    library, _, model = source.partition(":")
    make = {"open_clip": _open_clip, "transformers": _transformers}.get(library)
    if make is None or not model:
        raise UserError(
            f"--clip {source}: allowed are open_clip:MODEL/WEIGHTS and transformers:OWNER/NAME "
            "(or a folder)"
        )
    what = f"--clip {source}"
    towers = make(model, what)
    with loading(what):
        dimension = towers.texts(["a"]).shape[1]
    name = towers.name
    return (
        TextBatches(name, name, dimension, towers.texts, batch_size),
        ImageBatches(name, name, dimension, towers.images, batch_size),
    )


def _open_clip(source: str, what: str) -> Towers:
    open_clip = need("open_clip", what, "open_clip_torch")
    import torch

    if source.startswith(_HUB):
        name, weights = source, None
        identity = f"{source}@{_ask_hub(source.removeprefix(_HUB), what)}"
    else:
        name, weights = _named_weights(open_clip, source, what)
        identity = f"{name}/{weights}"
        if Path(weights).is_file():
            identity = f"{name} sha256:{digest(Path(weights))}"
        elif repository := open_clip.get_pretrained_cfg(name, weights).get("hf_hub"):
            _ask_hub(repository, what)
    where = device()
    with loading(what):
        model, prepare = open_clip.create_model_from_pretrained(
            name, pretrained=weights, device=where
        )
        tokenize = open_clip.get_tokenizer(name)
    _require_towers(model, ("encode_text", "encode_image"), what)
    model.eval()

    def texts(batch: list[str]) -> np.ndarray:
        with torch.inference_mode():
            return model.encode_text(tokenize(batch).to(where)).float().cpu().numpy()

    def images(batch: list[Image.Image]) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.stack([prepare(image) for image in batch]).to(where)
            return model.encode_image(pixels).float().cpu().numpy()

    return Towers(f"open_clip:{identity}", texts, images)


def _ask_hub(repository: str, what: str) -> str:
    """The commit of OWNER/NAME; at once an error where there is neither network nor a copy.

    open_clip itself would try for most of a minute.
    """
    with loading(what):
        from huggingface_hub import snapshot_download

        name = "/".join(repository.split("/")[:2])
        return Path(snapshot_download(name, allow_patterns="open_clip_config.json")).name[:12]


def _named_weights(open_clip: Any, source: str, what: str) -> tuple[str, str]:
    """MODEL and WEIGHTS, where open_clip knows them or WEIGHTS is a file."""
    model, _, weights = source.partition("/")
    if Path(weights).is_file() and model in open_clip.list_models():
        return model, weights
    weights = weights.lower().replace("-", "_")  # as open_clip itself does
    known = [f"{model}/{weights}" for model, weights in open_clip.list_pretrained()]
    if f"{model}/{weights}" not in known:
        same = [name for name in known if name.startswith(f"{model}/")]
        close = get_close_matches(f"{model}/{weights}", same or known, n=5, cutoff=0)
        raise UserError(f"{what}: open_clip does not know it; close are {', '.join(close)}")
    return model, weights


def _transformers(source: str, what: str) -> Towers:
    transformers = need("transformers", what, "transformers torch")
    torch = need("torch", what, "transformers torch")
    folder, identity = locate(source)
    with loading(what):
        model = load_transformer(folder, what)
        _require_towers(model, ("get_text_features", "get_image_features"), what)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Pillow's resizing, with torchvision installed or not.
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True
        )
    longest = model.config.text_config.max_position_embeddings
    # SigLIP learnt from texts padded to one length, and looks at the padding, too.
    padded = model.config.model_type.startswith("siglip")

    def texts(batch: list[str]) -> np.ndarray:
        tokens = tokenizer(
            batch,
            padding="max_length" if padded else "longest",
            truncation=True,
            max_length=longest,
            return_attention_mask=not padded,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            return model.get_text_features(**tokens).pooler_output.cpu().numpy()

    def images(batch: list[Image.Image]) -> np.ndarray:
        inputs = processor(images=batch, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            return model.get_image_features(**inputs).pooler_output.cpu().numpy()

    return Towers(f"transformers:{identity}", texts, images)


def _require_towers(model: Any, methods: tuple[str, str], what: str) -> None:
    if not all(hasattr(model, method) for method in methods):
        raise UserError(
            f"{what} is a {type(model).__name__}, which has no towers of text and image"
        )
