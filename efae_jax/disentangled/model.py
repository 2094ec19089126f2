"""A model whose latents come in two parts: semantic channels and style channels."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from efae_jax import groups
from efae_jax.api import PLAYER, Model
from efae_jax.basis import FILE, Basis, check_channels, make_basis, read_basis_file, to_bytes
from efae_jax.checkpoint import save_model
from efae_jax.disentangled.runs import basis_of_run, is_basis_run
from efae_jax.errors import UserError
from efae_jax.models.disentangler import change_channels
from efae_jax.paths import user_path


def read_basis(path: str | os.PathLike[str], semantic: int | None = None) -> Basis:
    """The basis that is in a place.

    Args:
      path: the work directory of a disentangling run, or one that a model shares with its basis; a
        folder of exported weights; or a file (`basis.read_basis_file`): the original's state
        dict, or a matrix, as safetensors, .npy, .npz or .pt.
      semantic: number of semantic channels; what the place says unless given, and half of the
        channels where it says nothing.

    Raises:
      UserError: when there is no basis, or none that fits.
    """
    path = Path(user_path(path))
    if is_basis_run(path):
        return basis_of_run(path, semantic)
    if path.is_dir():
        if not (path / FILE).exists():
            raise UserError(
                f"{path} holds no basis: it is no work directory of configs/disentangle.py, and "
                f"has no {FILE}"
            )
        path = path / FILE
    return read_basis_file(path, semantic)


class Disentangled:
    """A model with a basis of its latent's channels, of which the first are semantic.

        both = Disentangled(efae_jax.load("stabilityai/sd-vae-ft-ema"), "runs/basis")
        semantic, style = both.encode(images)
        mixed = both.decode(semantic, style[::-1])

    With the model's latent z in a diffusion model's units, n = normalise(z), it is u = Q n, cut
    into [semantic, style]; the model's is z = denormalise(Q^T u). Q is orthogonal, so u is as
    near to a standard normal as n is. Latents without positions, [B, C], are cut alike.

    Attributes:
      model: as `efae_jax.load` gives it.
      basis: matrix, number of semantic channels, and where they came from.

    Args:
      model: becomes the attribute.
      basis: a `Basis`, a matrix [C, C], or a place for `read_basis`; the one that travels with
        the model unless given.
      semantic: number of semantic channels; what the basis says, or else half of them.

    Raises:
      UserError: a basis that does not fit, or none.
    """

    def __init__(
        self,
        model: Model,
        basis: Basis | np.ndarray | Array | str | os.PathLike[str] | None = None,
        semantic: int | None = None,
    ):
        basis = model.basis if basis is None else basis
        if basis is None:
            raise UserError(
                "no basis travels with the model; give one: a run of configs/disentangle.py, a "
                "file or a matrix"
            )
        if isinstance(basis, str | os.PathLike):
            basis = read_basis(basis, semantic)
        elif not isinstance(basis, Basis):
            basis = make_basis(basis, semantic, "the matrix that was given")
        elif semantic is not None:
            basis = make_basis(basis.matrix, semantic, basis.source)
        if model.config.latent.get("patch", 1) != 1:
            raise UserError(
                "a basis is of the latent's channels, but in this model's units 2x2 positions are "
                "packed into them; there is none for it"
            )
        check_channels(basis, model.autoencoder.representation.channels)
        self.model, self.basis = model, basis

    def split(self, z: Float[Array, "B ... C"]) -> tuple[Array, Array]:
        """[semantic, style] = Q normalise(z) on channels.

        Args:
          z: latents in the model's own units, as `model.encode` gives them.

        Returns:
          [B, ..., k] and [B, ..., C - k].
        """
        if np.ndim(z) < 2 or np.shape(z)[-1] != self.basis.channels:
            raise ValueError(
                f"split: latents must be [B, ..., {self.basis.channels}], not {np.shape(z)}"
            )
        u = change_channels(self.basis.matrix, self.model.normalise(jnp.asarray(z)))
        return u[..., : self.basis.semantic], u[..., self.basis.semantic :]

    def join(
        self, semantic: Float[Array, "B ... k"], style: Float[Array, "B ... C-k"]
    ) -> Float[Array, "B ... C"]:
        """denormalise(Q^T [semantic, style]): latents in the model's own units.

        It and `split` undo each other, but for the rounding of float32.
        """
        k, shapes = self.basis.semantic, (np.shape(semantic), np.shape(style))
        ends = (k, self.basis.channels - k)
        if any(len(s) < 2 for s in shapes) or [(*shapes[0][:-1], n) for n in ends] != [*shapes]:
            raise ValueError(
                f"join: semantic and style must be [B, ..., {ends[0]}] and [B, ..., {ends[1]}], "
                f"not {shapes[0]} and {shapes[1]}"
            )
        u = jnp.concatenate([jnp.asarray(semantic), jnp.asarray(style)], axis=-1)
        return self.model.denormalise(change_channels(self.basis.matrix.T, u))

    def encode(
        self, x: UInt8[Array, "B H W c"] | Float[Array, "B H W c"], *, tile: int | None = None
    ) -> tuple[Array, Array]:
        """(semantic [B, h, w, k], style [B, h, w, C - k]) of images: `split` of their latents.

        Args:
          x, tile: as for `Model.encode`.
        """
        return self.split(self.model.encode(x, tile=tile))

    def decode(
        self, semantic: Array, style: Array, key: PRNGKeyArray | None = None, **options: Any
    ) -> Float[Array, "B H W c"]:
        """Images of semantic and style channels.

        Args:
          semantic, style: as `encode` gives them, of the same or of different images.
          key, options: as for `Model.decode`.
        """
        return self.model.decode(self.join(semantic, style), key, **options)

    def act(self, g: str | Int[Array, " B"], semantic: Array, style: Array) -> tuple[Array, Array]:
        """The group's action on both parts: that of the model on the latents they make.

        Where `is_block_diagonal`, neither part of the result depends on the other part.

        Args:
          g: as for `Model.act`.
        """
        return self.split(self.model.act(g, self.join(semantic, style)))

    @functools.cached_property
    def matrices(self) -> Float[np.ndarray, "n C C"]:
        """The representation in this basis, Q D rho(g) D^-1 Q^T, for every element of the group.

        D is the factor of `normalise`, channel by channel: u = Q D (z - mean). Where all channels
        have one factor it cancels, and the matrices are orthogonal; with a std per channel they
        are so only for those rho(g) that mix no channels of different std. `act` also adds
        Q D (rho(g) mean - mean), which is the same for all latents.
        """
        z = np.zeros(self.basis.channels)
        D = self.model.normalise(z + 1) - self.model.normalise(z)
        rho = np.asarray(self.model.autoencoder.matrices(self.model.params))
        return np.asarray(groups.change_basis(rho * (D[:, None] / D), self.basis.matrix))

    @property
    def leakage(self) -> dict[str, float]:
        """How much each element mixes semantic with style channels, 0 to 1.

        See `groups.block_leakage`; 0 for all elements: the semantic channels can be
        flipped or turned, or learnt equivariantly, by themselves.
        """
        one = np.eye(self.basis.channels, dtype=np.float32)
        found = groups.block_leakage(self.matrices, one, self.basis.semantic)
        return dict(zip(self.model.group.elements, map(float, found), strict=True))

    @property
    def is_block_diagonal(self) -> bool:
        """Whether no element mixes semantic with style channels, but for rounding."""
        one = np.eye(self.basis.channels, dtype=np.float32)
        return groups.is_block_diagonal(self.matrices, one, self.basis.semantic)

    def save(self, workdir: str | os.PathLike[str]) -> None:
        """Makes a work directory that holds the model and the basis.

        `efae_jax.load(workdir)` gives the model, its `basis` this one, and
        `Disentangled(efae_jax.load(workdir))` both again.

        Raises:
          UserError: when it is there already, or cannot be written.
        """
        workdir = Path(workdir)
        if workdir.exists():
            raise UserError(f"{workdir} is there already; give a new directory")
        params = {PLAYER: jax.device_get(self.model.params)}
        config = json.loads(self.model.config.to_json_best_effort())
        save_model(workdir, params, config, {FILE: to_bytes(self.basis)})
