"""diffusers' AutoencoderKL with this package's weights, and a PatchGAN."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efae_jax.benchmark.measure import Contender
from efae_jax.benchmark.peers import runtime
from efae_jax.convert import diffusers as folder
from efae_jax.errors import UserError


def autoencoder(config: Any, params: Any) -> nn.Module:
    """The AutoencoderKL that the config describes, on the device, channels last.

    Raises:
      UserError: a model that diffusers cannot hold.
    """
    if config.model.kind != "kl" or config.model.padding != "zeros":
        raise UserError(
            f"--peer: diffusers' AutoencoderKL is the peer of models of kind kl, not of "
            f"{config.model.kind} with padding {config.model.padding}; benchmark without --peer"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder.write(config, params, Path(temporary) / "model")
        model = getattr(diffusers, folder.class_name(config)).from_pretrained(
            Path(temporary) / "model", torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    return model.to(runtime.device()).to(memory_format=torch.channels_last)


def inference(
    what: str, config: Any, params: Any, array: np.ndarray, dtype: str, *, compiled: bool
) -> Contender:
    """Encoding or decoding of a batch, NHWC.

    Args:
      what: "encode" (to the posterior's moments) or "decode".
      config, params: of the model.
      array: images, or latents.
      dtype: of the computation.
      compiled: by torch.compile.
    """
    model, x = autoencoder(config, params).eval().requires_grad_(False), runtime.images(array)

    def encode(x: Tensor) -> Tensor:
        return model.encode(x).latent_dist.mean

    def decode(z: Tensor) -> Tensor:
        return model.decode(z).sample

    function = runtime.maybe_compile(encode if what == "encode" else decode, compiled)

    def call() -> Tensor:
        with torch.no_grad(), runtime.autocast(dtype):
            return function(x)

    return runtime.contender(call)


class PatchGAN(nn.Module):
    """`models.discriminators.PatchGAN`: logits [B, 1, h, w] of images [B, C, H, W]."""

    def __init__(self, channels: int = 3, features: int = 64, layers: int = 3):
        super().__init__()
        widths = [channels, *(features * min(2**i, 8) for i in range(layers + 1)), 1]
        self.convs = nn.ModuleList(
            nn.Conv2d(
                widths[i],
                widths[i + 1],
                4,
                stride=2 if i < layers else 1,
                padding=1,
                bias=i in (0, layers + 1),
            )
            for i in range(layers + 2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[2:-1])

    def forward(self, x: Tensor) -> Tensor:
        h = self.convs[0](x)
        for conv, norm in zip(self.convs[1:], self.norms, strict=False):
            h = norm(conv(F.leaky_relu(h, 0.2)))
        return self.convs[-1](F.leaky_relu(h, 0.2))
