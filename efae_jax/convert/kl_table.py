"""Names of the arrays of encoders and decoders of the latent-diffusion family (`models.kl`).

diffusers, LDM and vqgan-training name the same parts; each format states its `Names`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efae_jax.convert import layout

_MOST = 32  # levels, or blocks of a level


@dataclasses.dataclass(frozen=True)
class Names:
    """How a format calls the parts.

    Attributes:
      down, up: a level of the encoder, of the decoder; "{i}" is its number.
      up_outwards: the decoder's levels count from the latent outwards; else from the image.
      block, shortcut: a residual block of a level, with "{j}", and its 1x1 convolution.
      downsample, upsample: of a level.
      middle: its block, attention, block.
      norm_out: before the last convolution.
      level_attention: that of a level's block, with "{j}".
      attention: our name -> their name, of an attention's parts.
      fused: query, key and value are one matrix, and have no biases.
      linear: how the attention's matrices are stored.
    """

    down: str
    up: str
    up_outwards: bool
    block: str
    shortcut: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    norm_out: str
    level_attention: str
    attention: Mapping[str, str]
    fused: bool
    linear: layout.Layout


LDM = Names(
    down="down.{i}",
    up="up.{i}",
    up_outwards=False,
    block="block.{j}",
    shortcut="nin_shortcut",
    downsample="downsample.conv",
    upsample="upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    level_attention="attn.{j}",
    attention={"norm": "norm", "query": "q", "key": "k", "value": "v", "out": "proj_out"},
    fused=False,
    linear=layout.LINEAR_AS_CONV,
)
AURA = dataclasses.replace(
    LDM, attention={"norm": "norm", "qkv": "qkv", "out": "proj_out"}, fused=True
)
DIFFUSERS = Names(
    down="down_blocks.{i}",
    up="up_blocks.{i}",
    up_outwards=True,
    block="resnets.{j}",
    shortcut="conv_shortcut",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    level_attention="attentions.{j}",
    attention={
        "norm": "group_norm",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "out": "to_out.0",
    },
    fused=False,
    linear=layout.LINEAR,
)


def table(names: Names, model: Any) -> list[layout.Entry]:
    """The names of all arrays of the model that `config.model` describes."""
    widths = tuple(model.widths)
    down, up = (getattr(model, name, ()) for name in ("down_attention", "up_attention"))
    outwards = tuple(reversed(tuple(model.decoder_widths) or widths))
    entries = layout.conv("encoder.conv_in", "encoder/conv_in")
    for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths))):
        inputs = (before, *[width] * (model.blocks - 1))
        theirs, ours = f"encoder.{names.down.format(i=i)}", f"encoder/levels/{i}"
        entries += _level(names, theirs, ours, inputs, width, i in down)
        if i < len(widths) - 1 and not (model.wavelet and i == 0):
            entries += layout.conv(f"{theirs}.{names.downsample}", f"{ours}/down")
    entries += _ends(names, "encoder", widths[-1], model.attention)

    entries += layout.conv("decoder.conv_in", "decoder/conv_in")
    for i, (before, width) in enumerate(itertools.pairwise((outwards[0], *outwards))):
        here = len(outwards) - 1 - i  # counted from the image
        number = i if names.up_outwards else here
        theirs, ours = f"decoder.{names.up.format(i=number)}", f"decoder/levels/{i}"
        inputs = (before, *[width] * model.blocks)
        entries += _level(names, theirs, ours, inputs, width, here in up)
        if i < len(outwards) - 1:
            entries += layout.conv(f"{theirs}.{names.upsample}", f"{ours}/up")
    entries += _ends(names, "decoder", outwards[0], model.attention)
    if model.quant:
        entries += layout.conv("quant_conv", "encoder/quant")
    if model.post_quant:
        entries += layout.conv("post_quant_conv", "decoder/post_quant")
    return entries


def _level(
    names: Names, theirs: str, ours: str, inputs: Sequence[int], width: int, attention: bool
) -> list[layout.Entry]:
    entries = []
    for j, n_in in enumerate(inputs):
        block = f"{theirs}.{names.block.format(j=j)}"
        entries += _block(names, block, f"{ours}/blocks/{j}", n_in != width)
        if attention:
            place = f"{theirs}.{names.level_attention.format(j=j)}"
            entries += _attention(names, place, f"{ours}/attentions/{j}")
    return entries


def _attention(names: Names, theirs: str, ours: str) -> list[layout.Entry]:
    entries = []
    for our, their in names.attention.items():
        pair = (f"{theirs}.{their}", f"{ours}/{our}")
        if our == "norm":
            entries += layout.norm(*pair)
        else:
            entries += layout.linear(*pair, bias=not names.fused, layout=names.linear)
    return entries


def _block(names: Names, theirs: str, ours: str, shortcut: bool) -> list[layout.Entry]:
    entries = []
    for i in (1, 2):
        entries += layout.norm(f"{theirs}.norm{i}", f"{ours}/norm{i}")
        entries += layout.conv(f"{theirs}.conv{i}", f"{ours}/conv{i}")
    if shortcut:
        entries += layout.conv(f"{theirs}.{names.shortcut}", f"{ours}/shortcut")
    return entries


def _ends(names: Names, side: str, width: int, attention: bool) -> list[layout.Entry]:
    first, middle, second = (f"{side}.{name}" for name in names.middle)
    entries = _block(names, first, f"{side}/middle/block1", False)
    entries += _block(names, second, f"{side}/middle/block2", False)
    if attention:
        entries += _attention(names, middle, f"{side}/middle/attention")
    entries += layout.norm(f"{side}.{names.norm_out}", f"{side}/norm_out")
    return entries + layout.conv(f"{side}.conv_out", f"{side}/conv_out")


def is_fused(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether names in LDM's style are those of vqgan-training: one matrix for query, key and
    value, or, without attention, an encoder that gives no log-variance."""
    if any(".attn_1." in name for name in tensors):
        return any(".attn_1.qkv." in name for name in tensors)
    out, inner = (tensors.get(f"{n}.weight") for n in ("encoder.conv_out", "decoder.conv_in"))
    if out is None or inner is None or out.ndim != 4 or inner.ndim != 4:
        return False
    return out.shape[0] == inner.shape[1]


def infer(
    tensors: Mapping[str, np.ndarray], names: Names = LDM
) -> tuple[dict[str, Any], int, list[str]]:
    """Reads a structure off names and shapes: (fields of config.model, image channels, what is
    wrong)."""
    problems: list[str] = []

    def size(name: str, axis: int, default: int) -> int:
        shape = tensors[f"{name}.weight"].shape if f"{name}.weight" in tensors else None
        if shape is None or (len(shape) == 4 and 0 not in shape):
            return default if shape is None else shape[axis]
        problems.append(f"{name}.weight is {shape}, expected 4 dimensions, none of them 0")
        return default

    def levels(side: str, level: str, outwards: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths, and the levels with attention, from the image inwards."""
        start = f"{side}.{level}".replace("{i}", "")
        count = 1 + _largest(tensors, rf"{re.escape(start)}(\d+)\.")
        found: list[int] = []
        for i in range(count):
            # Either convolution of the first block, so that a lost one is not a wrong width.
            block = f"{start}{i}.{names.block.format(j=0)}"
            width = size(f"{block}.conv2", 0, found[-1] if found else 1)
            found.append(size(f"{block}.conv1", 0, width))
        place = names.level_attention.format(j=0)
        attended = [
            i for i in range(count) if any(n.startswith(f"{start}{i}.{place}.") for n in tensors)
        ]
        if outwards:
            found.reverse()
            attended = [count - 1 - i for i in reversed(attended)]
        return tuple(found), tuple(attended)

    (encoder, down), (decoder, up) = (
        levels("encoder", names.down, False),
        levels("decoder", names.up, names.up_outwards),
    )
    first = f"encoder.{names.down.format(i=0)}"
    image = size("decoder.conv_out", 0, 3)
    wavelet = (
        names is LDM
        and not any(name.startswith(f"{first}.downsample.") for name in tensors)
        and size("encoder.conv_in", 1, image) == 4 * image
    )
    fields = {
        "widths": encoder,
        "decoder_widths": () if decoder == encoder else decoder,
        "blocks": 1
        + _largest(tensors, re.escape(f"{first}.{names.block}").replace(r"\{j\}", r"(\d+)\.")),
        "latent_channels": size("decoder.conv_in", 1, 4),
        "attention": any(f".{names.middle[1]}." in name for name in tensors),
        "down_attention": down,
        "up_attention": up,
        "wavelet": wavelet,
        "quant": any(name.startswith("quant_conv.") for name in tensors),
        "post_quant": any(name.startswith("post_quant_conv.") for name in tensors),
    }
    return fields, image, problems


def _largest(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
    # An absurd number in a name must not make a table of that length: it is left over.
    numbers = [int(m[1][:9]) for name in tensors if (m := re.match(pattern, name))]
    return max((n for n in numbers if n < _MOST), default=0)
