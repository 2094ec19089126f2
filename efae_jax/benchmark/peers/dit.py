"""`models.dit.DiT` in PyTorch: the same computation, with the names of the same parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efae_jax.benchmark.measure import Contender
from efae_jax.benchmark.peers import runtime
from efae_jax.benchmark.sizes import DiTSizes
from efae_jax.benchmark.training import ADAM, dit_batch

EPS = 1e-6
DATA_STD = 0.5


class TimeEmbedding(nn.Module):
    """Sinusoids, linear, SiLU, linear."""

    def __init__(self, width: int, size: int = 256):
        super().__init__()
        self.first, self.second = nn.Linear(size, width), nn.Linear(width, width)
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(size // 2) / (size // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000.0 * t[:, None] * self.frequencies
        return self.second(F.silu(self.first(torch.cat([angles.cos(), angles.sin()], -1))))


class LatentGrid(nn.Module):
    """A latent [B, C, h, w] to tokens, each with the values of its own cell."""

    def __init__(self, sizes: DiTSizes):
        super().__init__()
        self.gather = max(sizes.patch // sizes.factor, 1)
        self.spread = max(sizes.factor // sizes.patch, 1)
        self.linear = nn.Linear(
            sizes.latent_channels * self.gather**2, sizes.width * self.spread**2
        )

    def forward(self, z: Tensor) -> Tensor:
        z = _tokens(z, self.gather)
        z, s = self.linear(z), self.spread
        batch, rows, columns, _ = z.shape
        z = z.reshape(batch, rows, columns, s, s, -1).permute(0, 1, 3, 2, 4, 5)
        return z.reshape(batch, rows * s * columns * s, -1)


class Attention(nn.Module):
    """Rotary embedding, RMS-normalised queries and keys, PyTorch's fused attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = (nn.Linear(width, n, bias=False) for n in (3 * width, width))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (_rotate(norm(a), cos, sin) for norm, a in ((self.q_norm, q), (self.k_norm, k)))
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(h.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and MLP, norms and residuals modulated by a vector."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        m = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + m[2] * self.attention(_normed(x, m[0], m[1]), cos, sin)
        h = F.gelu(self.mlp_in(_normed(x, m[3], m[4])), approximate="tanh")
        return x + m[5] * self.mlp_out(h)


class DiT(nn.Module):
    """Velocity of images x [B, 3, H, W] at times t [B], given latents z [B, C, h, w]."""

    def __init__(self, sizes: DiTSizes, channels: int = 3):
        super().__init__()
        self.patch, self.head_width = sizes.patch, sizes.width // sizes.heads
        self.patches = nn.Linear(sizes.patch**2 * channels, sizes.width)
        self.time, self.latent = TimeEmbedding(sizes.width), LatentGrid(sizes)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.head_modulation = nn.Linear(sizes.width, 2 * sizes.width)
        self.head = nn.Linear(sizes.width, sizes.patch**2 * channels)
        angles = _rotary_angles(sizes.side // sizes.patch, self.head_width)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.patches(_tokens(x, self.patch).flatten(1, 2)) + self.latent(z)
        c = self.time(t)
        for block in self.blocks:
            h = block(h, c, self.cos, self.sin)
        shift, scale = self.head_modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        p = self.patch
        out = self.head(_normed(h, shift, scale)).float()
        out = out.reshape(batch, height // p, width // p, p, p, channels)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
        t = t.reshape(-1, 1, 1, 1)
        variance = t**2 + ((1 - t) * DATA_STD) ** 2
        return (t - (1 - t) * DATA_STD**2) / variance * x + DATA_STD / variance.sqrt() * out


def _tokens(x: Tensor, p: int) -> Tensor:
    """[B, C, H, W] to [B, H/p, W/p, p p C]."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(batch, height // p, width // p, -1)


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def _rotary_angles(side: int, head_width: int) -> Tensor:
    frequencies = 100.0 ** (-torch.arange(head_width // 4) / (head_width // 4))
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def training(sizes: DiTSizes, batch_size: int, dtype: str, *, compiled: bool) -> Contender:
    """Flow matching and Adam, as `benchmark.training.dit_step`."""
    torch.manual_seed(0)
    model = DiT(sizes).to(runtime.device())
    forward = runtime.maybe_compile(model, compiled)
    # fused: one kernel for all parameters, PyTorch's fastest.
    optimizer = torch.optim.Adam(
        model.parameters(), ADAM["learning_rate"], (ADAM["b1"], ADAM["b2"]), fused=True
    )
    batch = dit_batch(sizes, batch_size)
    x, z = runtime.images(batch["x"]), runtime.images(batch["z"])

    def step() -> Any:
        noise, t = torch.randn_like(x), torch.rand(batch_size, device=x.device)
        time = t.reshape(-1, 1, 1, 1)
        with runtime.autocast(dtype):
            velocity = forward((1 - time) * x + time * noise, t, z)
        loss = (velocity.float() - (noise - x)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return runtime.contender(step)
