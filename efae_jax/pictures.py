"""Pictures of what an autoencoder does: decoded transformed latents, and the flow in motion."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from efae_jax.methods.base import Autoencoder, to_float
from efae_jax.metrics.images import psnr

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

INK, PALE = "#1b1b1f", "#6b6b76"
LABELS = {
    "e": "identity",
    "h": "horizontal flip",
    "v": "vertical flip",
    "r90": "rotation 90°",
    "r180": "rotation 180°",
    "r270": "rotation 270°",
    "t": "transpose",
    "a": "anti-transpose",
}
GIF_FRAMES = 24


class Shown(NamedTuple):
    """What the pictures show, for every element and image: arrays [G, N, ...].

    target: g x; decoded: decode(rho(g) E(x), g e), with psnr between the two in dB;
    states: [G, T, N, ...], from the noise g e to an image, in T - 1 = `GIF_FRAMES` steps;
    None where the decoder is no flow.
    Pixels are uint8.
    """

    target: np.ndarray
    decoded: np.ndarray
    psnr: np.ndarray
    states: np.ndarray | None


def decode_for_pictures(
    model: Autoencoder,
    params: Any,
    image: np.ndarray,
    config: Any,
    seed: int,
    sharding: jax.sharding.Sharding,
) -> Shown:
    """Encodes a few images and decodes them through every group element.

    Args:
      model, params: the autoencoder.
      image: uint8[N,H,W,C].
      config: `config.eval`, which says how to decode.
      seed: of the sampler's noise.
      sharding: of the results: whole on every process.
    """

    options = model.decode_options(config)

    def decode_all(params: Any, image: jax.Array, **options: Any) -> Any:
        x, target = model.views(to_float(image))
        z = model.encode(params, x)
        noise = jax.random.normal(jax.random.key(seed), x.shape) if model.is_flow else None

        def one(g: jax.Array) -> Any:
            g_B = jnp.full(x.shape[0], g)
            g_noise = model.act_image(g_B, noise) if model.is_flow else None
            decoded = model.decode(params, model.act(params, g_B, z), g_noise, **options)
            return model.act_image(g_B, target), decoded

        return jax.lax.map(one, jnp.arange(model.group.order))

    def run(**options: Any) -> Any:
        program = jax.jit(functools.partial(decode_all, **options), out_shardings=sharding)
        return program(params, jnp.asarray(image))

    target, decoded = run(**options)
    quality = jax.vmap(psnr)(decoded, target)
    states = None
    if model.is_flow:
        _, (_, states) = run(**{**options, "steps": GIF_FRAMES}, trajectory=True)
        states = to_pixels(states)
    return Shown(to_pixels(target), to_pixels(decoded), np.asarray(quality), states)


def write_pictures(elements: tuple[str, ...], shown: Shown, out: Path) -> None:
    """Writes `equivariance.png` and, of a flow, `flow.gif` into a folder."""
    _equivariance(elements, shown.target, shown.decoded, shown.psnr, out / "equivariance.png")
    if shown.states is not None:
        _flow(elements, shown.states, out / "flow.gif")


def to_pixels(x: Any) -> np.ndarray:
    """Floats in [-1, 1] to uint8, rounded; one channel becomes three."""
    pixels = np.clip(np.round((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _equivariance(
    elements: tuple[str, ...],
    target_GN: np.ndarray,
    decoded_GN: np.ndarray,
    psnr_GN: np.ndarray,
    path: Path,
) -> None:
    """One row per image: for every g, g x beside decode(rho(g) E(x))."""
    order, count = target_GN.shape[:2]
    cell, aspect = 0.86, target_GN.shape[2] / target_GN.shape[3]
    ratios = [1, 1, 0.18] * order
    figure, axes = plt.subplots(
        count,
        3 * order,
        figsize=(cell * sum(ratios), cell * aspect * count + 0.7),
        gridspec_kw={"width_ratios": ratios, "wspace": 0.05, "hspace": 0.06},
        squeeze=False,
    )
    figure.subplots_adjust(left=0.01, right=0.995, bottom=0.01, top=1 - 0.7 / (
        cell * aspect * count + 0.7))  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for i, g in enumerate(elements):
        for n in range(count):
            axes[n, 3 * i].imshow(target_GN[i, n], interpolation="nearest", aspect="auto")
            axes[n, 3 * i + 1].imshow(decoded_GN[i, n], interpolation="nearest", aspect="auto")
        axes[0, 3 * i].set_title("$g\\,x$", fontsize=9, color=PALE, pad=3)
        axes[0, 3 * i + 1].set_title("$\\mathrm{dec}(\\rho(g)\\,z)$", fontsize=9, color=PALE, pad=3)
        left, right = axes[0, 3 * i].get_position(), axes[0, 3 * i + 1].get_position()
        figure.text(
            (left.x0 + right.x1) / 2,
            1 - 0.07 / figure.get_figheight(),
            f"{LABELS[g]}\n{psnr_GN[i].mean():.1f} dB",
            ha="center",
            va="top",
            fontsize=10,
            color=INK,
            linespacing=1.35,
        )
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _flow(elements: tuple[str, ...], states_GTN: np.ndarray, path: Path) -> None:
    """One row per element, one column per image, from noise to image and a rest at the end."""
    scale = max(1, 64 // states_GTN.shape[3])
    gap, margin = 4, 96
    font = ImageFont.load_default(13)
    frames = []
    for t in range(states_GTN.shape[1]):
        cells = states_GTN[:, t].repeat(scale, axis=2).repeat(scale, axis=3)
        cells = np.pad(cells, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
        grid = rearrange(cells, "g n h w c -> (g h) (n w) c")
        frame = Image.new("RGB", (margin + grid.shape[1], gap + grid.shape[0]), "white")
        frame.paste(Image.fromarray(grid), (margin, gap))
        pen = ImageDraw.Draw(frame)
        for i, g in enumerate(elements):
            words = LABELS[g].replace(" flip", "\nflip").replace("rotation ", "rotation\n")
            y = gap + (i + 0.5) * cells.shape[2] - gap / 2
            pen.multiline_text((8, y), words, fill=INK, font=font, anchor="lm")
        frames.append(frame)
    # One palette for all frames keeps flat colours from flickering.
    palette = _stack([frames[0], frames[len(frames) // 2], frames[-1]]).quantize(255)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    durations = [400] + [70] * (len(frames) - 2) + [2200]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
    )


def _stack(frames: list[Image.Image]) -> Image.Image:
    return Image.fromarray(np.concatenate([np.asarray(f) for f in frames]))
