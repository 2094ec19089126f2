"""Training methods, by name. A new one is a module beside this and a line here."""

from __future__ import annotations

from typing import Any

from efae_jax.errors import UserError
from efae_jax.methods.aura_equivae import AuraEquiVAE
from efae_jax.methods.base import Method
from efae_jax.methods.efae import EFAE
from efae_jax.methods.eq_vae import EQVAE

METHODS = {"efae": EFAE, "aura_equivae": AuraEquiVAE, "eq_vae": EQVAE}


def make_method(config: Any) -> Method:
    """The method that `config.method` names, built from the config."""
    if config.method not in METHODS:
        raise UserError(f"config.method={config.method!r} is not one of {', '.join(METHODS)}")
    return METHODS[config.method](config)
