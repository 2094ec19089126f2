"""Comparison with the original library: the same image through JAX and through PyTorch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efae_jax.convert import diffusers
from efae_jax.convert.hub import CONFIG
from efae_jax.convert.model import Imported
from efae_jax.convert.weight_names import STEMS
from efae_jax.errors import UserError
from efae_jax.models.build import build_autoencoder
from efae_jax.paths import user_path

SIDE = 64


def verify(
    config: Any, params: Mapping[str, Any], stored: Imported, path: str | os.PathLike[str]
) -> list[str]:
    """Encodes and decodes a random image with diffusers and with this package.

    diffusers loads its own folders itself; of all other sources (files, hub ids) it loads a copy
    that this package writes, and the lines say so.

    Args:
      config, params: of the model, for JAX.
      stored: what was read from the weights' file, for PyTorch.
      path: where it was read.

    Returns:
      lines to print: the largest differences, or why there is nothing to compare with.
    """
    if config.model.kind not in diffusers.KINDS:
        return [
            f"not compared: no library loads a model of kind {config.model.kind}, only the program "
            "that trained it"
        ]
    if missing := config.model.get("missing", ""):
        return [f"not compared: diffusers takes whole models, and the {missing} is missing"]
    try:
        import diffusers as library
        import torch
    except ImportError:
        return ["not compared: that needs PyTorch and diffusers: pip install torch diffusers"]
    with tempfile.TemporaryDirectory() as temporary:
        folder, copy = Path(user_path(path)), ""
        if stored.format != diffusers.FORMAT or not _is_plain(folder):
            folder = Path(temporary) / "model"
            try:
                diffusers.write(stored.config, stored.params, folder)
            except UserError as error:
                return [f"not compared: {error}"]
            copy = ", diffusers from a copy that efae_jax wrote"
        kind = diffusers.class_name(config)
        theirs = getattr(library, kind).from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    _pad(torch, theirs, config.model.padding)

    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.dtype = "float32"
    ours = build_autoencoder(config)
    side = max(SIDE, ours.factor)
    x = np.random.default_rng(0).uniform(-1, 1, (1, side, side, config.data.channels))
    x = x.astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        encoded = theirs.encode(_torch(torch, x))
        if kind != "AutoencoderTiny":
            encoded = encoded.latent_dist.parameters
        else:
            encoded = encoded.latents
        z = jax.jit(ours.encoder.__call__)(params["encoder"], x)
        latent = np.asarray(ours.encode(params, x)) if ours.clamp else np.asarray(z)
        latent = latent[..., : ours.representation.channels]
        decoded = theirs.decode(_torch(torch, latent)).sample
        image = jax.jit(ours.decoder.__call__)(params["decoder"], latent)
    return [
        _line(f"encode, {encoded.shape[1]} channels{copy}", z, encoded),
        _line(f"decode{copy}", image, decoded),
    ]


def _is_plain(folder: Path) -> bool:
    """Whether diffusers itself finds a folder's weights, which have no variant then."""
    names = (diffusers.WEIGHTS, f"{STEMS[0]}.bin", f"{diffusers.WEIGHTS}.index.json")
    return (folder / CONFIG).exists() and any((folder / name).exists() for name in names)


def _torch(torch: Any, x: np.ndarray) -> Any:
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def _pad(torch: Any, model: Any, padding: str) -> None:
    """Gives diffusers' model the padding that its config cannot state."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = padding


def _line(what: str, ours: Any, theirs: Any) -> str:
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    difference = np.abs(np.asarray(ours) - theirs).max()
    return (
        f"{what}: largest difference between JAX and PyTorch {difference:.2e}, "
        f"{difference / np.abs(theirs).max():.1e} of the largest value"
    )
