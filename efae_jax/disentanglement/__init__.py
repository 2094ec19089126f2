"""Whether a basis separates what an image shows from how it looks, on held-out pairs.

What training and `main.py` ask of it is what they ask of `efae_jax.validation`.
"""

from efae_jax.disentanglement.judge import Evaluator, check_evaluation, evaluate_workdir

__all__ = ["Evaluator", "check_evaluation", "evaluate_workdir"]
