"""Training methods, by name. A new one is a module beside this and a line here."""

from __future__ import annotations

from typing import Any

from efae_jax.errors import UserError
from efae_jax.methods.aura_equivae import AuraEquiVAE
from efae_jax.methods.base import Method
from efae_jax.methods.disentangle import Disentangle
from efae_jax.methods.efae import EFAE
from efae_jax.methods.eq_vae import EQVAE

METHODS: dict[str, type[Method]] = {
    "efae": EFAE,
    "aura_equivae": AuraEquiVAE,
    "eq_vae": EQVAE,
    "disentangle": Disentangle,
}


def make_method(config: Any) -> Method:
    """The method that `config.method` names, built from the config."""
    return _chosen(config)(config)


def complete_config(config: Any) -> Any:
    """The config with what its method takes from the data; a copy, or itself."""
    return _chosen(config).completed(config)


def _chosen(config: Any) -> type[Method]:
    if config.method not in METHODS:
        raise UserError(f"config.method={config.method!r} is not one of {', '.join(METHODS)}")
    return METHODS[config.method]
