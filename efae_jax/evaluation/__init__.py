"""What a model does to images and to its latents: figures that papers report, in one pass.

`evaluate` is the command; `validation` is what a training run shows of itself meanwhile.
"""

from efae_jax.evaluation.command import Settings, evaluate

__all__ = ["Settings", "evaluate"]
