"""The training step of latent-diffusion's autoencoder in PyTorch, as `methods.eq_vae` has it."""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efae_jax.benchmark.measure import Contender
from efae_jax.benchmark.peers import runtime
from efae_jax.benchmark.peers.kl import PatchGAN, autoencoder
from efae_jax.benchmark.training import random_batch
from efae_jax.models.build import build_autoencoder

WEIGHT_EPS, WEIGHT_LIMIT = 1e-4, 1e4


class Trainer:
    """Autoencoder, discriminator, their optimisers, and the averaged weights.

    The decoded images' gradients are taken once, as in JAX; their norms at the last layer weigh
    the GAN loss, and their sum goes back through the decoder. (Programs that ask PyTorch for the
    last layer's gradients go back through the discriminator twice.)

    Args:
      config: of EQ-VAE with `regulariser` "none", without LPIPS.
      params: of the autoencoder.
      dtype: of the computation.
      compiled: by torch.compile.
    """

    def __init__(self, config: Any, params: Any, dtype: str, compiled: bool):
        self.config, self.dtype = config.loss, dtype
        self.model = autoencoder(config, params).train()
        self.last: nn.Conv2d = self.model.decoder.conv_out
        self.model.decoder.conv_out = nn.Identity()
        self.discriminator = PatchGAN(config.data.channels).to(runtime.device())
        self.discriminator.to(memory_format=torch.channels_last).train()
        self.parameters = [*self.model.parameters(), *self.last.parameters()]
        self.average, self.decay = [p.detach().clone() for p in self.parameters], config.ema.decay
        self.optimizers = [
            torch.optim.Adam(parameters, optim.lr, (optim.b1, optim.b2), fused=True)
            for parameters, optim in (
                (self.parameters, config.optim),
                (list(self.discriminator.parameters()), config.optim_discriminator),
            )
        ]
        self.features = runtime.maybe_compile(self._features, compiled)
        self.judge = runtime.maybe_compile(self.discriminator, compiled)

    def _features(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(what the last convolution takes, KL divergence of every example)."""
        mean, log_variance = self.model.encode(x).latent_dist.parameters.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        z = mean + torch.exp(0.5 * log_variance) * noise
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
        return self.model.decode(z).sample, kl

    def step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One update of both players.

        Args:
          x: images in [-1, 1].
          noise: standard normal, of the latent's shape.
        """
        with runtime.autocast(self.dtype):
            h, kl = self.features(x, noise)
            image = self.last(h).float()
        leaf = image.detach().requires_grad_()
        nll = (x - leaf).abs().sum((1, 2, 3)).mean()
        (gradient,) = torch.autograd.grad(nll, leaf)
        self.discriminator.requires_grad_(False)
        with runtime.autocast(self.dtype):
            gan = -self.judge(leaf).float().mean()
        (adversarial,) = torch.autograd.grad(gan, leaf)
        self.discriminator.requires_grad_(True)
        norms = [self._last_norm(h, g) for g in (gradient, adversarial)]
        weight = (norms[0] / (norms[1] + WEIGHT_EPS)).clamp(0, WEIGHT_LIMIT) * self.config.gan
        self.optimizers[0].zero_grad(set_to_none=True)
        torch.autograd.backward(
            [image, self.config.kl * kl.mean()],
            [gradient + weight * adversarial, None],
        )
        self.optimizers[0].step()
        torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay)

        with runtime.autocast(self.dtype):
            real, fake = self.judge(x).float(), self.judge(leaf.detach()).float()
        judged = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.optimizers[1].zero_grad(set_to_none=True)
        judged.backward()
        self.optimizers[1].step()
        found = {"nll": nll, "kl": kl.mean(), "gan": gan, "weight": weight, "judged": judged}
        return {name: value.detach() for name, value in found.items()}

    def _last_norm(self, h: Tensor, gradient: Tensor) -> Tensor:
        """Norm of the last kernel's gradient, of a gradient at the image."""
        weight, h = self.last.weight, h.detach()
        kernel = nn.grad.conv2d_weight(h, weight.shape, gradient.to(h.dtype), padding=1)
        return torch.linalg.vector_norm(kernel.float())


def training(config: Any, dtype: str, *, compiled: bool) -> Contender:
    """The step on random images that stay on the device; the noise is drawn in the step."""
    torch.manual_seed(0)
    model = build_autoencoder(config)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    trainer = Trainer(config, params, dtype, compiled)
    x = runtime.images(random_batch(config)["image"]).float() / 127.5 - 1
    batch, _, height, width = x.shape
    shape = (batch, config.model.latent_channels, height // model.factor, width // model.factor)
    return runtime.contender(lambda: trainer.step(x, torch.randn(shape, device=x.device)))
