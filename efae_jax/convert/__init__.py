"""Exchange of weights with PyTorch programs: one module per format, and the table of formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from efae_jax.convert import efae


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights of one format are written and read.

    Attributes:
      export: (params, architecture, out_path) -> None.
      load: (path, ...) -> (architecture, params).
    """

    export: Callable
    load: Callable


FORMATS = {efae.FORMAT: Format(export=efae.export_efae, load=efae.import_efae)}
