"""Which files of a tar shard are one sample: an image, and what says something about it.

Files of one folder and one name up to the first dot belong together, wherever they lie in the
shard, as in webdataset: `7.jpg`, `7.cls`, `7.json`. `7.seg.png` beside `7.jpg` is another picture
of that sample, and is not its image. Where no image has the plain name, the dots are part of the
names, and every image is a sample of its own: `shot at 10.00.07.png`, `shot at 10.00.08.png`. So it
is where a number follows the dot: `7.5.png` beside `7.png`. Files of the name up to the last dot
belong to that image, those of the name up to the first to all. A name that comes again in one
shard begins another sample, called `7#2`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from efae_jax.data.image_types import foreign, is_image
from efae_jax.data.left_out import LeftOut
from efae_jax.data.tar_members import Member, Unusable

FURTHER = "further images of a sample, of which the first of the plain name is used"
BARE = "samples without an image"


class Sample(NamedTuple):
    """An image of a shard.

    key: its name in the shard. image: its file. companion: (number in the list of endings, file),
    or None.
    """

    key: str
    image: Member
    companion: tuple[int, Member] | None


class _Group:
    """The files of one name up to the first dot, in the order of the shard."""

    def __init__(self, name: str):
        self.name = name
        self.files: dict[str, Member] = {}  # by what follows the folder and this name


def samples(
    files: Iterable[Member | Unusable],
    companions: Sequence[str],
    left_out: LeftOut,
    where: str = "",
) -> list[Sample]:
    """The samples of a shard, in the order in which their names first come.

    Args:
      files: of the shard.
      companions: endings such as ".cls"; the first that a sample has is its companion.
      left_out: counts what is not used.
      where: the shard, for its examples.
    """
    groups: dict[str, _Group] = {}
    order: list[_Group] = []
    again: Counter[str] = Counter()  # how often a name began a sample
    found: list[Sample] = []
    for file in files:
        if isinstance(file, Unusable):
            left_out.add(file.why, f"{where}/{file.name}")
            continue
        folder, slash, base = file.name.rpartition("/")
        if base.startswith("."):  # macOS writes `._7.jpg` beside `7.jpg`
            if is_image(base):
                left_out.add("hidden files (their names begin with a dot)", f"{where}/{file.name}")
            continue
        stem, _, rest = base.partition(".")
        name = folder + slash + stem
        group = groups.get(name)
        if group is None or rest in group.files:
            again[name] += 1
            group = _Group(name if again[name] == 1 else f"{name}#{again[name]}")
            groups[name] = group
            order.append(group)
        group.files[rest] = file
    for group in order:
        found += _of_group(group, companions, left_out, where)
    return _named_apart(found)


def _named_apart(found: list[Sample]) -> list[Sample]:
    """Samples whose keys differ: `a.b.jpg` and `a.b.png` would both be called a.b."""
    taken: set[str] = set()
    for i, sample in enumerate(found):
        key, number = sample.key, 2
        while key in taken:
            key, number = f"{sample.key}#{number}", number + 1
        taken.add(key)
        if key != sample.key:
            found[i] = sample._replace(key=key)
    return found


def _of_group(
    group: _Group, companions: Sequence[str], left_out: LeftOut, where: str
) -> list[Sample]:
    images = [rest for rest in group.files if is_image(f"x.{rest}")]
    if not images:
        _count_foreign(group, left_out, where)
        return []
    plain = [rest for rest in images if "." not in rest]
    # A number is no part of a sample, as `seg` or `left` are: 1.png, 1.5.png, 1.75.png.
    used = plain[:1] + [rest for rest in images if _is_number(rest)] if plain else images
    for rest in images:
        if rest not in used:
            left_out.add(FURTHER, f"{where}/{group.files[rest].name}")
    found = []
    for rest in used:
        stem = os.path.splitext(rest)[0] if "." in rest else ""
        key = f"{group.name}.{stem}" if stem else group.name
        own = _companion(group, f"{stem}." if stem else "", companions)
        shared = _companion(group, "", companions) if own is None and stem else own
        found.append(Sample(key, group.files[rest], shared))
    return found


def _is_number(rest: str) -> bool:
    """Whether what follows the first dot is digits before the ending: 5.png, 00.07.png."""
    stem = os.path.splitext(rest)[0] if "." in rest else ""
    return stem.replace(".", "").isdecimal()


def _companion(group: _Group, start: str, companions: Sequence[str]) -> tuple[int, Member] | None:
    lower = {rest.lower(): file for rest, file in group.files.items()}
    for number, ending in enumerate(companions):
        if file := lower.get(start.lower() + ending[1:]):
            return number, file
    return None


def _count_foreign(group: _Group, left_out: LeftOut, where: str) -> None:
    for file in group.files.values():
        if kind := foreign(file.name):
            left_out.add(kind, f"{where}/{file.name}")
            return
    left_out.add(BARE, f"{where}/{next(iter(group.files.values())).name}")
