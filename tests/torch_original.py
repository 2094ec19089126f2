"""The original EFAE's networks in PyTorch, written from their description alone, for comparison.

It follows the description the slow way (complex numbers, explicit loops over heads)
so that it shares no line of reasoning with the JAX modules. NCHW.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        sizes, parts = [channels, 32, 64, 128, 256], []
        for a, b in itertools.pairwise(sizes):
            parts += [nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()]
        self.conv = nn.Sequential(*parts[:-1])

    def forward(self, x):
        return self.conv(x).flatten(2).mean(-1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        tokens, width = x.shape[1:]
        size = width // self.heads
        turn = 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        turn = torch.polar(
            torch.ones(tokens, size // 2).double(), torch.arange(tokens).double()[:, None] * turn
        ).to(torch.complex64)
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        outs = []
        for n in range(self.heads):
            part = slice(n * size, (n + 1) * size)
            qn, kn = (
                torch.view_as_real(
                    torch.view_as_complex(a[..., part].unflatten(-1, (-1, 2)).contiguous()) * turn
                ).flatten(-2)
                for a in (q, k)
            )
            scores = torch.einsum("bqc,bkc->bqk", qn, kn) / math.sqrt(size)
            outs.append(scores.softmax(-1) @ v[..., part])
        return self.wo(torch.cat(outs, -1))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(4 * width * 2 / 3)
        while hidden % 256:
            hidden += 1
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, width, heads, condition):
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * width))

    def forward(self, x, c):
        m = self.adaLN_modulation(c).unflatten(1, (6, 1, -1))
        x = x + m[:, 2] * self.attention(self.attention_norm(x) * (1 + m[:, 1]) + m[:, 0])
        return x + m[:, 5] * self.feed_forward(self.ffn_norm(x) * (1 + m[:, 4]) + m[:, 3])


class FinalLayer(nn.Module):
    def __init__(self, width, features, condition):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unflatten(1, (2, 1, -1)).unbind(1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class TimeEmbedder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t):
        w = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)])
        return self.mlp(torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], 1))


class Velocity(nn.Module):
    def __init__(self, channels, width, depth, heads, patch, latent_dim):
        super().__init__()
        self.patch, half, condition = patch, width // 2, min(width, 1024)
        self.init_conv_seq = nn.Sequential(
            nn.Conv2d(channels, half, 5, padding=2),
            nn.SiLU(),
            nn.GroupNorm(32, half),
            nn.Conv2d(half, half, 5, padding=2),
            nn.SiLU(),
            nn.GroupNorm(32, half),
        )
        self.x_embedder = nn.Linear(half * patch * patch, width)
        self.t_embedder = TimeEmbedder(condition)
        self.c_embedder = nn.Linear(latent_dim, condition)
        self.layers = nn.ModuleList(Layer(width, heads, condition) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels, condition)

    def forward(self, x, t, z):
        p, width = self.patch, x.shape[3]
        # unfold orders the numbers of a patch as (channel, row, column).
        tokens = F.unfold(self.init_conv_seq(x), p, stride=p).transpose(1, 2)
        tokens = self.x_embedder(tokens)
        c = self.t_embedder(t) + self.c_embedder(z)
        for layer in self.layers:
            tokens = layer(tokens, c)
        pixels = self.final_layer(tokens, c).unflatten(-1, (p, p, -1))
        out = torch.zeros_like(x)
        for n in range(tokens.shape[1]):
            i, j = n // (width // p) * p, n % (width // p) * p
            out[:, :, i : i + p, j : j + p] = pixels[:, n].permute(0, 3, 1, 2)
        return out


class Original(nn.Module):
    """Both networks, with the published names of their parameters."""

    def __init__(self, channels, width, depth, heads, patch, latent_dim):
        super().__init__()
        self.encoder = Encoder(channels)
        self.velocity = Velocity(channels, width, depth, heads, patch, latent_dim)

    def sample(self, noise, z, steps, guidance):
        x = noise
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps)
            null = self.velocity(x, t, torch.zeros_like(z))
            x = x - (null + guidance * (self.velocity(x, t, z) - null)) / steps
        return x
