"""Equivariant autoencoders for latent diffusion, in JAX.

model = efae_jax.load("runs/quickstart")
z = model.encode(images)
flipped = model.decode(model.act("h", z), jax.random.key(0))
"""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    # `import efae_jax` stays instant; JAX is imported with the first use of `load`.
    if name == "load":
        from efae_jax.api import load

        return load
    raise AttributeError(f"module 'efae_jax' has no attribute {name!r}")
