"""Exchange of weights with PyTorch programs: one module per format, and the table of formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from efae_jax.convert import efae
from efae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights of one format are written and read.

    Attributes:
      export: (params, architecture, out_path) -> None.
      load: (path, heads) -> (architecture, params).
      architecture: config of a run -> architecture.
      config: architecture -> config of a run.
    """

    export: Callable
    load: Callable
    architecture: Callable
    config: Callable


FORMATS = {
    efae.FORMAT: Format(
        export=efae.export_efae,
        load=efae.import_efae,
        architecture=efae.architecture_of,
        config=efae.config_of,
    )
}


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
      UserError: listing the names.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: no such format; allowed: {', '.join(FORMATS)}")
    return FORMATS[name]
