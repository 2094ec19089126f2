"""An orthogonal basis of a latent's channels, semantic ones first: checked, read, written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from efae_jax import groups
from efae_jax.convert import files, layout, sketch
from efae_jax.errors import UserError

log = logging.getLogger(__name__)
FILE = "basis.safetensors"  # in a folder that holds a model
BARE = ("weight", "matrix")  # names of a matrix that lies alone in a file
NUMPY = b"\x93NUMPY"  # how a .npy file begins
# max |W^T W - 1|: of rounding; of a matrix that is taken for orthogonal without a word; of one
# that is taken for a basis at all.
ROUNDING, NEAR, FAR = 1e-6, 1e-4, 0.5


class Basis(NamedTuple):
    """u = Q z on channels: the first of u are semantic, the others style; z = Q^T u.

    Attributes:
      matrix: Q, orthogonal, float32; one row for every channel of u. z is in the units of a
        diffusion model.
      semantic: how many channels of u are, 1 to C - 1.
      source: where it came from, for records.
    """

    matrix: Float[np.ndarray, "C C"]
    semantic: int
    source: str

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return len(self.matrix)


def make_basis(matrix: Any, semantic: int | None, source: str) -> Basis:
    """A basis from a matrix that is orthogonal, or nearly.

    An orthogonal matrix stays as it is, bit for bit; any other becomes Q of its QR decomposition
    (`groups.qr_basis`), with a warning unless that is next to nothing.

    Args:
      matrix: [C, C], of real numbers.
      semantic: number of semantic channels; half of them unless given.
      source: for records and errors.

    Raises:
      UserError: it is no square matrix of finite numbers or far from orthogonal, or there cannot
        be so many semantic channels.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1] or len(matrix) < 2:
        raise UserError(
            f"{source}: a basis is a square matrix of at least 2 channels, not {matrix.shape}"
        )
    if not np.can_cast(matrix.dtype, np.float64, "same_kind"):
        raise UserError(f"{source}: a basis is made of real numbers, not {matrix.dtype}")
    exact = matrix.astype(np.float64)
    if not np.isfinite(exact).all():
        raise UserError(f"{source}: a basis is made of finite numbers")
    error = groups.orthogonality_error(exact)
    if error > FAR:
        raise UserError(
            f"{source} is far from orthogonal: max |W^T W - 1| = {error:.3g}, allowed is {FAR}"
        )
    if error > NEAR:
        log.warning(
            "%s is not orthogonal (max |W^T W - 1| = %.2g); taken is Q of its QR decomposition",
            source,
            error,
        )
    Q = exact if error <= ROUNDING else groups.qr_basis(exact)
    semantic = len(Q) // 2 if semantic is None else semantic
    if not 1 <= semantic < len(Q):
        raise UserError(
            f"{source}: {semantic} semantic of {len(Q)} channels; allowed are 1 to {len(Q) - 1}"
        )
    return Basis(Q.astype(np.float32), semantic, source)


def read_basis_file(path: Path, semantic: int | None = None) -> Basis:
    """A basis from a file.

    Args:
      path: a disentangler's state dict (`convert.sketch`), or one matrix: in a .npy, or alone as
        `weight` or `matrix` in a safetensors, npz or pickle file.
      semantic: as for `make_basis`; unless given it is what the file says, if it does: by the
        semantic embedder's channels, or by a safetensors file's metadata.

    Raises:
      UserError: an unreadable file, or one that holds no basis.
    """
    if _starts_with(path, NUMPY):
        return make_basis(files.read_npy(path), semantic, str(path))
    tensors = files.read_state_dict(path)
    if len(tensors) == 1 and (name := next(iter(tensors))) in BARE:
        matrix, stated = tensors[name], _stated(path)
    elif sketch.matches(tensors):
        params = sketch.from_tensors(tensors, path)
        matrix, stated = params["transform"]["matrix"], sketch.semantic_channels(params, path)
    else:
        some = ", ".join(layout.printable(name) for name in [*tensors][:3])
        raise UserError(
            f"{path} holds no basis: neither {sketch.MATRIX} and two embedders, nor a matrix alone "
            f"as {' or '.join(BARE)}; its {len(tensors)} names begin with {some}"
        )
    return make_basis(matrix, stated if semantic is None else semantic, str(path))


def to_bytes(basis: Basis) -> bytes:
    """The content of a safetensors file: the matrix as `weight`, `semantic` in the metadata."""
    return files.safetensors_bytes({BARE[0]: basis.matrix}, semantic=str(basis.semantic))


def beside(model: Path) -> Path:
    """Where the basis of a model lies: in its folder or, of weights in a file, beside that."""
    return model / FILE if model.is_dir() else model.with_suffix(f".{FILE}")


def read_beside(model: Path, channels: int) -> Basis | None:
    """The basis that travels with a model of so many latent channels; None if there is none.

    Raises:
      UserError: it cannot be read, or has another number of channels.
    """
    path = beside(model)
    if not path.exists():
        return None
    basis = read_basis_file(path)
    check_channels(basis, channels)
    return basis


def write_beside(basis: Basis, model: Path) -> Path:
    """Writes it where `read_beside` finds it, and returns the place.

    Raises:
      UserError: something is there already, or the disk refuses.
    """
    path = beside(model)
    files.write_new(path, to_bytes(basis))
    return path


def check_channels(basis: Basis, channels: int) -> None:
    """Raises a UserError unless a latent of so many channels has such a basis."""
    if basis.channels != channels:
        raise UserError(
            f"{basis.source} is a basis of {basis.channels} channels; the model's latent has "
            f"{channels}"
        )


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _stated(path: Path) -> int | None:
    stated = files.read_metadata(path).get("semantic")
    if stated is None:
        return None
    if not stated.isdecimal() or len(stated) > 6:
        raise UserError(f"{path}: semantic must be a number of channels, not {stated[:20]!r}")
    return int(stated)
