"""What files of weights are called: in diffusers' folders, with variants and shards; TAESD's pairs.

    diffusion_pytorch_model[.VARIANT].safetensors
    diffusion_pytorch_model[.VARIANT]-00001-of-00002[.VARIANT].safetensors
    diffusion_pytorch_model.safetensors.index[.VARIANT].json

and the same with the ending .bin, or beginning with `model` or `pytorch_model`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from efae_jax.convert.places import ENDINGS

# In the order of choice: the first that is there is read.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", "fp32", "fp16", "bf16")
SUFFIXES = ("safetensors", "bin")
SIDES = ("encoder", "decoder")

_STEM = "|".join(STEMS)
_SUFFIX = "|".join(SUFFIXES)
_VARIANT = r"(?:\.(?P<{}>[\w-]+?))?"
_WHOLE = re.compile(rf"(?P<stem>{_STEM}){_VARIANT.format('variant')}\.(?P<suffix>{_SUFFIX})")
_SHARD = re.compile(
    rf"(?P<stem>{_STEM}){_VARIANT.format('before')}-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})"
    rf"{_VARIANT.format('after')}\.(?P<suffix>{_SUFFIX})"
)
_INDEX = re.compile(
    rf"(?P<stem>{_STEM}){_VARIANT.format('before')}\.(?P<suffix>{_SUFFIX})\.index"
    rf"{_VARIANT.format('after')}\.json"
)
_SIDE = re.compile(r"(?P<stem>.*[_.-]|)(?P<side>encoder|decoder)")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Weights as one file or several.

    Attributes:
      stem, variant, suffix: of the name.
      shards: their names, in order; of one file, its own.
      index: the JSON that lists them, or None.
      count: of shards that there should be.
    """

    stem: str
    variant: str
    suffix: str
    shards: tuple[str, ...]
    index: str | None
    count: int

    @property
    def rank(self) -> tuple[int, int, str, int, int]:
        """The smallest is chosen. Other variants come last, by name: `ema` before `non_ema`."""
        known = self.variant in VARIANTS
        variant = VARIANTS.index(self.variant) if known else len(VARIANTS)
        several = int(self.count > 1 or self.index is not None)
        place = (STEMS.index(self.stem), variant, self.variant)
        return (*place, SUFFIXES.index(self.suffix), several)


def candidates(names: Iterable[str]) -> list[Candidate]:
    """The weights among the names of a folder, the best first."""
    found = []
    shards: dict[tuple[str, str, str], dict[int, str]] = {}
    counts: dict[tuple[str, str, str], int] = {}
    indices: dict[tuple[str, str, str], str] = {}
    for name in sorted(names):
        if match := _SHARD.fullmatch(name):
            key = (match["stem"], match["before"] or match["after"] or "", match["suffix"])
            shards.setdefault(key, {})[int(match["number"])] = name
            counts[key] = int(match["count"])
        elif match := _WHOLE.fullmatch(name):
            stem, variant, suffix = match["stem"], match["variant"] or "", match["suffix"]
            found.append(Candidate(stem, variant, suffix, (name,), None, 1))
        elif match := _INDEX.fullmatch(name):
            key = (match["stem"], match["before"] or match["after"] or "", match["suffix"])
            indices[key] = name
    for key in {**shards, **indices}:
        numbered = shards.get(key, {})
        names_in_order = tuple(numbered[n] for n in sorted(numbered))
        found.append(Candidate(*key, names_in_order, indices.get(key), counts.get(key, 1)))
    return sorted(found, key=lambda candidate: candidate.rank)


def side_of(name: str) -> str | None:
    """Which half of a pair a file is by its name, `taesd_encoder.pth`; None for others."""
    match = _SIDE.fullmatch(PurePosixPath(name).stem)
    return match["side"] if match else None


def partner(name: str, names: Iterable[str]) -> str | None:
    """The other half's name among those of a folder, with the same ending or another."""
    path = PurePosixPath(name)
    if (match := _SIDE.fullmatch(path.stem)) is None:
        return None
    other = match["stem"] + SIDES[match["side"] == SIDES[0]]
    there = set(names)
    return next((n for s in (path.suffix, *ENDINGS) if (n := other + s) in there), None)


def pairs(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Halves by what their names have in common: {"taesd_": {"encoder": ..., "decoder": ...}}.

    Of a half with several endings, the first of `ENDINGS` counts.
    """
    found: dict[str, dict[str, str]] = {}
    halves = [n for n in names if PurePosixPath(n).suffix in ENDINGS]
    for name in sorted(halves, key=lambda n: ENDINGS.index(PurePosixPath(n).suffix)):
        if match := _SIDE.fullmatch(PurePosixPath(name).stem):
            found.setdefault(match["stem"], {}).setdefault(match["side"], name)
    return found
