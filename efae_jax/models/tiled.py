"""Images that the device cannot hold whole: tile by tile, with the whole image's group norms."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from efae_jax.models.conv_autoencoder import ConvAutoencoder
from efae_jax.models.functional import Net, Params
from efae_jax.models.kl import check_sides
from efae_jax.models.latent import LOG_VARIANCE_RANGE, Posterior

TILE, SWEEPS = 512, 1  # pixels a side; times over the image
# Statistics of every group norm, in the order of execution: (mean[1,G], variance[1,G]).
Norms = list[tuple[Array, Array]]


def tiled_posterior(
    model: ConvAutoencoder,
    params: Params,
    x: Float[np.ndarray, "B H W c"] | UInt8[np.ndarray, "B H W c"],
    *,
    tile: int = TILE,
    overlap: int | None = None,
    sweeps: int = SWEEPS,
) -> Posterior:
    """q(z | x) of images of any size, in arrays on the host; see `tiled_encode`."""
    _check(model, x, "images")
    check_sides(x.shape, model.factor)
    cells = (model.factor, 1)
    moments = _tiled(model, model.encoder, params["encoder"], x, cells, tile, overlap, sweeps)
    if not model.variational:
        return Posterior(model.clip(moments))
    mean, log_variance = np.split(moments, 2, axis=-1)
    return Posterior(mean, np.clip(log_variance, *LOG_VARIANCE_RANGE))


def tiled_encode(
    model: ConvAutoencoder,
    params: Params,
    x: Float[np.ndarray, "B H W c"] | UInt8[np.ndarray, "B H W c"],
    *,
    tile: int = TILE,
    overlap: int | None = None,
    sweeps: int = SWEEPS,
) -> Float[np.ndarray, "B h w C"]:
    """The latent (the posterior's mode) of images of any size, within a tile's memory.

    Tiles of one shape are spread evenly over the image, each overlapping its neighbours. At a
    tile's edge the convolutions lack what lies beyond it: the outer quarter of an overlap is
    dropped on either side, and over the half between them one tile gives way linearly to the
    next. The result is the whole image's where a quarter of the overlap covers the network's
    receptive field, which for the large models reaches some 15 latent positions, though little
    comes from so far.

    Group norms take their statistics over the whole image, which no tile sees. In a sweep all
    tiles are computed, and the statistics of every norm's input gathered from them, each
    position counted once. The first sweep normalises each tile by its own statistics, which
    makes those of the first norm the whole image's; the n-th takes the first n - 1 from the
    sweep before, which makes those of the first n exact. Then the tiles are computed for the
    result, all norms taking what the last sweep has found. One sweep removes most of the error,
    as many as there are norms remove all of it.

    Attention sees its own tile only, in the whole image's stead; no sweep changes that.

    Args:
      model: its convolutional encoder and decoder.
      params: of the model.
      x: uint8, or floats in [-1, 1], on the host, where the result will be, too. They are
        treated one after the other.
      tile: side of a tile in pixels of the encoder's images, a multiple of the factor. Images
        with no longer side are done whole, with no error at all.
      overlap: of neighbouring tiles at least, in the same pixels; up to half of the tile, and a
        quarter of it unless given.
      sweeps: 0 takes each tile's own statistics: fastest, and seams show. Each costs as much
        as the result itself; more than there are norms are not done.

    Raises:
      ValueError: for an autoencoder with a flow for a decoder, and for sides that do not fit.
    """
    q = tiled_posterior(model, params, x, tile=tile, overlap=overlap, sweeps=sweeps)
    return model.clip(q.mean) if model.variational else q.mean


def tiled_decode(
    model: ConvAutoencoder,
    params: Params,
    z: Float[np.ndarray, "B h w C"],
    *,
    tile: int = TILE,
    overlap: int | None = None,
    sweeps: int = SWEEPS,
) -> Float[np.ndarray, "B H W c"]:
    """Images of latents of any size, within a tile's memory; not clipped. See `tiled_encode`.

    Args:
      model, params: of the decoder.
      z: latents, on the host.
      tile, overlap: in pixels of the images that the *encoder* takes, for `tiled_encode` and
        this to mean the same.
      sweeps: as there.
    """
    _check(model, z, "latents")
    cells = (1, model.factor * model.upscale)
    return _tiled(model, model.decoder, params["decoder"], z, cells, tile, overlap, sweeps)


def _check(model: Any, x: Any, what: str) -> None:
    if model.is_flow:
        raise ValueError(
            "tiles: only convolutional autoencoders are done tile by tile; a flow decoder's "
            "velocity field sees the image whole"
        )
    if not isinstance(x, np.ndarray) or x.ndim != 4:
        raise ValueError(f"tiles: {what} must be a NumPy array [batch, height, width, channels]")


class _Axis(NamedTuple):
    """Tiles along one axis, in latent positions.

    Tile i is [starts[i], starts[i] + tile); its core, [cuts[i], cuts[i + 1]): the cores share
    out all positions. Across a cut, one tile gives way to the next over `ramp` positions.
    """

    size: int
    tile: int
    starts: np.ndarray
    cuts: np.ndarray
    ramp: int

    @classmethod
    def spread(cls, size: int, tile: int, overlap: int) -> _Axis:
        tile = min(tile, size)
        count = 1 if tile == size else -(-(size - overlap) // (tile - overlap))
        starts = np.round(np.linspace(0, size - tile, count)).astype(int)
        between = (starts[1:] + starts[:-1] + tile) // 2  # the middle of the overlap
        return cls(size, tile, starts, np.array([0, *between, size]), overlap // 2)

    def core(self, i: int) -> np.ndarray:
        """1 on the core of tile i, 0 elsewhere."""
        position = self.starts[i] + np.arange(self.tile)
        inside = (position >= self.cuts[i]) & (position < self.cuts[i + 1])
        return inside.astype(np.float32)

    def weights(self, i: int, cell: int) -> np.ndarray:
        """Of the values of tile i, `cell` of them a position; over all tiles they sum to one."""
        position = self.starts[i] + (np.arange(self.tile * cell) + 0.5) / cell

        def risen(cut: int) -> np.ndarray:
            if cut == 0 or cut == self.size:  # the borders of the image
                return np.full(len(position), float(cut == 0))
            return np.clip((position - cut) / max(self.ramp, 1e-9) + 0.5, 0, 1)

        return (risen(self.cuts[i]) - risen(self.cuts[i + 1])).astype(np.float32)


class _Statistics:
    """The `statistics` of a tile's group norms: the first `known` as given, else the tile's own.

    Args:
      rows, columns: 1 on the tile's core, 0 on its other latent positions.
      given: of every norm; None if there are none.
      known: how many of them to take.
    """

    def __init__(self, rows: Array, columns: Array, given: Norms | None, known: Any = 0):
        self.rows, self.columns = rows, columns
        self.given, self.known = given, known
        self.found: Norms = []

    def __call__(self, x_BHWC: Array, groups: int) -> tuple[Array, Array]:
        own, number = _core_statistics(x_BHWC, groups, self.rows, self.columns), len(self.found)
        self.found.append(own)
        if self.given is None:
            return own
        take = functools.partial(jnp.where, number < self.known)
        return jax.tree.map(take, self.given[number], own)


def _core_statistics(
    x_BHWC: Array, groups: int, rows: Array, columns: Array
) -> tuple[Array, Array]:
    """Mean and variance of every group over the core, whatever the feature map's resolution."""
    _, height, width, channels = x_BHWC.shape
    rows = jnp.repeat(rows, height // len(rows))
    columns = jnp.repeat(columns, width // len(columns))
    share_HW1 = (rows[:, None] * columns)[..., None] / (rows.sum() * columns.sum())

    def mean_of(a_BHWC: Array) -> Array:
        mean_BC = jnp.sum(a_BHWC * share_HW1, axis=(1, 2))
        return rearrange(mean_BC, "b (g c) -> b g c", g=groups).mean(axis=-1)

    mean_BG = mean_of(x_BHWC)
    mean_BC = jnp.repeat(mean_BG, channels // groups, axis=1)
    return mean_BG, mean_of(jnp.square(x_BHWC - mean_BC[:, None, None]))


@functools.partial(jax.jit, static_argnames="net")
def _run_tile(
    net: Net, params: Params, tile: Array, rows: Array, columns: Array, given: Norms, known: Array
) -> tuple[Array, Norms]:
    statistics = _Statistics(rows, columns, given, known)
    return net(params, tile, statistics), statistics.found


def _tiled(
    model: ConvAutoencoder,
    net: Net,
    params: Params,
    x: np.ndarray,
    cells: tuple[int, int],
    tile: int,
    overlap: int | None,
    sweeps: int,
) -> np.ndarray:
    """net(params, x); `cells` are input and output pixels a latent position, per side."""
    f = model.factor
    overlap = tile // (4 * f) * f if overlap is None else overlap
    if tile < f or tile % f or overlap % f or not 0 <= overlap <= tile // 2 or sweeps < 0:
        raise ValueError(
            f"tiles: side {tile} and overlap {overlap} must be multiples of the factor {f}, the "
            f"overlap at most half of the side, and sweeps={sweeps} not negative"
        )
    axes = [_Axis.spread(n // cells[0], tile // f, overlap // f) for n in x.shape[1:3]]
    return np.stack([_one_image(net, params, image, cells, axes, sweeps) for image in x])


def _one_image(
    net: Net,
    params: Params,
    image: np.ndarray,
    cells: tuple[int, int],
    axes: list[_Axis],
    sweeps: int,
) -> np.ndarray:
    tiles = list(itertools.product(*(range(len(axis.starts)) for axis in axes)))

    def run(given: Norms, known: int) -> Iterator[tuple[Array, Norms]]:
        """Results of the tiles; the next tile is computed while one is looked at."""
        ahead: list[Any] = []
        for number in tiles:
            top, left = (
                slice(axis.starts[i] * cells[0], (axis.starts[i] + axis.tile) * cells[0])
                for axis, i in zip(axes, number, strict=True)
            )
            cores = [axis.core(i) for axis, i in zip(axes, number, strict=True)]
            window = _to_float(image[None, top, left])
            ahead.append(_run_tile(net, params, window, *cores, given, known))
            if len(ahead) == 2:
                yield ahead.pop(0)
        yield from ahead

    given, known = _no_norms(net, params, axes, cells[0], image.shape[-1]), 0
    sweeps = min(sweeps, len(given)) if len(tiles) > 1 else 0
    for sweep in range(sweeps):
        found = [jax.device_get(norms) for _, norms in run(given, sweep)]
        given, known = _merge(found, [_area(axes, number) for number in tiles]), len(given)
    out = None
    for number, (y, _) in zip(tiles, run(given, known), strict=True):
        if out is None:
            out = np.zeros([*(axis.size * cells[1] for axis in axes), y.shape[-1]], np.float32)
        rows, columns = (a.weights(i, cells[1]) for a, i in zip(axes, number, strict=True))
        top, left = (a.starts[i] * cells[1] for a, i in zip(axes, number, strict=True))
        out[top : top + len(rows), left : left + len(columns)] += (
            rows[:, None, None] * columns[:, None] * np.asarray(y[0])
        )
    return out


def _area(axes: list[_Axis], number: tuple[int, ...]) -> float:
    return float(np.prod([a.cuts[i + 1] - a.cuts[i] for a, i in zip(axes, number, strict=True)]))


def _no_norms(net: Net, params: Params, axes: list[_Axis], cell: int, channels: int) -> Norms:
    """Zeros in the shape of the net's statistics."""

    def found(params: Params, x: Array) -> Norms:
        statistics = _Statistics(*(axis.core(0) for axis in axes), None)
        net(params, x, statistics)
        return statistics.found

    tile = jax.ShapeDtypeStruct((1, *(axis.tile * cell for axis in axes), channels), jnp.float32)
    shapes = jax.eval_shape(found, params, tile)
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def _to_float(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x


def _merge(found: list[Norms], areas: list[float]) -> Norms:
    """Statistics over all tiles' cores, from those of each: of every norm, in float64.

    mean = sum a_i m_i, variance = sum a_i (v_i + (m_i - mean)^2) over the shares a_i of area.
    """
    share = np.asarray(areas, np.float64)[:, None, None] / np.sum(areas)
    merged = []
    for tiles in zip(*found, strict=True):
        means, variances = (np.stack(a).astype(np.float64) for a in zip(*tiles, strict=True))
        mean = np.sum(share * means, axis=0)
        variance = np.sum(share * (variances + np.square(means - mean)), axis=0)
        merged.append((mean.astype(np.float32), variance.astype(np.float32)))
    return merged
