"""Equivariant autoencoders for latent diffusion, in JAX.

model = efae_jax.load("runs/quickstart")
z = model.encode(images)
flipped = model.decode(model.act("h", z), jax.random.key(0))

both = efae_jax.Disentangled(model, "runs/basis")
semantic, style = both.encode(images)
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Disentangled", "load", "read_basis"]

_MODULES = {"load": "api", "Disentangled": "disentangled", "read_basis": "disentangled"}


def __getattr__(name: str):
    # `import efae_jax` stays instant; JAX is imported with the first use of any of these.
    if name in _MODULES:
        return getattr(import_module(f"efae_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'efae_jax' has no attribute {name!r}")
