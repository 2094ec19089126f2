"""What a model does to images and to its latents: figures that papers report, in one pass.

`evaluate` is the command; `validation` is what a training run shows of itself meanwhile.
"""

from efae_jax.evaluation.command import evaluate
from efae_jax.evaluation.run import Settings

__all__ = ["Settings", "evaluate"]
