"""What a training step takes of every device, and what the devices exchange, without running it."""

from efae_jax.layout.command import layout
from efae_jax.layout.targets import prepare_environment

__all__ = ["layout", "prepare_environment"]
