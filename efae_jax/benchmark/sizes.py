"""What the jobs compute, by machine: sizes that a real run has and this one can take."""

from __future__ import annotations

from typing import NamedTuple


class DiTSizes(NamedTuple):
    """A velocity field on images of `side` pixels, (side / patch)^2 tokens."""

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    latent_channels: int
    factor: int


class Sizes(NamedTuple):
    """Sizes of all jobs.

    Attributes:
      efae: variant of configs/efae.py, for the training step and for sampling.
      efae_batch, sample_batch, sample_steps: images a step, images sampled at once, Euler steps.
      dit, dit_batch: of the velocity field's own training step.
      side: of the images of the convolutional autoencoders.
      widths: of the one that encodes and decodes; SD's, unless --model names another.
      batch: images that it takes at once.
      train_widths, train_batch: of the one that is trained, with a PatchGAN.
    """

    efae: str
    efae_batch: int
    sample_batch: int
    sample_steps: int
    dit: DiTSizes
    dit_batch: int
    side: int
    widths: tuple[int, ...]
    batch: int
    train_widths: tuple[int, ...]
    train_batch: int
    norm_groups: int = 32


SD_WIDTHS = (128, 256, 512, 512)
ACCELERATOR = Sizes(
    efae="folder256",
    efae_batch=32,
    sample_batch=16,
    sample_steps=25,
    dit=DiTSizes(64, 4, 1024, 12, 16, 16, 8),
    dit_batch=64,
    side=256,
    widths=SD_WIDTHS,
    batch=16,
    train_widths=SD_WIDTHS,
    train_batch=8,
)
# Two cores: a call takes seconds, not minutes.
CPU = Sizes(
    efae="quickstart",
    efae_batch=32,
    sample_batch=32,
    sample_steps=10,
    dit=DiTSizes(64, 4, 256, 4, 4, 16, 8),
    dit_batch=4,
    side=256,
    widths=SD_WIDTHS,
    batch=1,
    train_widths=(64, 128, 256, 256),
    train_batch=1,
)
SMALL = Sizes(
    efae="smoke",
    efae_batch=4,
    sample_batch=2,
    sample_steps=2,
    dit=DiTSizes(16, 4, 32, 1, 2, 4, 4),
    dit_batch=2,
    side=48,
    widths=(8, 8),
    batch=1,
    train_widths=(8, 8),
    train_batch=2,
    norm_groups=4,
)


def choose_sizes(platform: str, small: bool) -> Sizes:
    """Those for a platform of JAX ("cpu" or an accelerator's), or for a look and for tests."""
    if small:
        return SMALL
    return CPU if platform == "cpu" else ACCELERATOR
