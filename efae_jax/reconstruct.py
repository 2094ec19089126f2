"""`python -m efae_jax reconstruct`: what an autoencoder makes of the user's own images."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import efae_jax
from efae_jax import groups
from efae_jax.api import Model, load
from efae_jax.data.bad_image import reason_of
from efae_jax.data.chosen import choose_images, named
from efae_jax.data.folder import Folder, class_of, image_files, no_image
from efae_jax.data.image_types import extension, is_image, stored
from efae_jax.data.left_out import LeftOut, account, account_lines
from efae_jax.data.splits import Joined, Source
from efae_jax.data.transforms import MAX_PIXELS, Transform, make_transform, read_picture
from efae_jax.errors import RunError, UserError
from efae_jax.logs import console, figures_table, make_output_folder, say, track
from efae_jax.methods.base import to_float
from efae_jax.metrics.images import RANGE, WINDOW, ssim
from efae_jax.models.build import compute_dtype, larger_range
from efae_jax.models.conv_autoencoder import shrink
from efae_jax.panels import Panel, draw_panels, picture
from efae_jax.paths import is_remote, printable, user_path
from efae_jax.pictures import LABELS, to_pixels

log = logging.getLogger(__name__)
SQUARE = groups.group("d4")
AMPLIFY = 4  # of a difference, in its picture
STRIP = 512  # rows at a time, for SSIM
SEED = 0  # of the noise that a flow decoder starts from


def reconstruct(
    source: str | Path,
    paths: Sequence[str | Path],
    out: Path,
    *,
    act: str | None = None,
    tile: int | None = None,
    size: int | None = None,
    dtype: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    max_pixels: int | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Encodes and decodes images, plainly and through a symmetry; pictures and figures.

    For each image x, into `out`: NAME.input.png, NAME.reconstruction.png = decode(E(x)), the
    row of them NAME.png, and with `act` also NAME.g.png = decode(rho(g) E(x)) and
    NAME.g-difference.png, its absolute difference to g x, times `AMPLIFY`. `figures.json`
    holds PSNR and SSIM, per image and their means. A flow decoder starts from the same noise
    for every image, transformed along.

    Args:
      source: of the model, for `efae_jax.load`.
      paths: image files, folders of them, at any depth, or SOURCE:PATH, for
        `data.chosen.choose_images`.
      out: the folder.
      act: g: an element of the model's group, which acts on the latent as the model says, or
        another symmetry of the square, which acts on positions alone.
      tile: pixels a side of the encoder's images; larger ones are done tile by tile.
      size: images are resized (shorter side) and cropped to this square; else they keep their
        size, but for a border that the factor leaves over. A flow's default is its config's.
      dtype: of the computation; the model's unless given.
      scaling_factor, shift_factor: as for `efae_jax.load`.
      max_pixels: of an image that is decoded.
      where: `split`, `test_fraction` and `data_dir` of SOURCE:PATH, for `choose_images`.

    Returns:
      what `figures.json` holds.

    Raises:
      UserError: for paths, options or a model that do not fit.
      RunError: when no image could be read.
    """
    _check_paths(paths, where)
    act = {"hv": "r180"}.get(act, act)
    if act is not None and act not in SQUARE.elements:
        raise UserError(f"--act {act}: allowed are {', '.join(SQUARE.elements)}, and hv for r180")
    make_output_folder(out)
    model = load(source, dtype=dtype, scaling_factor=scaling_factor, shift_factor=shift_factor)
    model.require("reconstruct")
    images = _images(paths, model, where)
    reader = _Reader(model, size, max_pixels or MAX_PIXELS)
    _check(model, act, tile)
    if act is not None and act not in model.group.elements:
        say(
            f"{act} is no element of the model's group {model.group.name} "
            f"({', '.join(model.group.elements)}): it acts on the latent's positions only"
        )
    rows: dict[str, dict[str, Any]] = {}
    unreadable: dict[str, str] = {}
    names = _names([images.key(i) for i in range(len(images))])
    for index in track(range(len(images)), len(images), "reconstructing", " images"):
        name, path = names[index], printable(images.name(index))
        try:
            image = reader(images[index]["image"])
        except UserError:
            raise
        except Exception as error:  # decoders meet damage with errors of every kind
            unreadable[path] = reason_of(error)
            log.warning("skipped %s: %s", path, unreadable[path])
            continue
        try:
            shown = _one(model, image, act, tile)
        except FloatingPointError as error:
            raise RunError(f"{error} of {path} is not finite, {_computed_in(model)}") from error
        except ValueError as error:  # the mathematics and the models know no UserError
            raise UserError(f"{path}: {error}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(f"{path}: {_too_large(model, image, tile)}") from error
        _write(out, name, shown, act)
        rows[printable(name)] = {"file": path, "size": list(image.shape[:2]), **shown["figures"]}
    if not rows:
        raise RunError(
            f"none of the {len(images)} images could be read; the first: "
            + "; ".join(f"{path} ({why})" for path, why in [*unreadable.items()][:3])
        )
    figures = [k for k in next(iter(rows.values())) if k not in ("file", "size")]
    record = {
        "model": model.identity,
        "act": act,
        "tile": tile,
        "protocol": "pixels clipped to [-1, 1], range 2; SSIM with an 11-pixel Gaussian window; "
        "g_: decode(rho(g) E(x)) against g x",
        "mean": {k: float(np.mean([row[k] for row in rows.values()])) for k in figures},
        "images": rows,
        "unreadable": unreadable,
        "read": account(images, unreadable),
        "versions": {"efae_jax": efae_jax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    (out / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(_table(record))
    for line in account_lines(record["read"]):
        say(line)
    say(f"pictures and figures: {out}")
    return record


def act_on_positions(g: str, x: Any) -> Any:
    """g x for one symmetry g of the square, by name, and x[B,H,W,C] of any sides."""
    transpose, flip_w, flip_h = SQUARE.bits[SQUARE.elements.index(g)]
    x = x.swapaxes(1, 2) if transpose else x
    x = x[:, :, ::-1] if flip_w else x
    return x[:, ::-1] if flip_h else x


def act_on_latent(model: Model, g: str, z: Any) -> Any:
    """rho(g) z for an element of the model's group; positions only for another symmetry.

    Args:
      model: whose representation acts.
      g: a symmetry of the square.
      z: [B,h,w,C] of any sides, or [B,C] for elements of the group only.
    """
    if g not in model.group.elements:
        return act_on_positions(g, z)
    if z.ndim == 2:
        return model.act(g, jnp.asarray(z))
    # The channels' matrices alone, by latents of one position: whole ones need square sides.
    batch, height = z.shape[:2]
    single = rearrange(jnp.asarray(z), "b h w c -> (b h w) 1 1 c")
    channels = rearrange(model.act(g, single), "(b h w) 1 1 c -> b h w c", b=batch, h=height)
    return act_on_positions(g, np.asarray(channels) if isinstance(z, np.ndarray) else channels)


class _Reader:
    """Images as sources give them to uint8[H,W,c] of sides that the model takes."""

    def __init__(self, model: Model, size: int | None, max_pixels: int):
        data = model.config.data
        self.channels = data.channels
        self.multiple = (model.factor or 1) * model.upscale
        self.transform = None
        if size is not None:
            if size < 1 or size % self.multiple:
                raise UserError(f"--size {size} must be a positive multiple of {self.multiple}")
            self.transform = Transform((size, size), self.channels, max_pixels=max_pixels)
        elif model.is_flow:
            whole = make_transform(data, train=False)
            self.transform = dataclasses.replace(whole, max_pixels=max_pixels)
        self.max_pixels = max_pixels

    def __call__(self, image: Any) -> np.ndarray:
        if self.transform is not None:
            return self.transform(image, Random(0))
        return read_picture(
            image, channels=self.channels, multiple=self.multiple, max_pixels=self.max_pixels
        )


def _computed_in(model: Model) -> str:
    dtype = jnp.dtype(compute_dtype(model.config.dtype)).name
    return f"computed in {dtype}" + larger_range(dtype)


def _finite(what: str, a: Any) -> Any:
    """The array, unless it holds NaN or infinite numbers: FloatingPointError, which says `what`."""
    if not np.isfinite(np.asarray(a)).all():
        raise FloatingPointError(what)
    return a


def _too_large(model: Model, image: np.ndarray, tile: int | None) -> str:
    height, width = image.shape[:2]
    if model.is_flow:
        way = "--size makes the images smaller (a flow decoder has no --tile)"
    elif tile is None:
        way = f"--tile {64 * model.factor} does it tile by tile"
    else:
        way = f"give a smaller --tile than {tile}"
    return f"{width}x{height} pixels do not fit into the device's memory; {way}"


def _one(model: Model, image: np.ndarray, act: str | None, tile: int | None) -> dict[str, Any]:
    """Input, reconstruction and figures of one image; with `act`, of g x, too.

    Raises:
      FloatingPointError: saying what is not finite.
    """
    target = to_float(image[None])
    z = _finite("the latent", model.encode(shrink(target, model.upscale), tile=tile))
    noise = jax.random.normal(jax.random.key(SEED), target.shape) if model.is_flow else None
    decoded = _finite("the decoded image", model.decode(z, noise=noise, tile=tile))
    figures = _figures(decoded, target)
    shown = {"input": image, "reconstruction": to_pixels(decoded[0]), "figures": figures}
    if act is not None:
        moved = act_on_positions(act, target)
        noise = None if noise is None else act_on_positions(act, noise)
        decoded = np.asarray(model.decode(act_on_latent(model, act, z), noise=noise, tile=tile))
        _finite(f"the image decoded under {act}", decoded)
        figures |= {f"{act}_{k}": value for k, value in _figures(decoded, moved).items()}
        difference = np.abs(decoded - moved)[0]
        shown |= {
            "moved": act_on_positions(act, image[None])[0],
            act: to_pixels(decoded[0]),
            f"{act}-difference": to_pixels(AMPLIFY * difference - 1),
        }
    return shown


def _figures(decoded: Any, target: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM; SSIM by strips that share the window's border, for a bounded memory."""
    error = np.clip(np.asarray(decoded, np.float64), -1, 1) - target
    mse = max(float(np.mean(np.square(error))), 1e-10)
    height, border = target.shape[1], min(WINDOW, *target.shape[1:3]) - 1
    starts = range(0, height - border, STRIP)
    strips = [slice(start, min(start + STRIP + border, height)) for start in starts]
    parts = [float(_ssim(decoded[:, s], target[:, s])[0]) for s in strips]
    rows = [s.stop - s.start - border for s in strips]
    return {
        "psnr": 10 * float(np.log10(RANGE**2 / mse)),
        "ssim": float(np.average(parts, weights=rows)),
    }


_ssim = jax.jit(ssim)


def _write(out: Path, name: str, shown: dict[str, Any], act: str | None) -> None:
    def note(prefix: str = "") -> str:
        figures = shown["figures"]
        return f"{figures[prefix + 'psnr']:.2f} dB, SSIM {figures[prefix + 'ssim']:.3f}"

    height, width = shown["input"].shape[:2]
    panels = [
        Panel(shown["input"], "x", f"{width} × {height}"),
        Panel(shown["reconstruction"], "decode(E(x))", note()),
    ]
    singles = ["input", "reconstruction"]
    if act is not None:
        panels += [
            Panel(shown["moved"], "g x", f"g = {act}: {LABELS[act]}"),
            Panel(shown[act], "decode(ρ(g) E(x))", note(f"{act}_")),
            Panel(shown[f"{act}-difference"], "|difference|", f"× {AMPLIFY}"),
        ]
        singles += [act, f"{act}-difference"]
    for kind in singles:
        picture(shown[kind]).save(out / f"{name}.{kind}.png")
    draw_panels(panels).save(out / f"{name}.png")


def _table(record: dict[str, Any]) -> Any:
    names = list(record["mean"])
    heads = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
    columns = [" ".join([*k.split("_")[:-1], heads[k.split("_")[-1]]]) for k in names]

    def cells(row: dict[str, float]) -> list[str]:
        return [f"{row[k]:.2f}" if k.endswith("psnr") else f"{row[k]:.4f}" for k in names]

    rows = [[name, *cells(row)] for name, row in record["images"].items()]
    rows.append([f"mean of {len(rows)}", *cells(record["mean"])])
    title = "decode(E(x)) against x"
    if record["act"] is not None:
        g = record["act"]
        title += f"; {g}: decode(rho({g}) E(x)) against {g} x"
    return figures_table(title, ["image", *columns], rows)


def _check(model: Model, act: str | None, tile: int | None) -> None:
    if model.factor is None and act is not None and act not in model.group.elements:
        raise UserError(
            f"--act {act}: the latent has no positions, and the model's group has only "
            f"{', '.join(model.group.elements)}"
        )
    if tile is not None and model.is_flow:
        raise UserError("--tile: a flow decoder sees images whole; leave it out")
    if tile is not None and (tile < 1 or tile % model.factor):
        raise UserError(f"--tile {tile} must be a positive multiple of {model.factor}")


class _Files:
    """Image files that were named one by one, as a source; each keeps its own name."""

    num_classes, class_names = 0, ()

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.left_out = paths, LeftOut()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": stored(path.read_bytes(), path.name), "label": 0}

    def key(self, index: int) -> str:
        return self.paths[index].name

    def name(self, index: int) -> str:
        return str(self.paths[index])


def _is_source(path: str) -> bool:
    """Whether it is SOURCE:PATH, and no file or folder of that name is there."""
    return not Path(user_path(path)).exists() and (path == "glyphs" or named(path)[0] != "folder")


def _check_paths(paths: Sequence[str | Path], where: Mapping[str, Any]) -> None:
    """Ends here what can be seen to fail before the model is loaded."""
    sources = [path for path in map(str, paths) if _is_source(path) or path.startswith("folder:")]
    given = [f"--{name.replace('_', '-')}" for name, value in where.items() if value is not None]
    if given and not sources:
        raise UserError(
            f"{', '.join(given)}: files and folders have no splits; give SOURCE:PATH, such as "
            "webdataset:shards/*.tar"
        )
    for path in map(str, paths):
        if path in sources:
            continue
        if is_remote(user_path(path)):
            raise UserError(
                f"{printable(path)}: images are read from files of this machine; download it "
                "first, or name a data source, such as webdataset:gs://bucket/shards.tar"
            )
        if not Path(user_path(path)).exists():
            raise UserError(f"{printable(path)}: no such file or folder")


def _images(paths: Sequence[str | Path], model: Model, where: Mapping[str, Any]) -> Source:
    """All images that are named, one after the other; at least one."""
    found: list[Source] = []
    for path in map(str, paths):
        local = Path(user_path(path))
        if _is_source(path) or path.startswith("folder:"):
            found.append(choose_images(model.config.data, path, **where).source)
        elif local.is_dir():
            left_out = LeftOut()
            files = image_files(str(local), left_out)
            if not files and len(paths) == 1:
                raise UserError(no_image(str(local), left_out))
            found.append(Folder(str(local), files, sorted({*map(class_of, files)}), left_out))
        else:
            found.append(_Files([local]))
    if not sum(map(len, found)):
        raise UserError(f"no image in {printable(', '.join(map(str, paths)))}")
    return Joined([source for source in found if len(source)] or found)


def _names(keys: Sequence[str]) -> list[str]:
    """A name to write under for every image: one of its own, without folders."""
    taken: set[str] = set()
    names = []
    for key in keys:
        ending = extension(key)
        stem = key[: len(key) - len(ending)] if is_image(key) else key
        stem = wanted = re.sub(r"[/\\]", "_", stem)
        number = 2
        while stem in taken:
            stem, number = f"{wanted}-{number}", number + 1
        taken.add(stem)
        names.append(stem)
    return names
