"""The collectives of a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """All collectives of a kind among groups of a size.

    Attributes:
      kind: one of `KINDS`.
      group: devices that exchange; 0 where the text does not say.
      count: how often in a run of the program.
      bytes: of the arrays that are reduced, gathered or moved, whole as a group's devices have
        them together after a gather or before a scatter, in a run of the program. What goes over
        the wire is (N - 1) / N of it, twice that for an all-reduce.
      uncertain: some are in a loop of unknown length, and counted once.
    """

    kind: str
    group: int
    count: int
    bytes: int
    uncertain: bool


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    operands: list[str]
    text: str


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program's text (`compiled.as_text()`), by kind and size of the group.

    An operation that is split into a start and a done is counted at its start, one that is fused
    or wrapped where the computation that holds it is called. Those in the body of a loop count as
    often as the compiler knows it to run. Of the branches of a conditional each is counted.

    Raises:
      ValueError: for a text without an entry computation.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; is it a compiled program's?")
    found: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, (times, uncertain) in _runs(computations, entry).items():
        shapes = {i.name: i.shape for i in computations[name]}
        for one in computations[name]:
            kind = one.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            size, group = _payload(kind, one, shapes), _group_size(one.text)
            # How the TPU's compiler writes a reduce-scatter: an all-reduce and a slice, fused.
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            entry_ = found[kind, group]
            entry_[0] += times
            entry_[1] += times * size
            entry_[2] |= uncertain
    order = sorted(found.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
    return [
        Collective(kind, group, count, size, bool(uncertain))
        for (kind, group), (count, size, uncertain) in order
    ]


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = []
            if header[1]:
                entry = current
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, rest = match.groups()
            if operation := _OPERATION.search(rest):
                shape, after = rest[: operation.start()], rest[operation.end() :]
                operands = _NAME.findall(_until_closed(after))
                computations[current].append(
                    _Instruction(name, shape, operation[1], operands, after)
                )
    return computations, entry


def _until_closed(text: str) -> str:
    """The operands: up to the bracket that closes the operation's."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i]
    return text


def _runs(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs, and whether that is a guess from below."""
    runs: dict[str, tuple[int, bool]] = defaultdict(lambda: (0, False))

    def visit(name: str, times: int, uncertain: bool) -> None:
        before, guessed = runs[name]
        runs[name] = before + times, guessed or uncertain
        for one in computations[name]:
            trips: int | None = 1
            if one.operation == "while":
                trips = _trips(one.text, computations)
            for called in _called(one.text):
                if called in computations:
                    visit(called, times * (trips or 1), uncertain or trips is None)

    visit(entry, 1, False)
    return runs


def _trips(text: str, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often a loop runs; None where the text does not tell.

    Either the compiler says it, or the condition is `counter < constant`, as that of JAX's scan,
    whose counter starts at 0.
    """
    if said := _TRIPS.search(text):
        return int(said[1])
    condition = computations.get(next(iter(re.findall(r"condition=%?([\w.\-]+)", text)), ""), [])
    constants = {
        one.name: int(one.text.partition(")")[0])
        for one in condition
        if one.operation == "constant" and one.shape.startswith("s32[]")
    }
    last = condition[-1] if condition else None
    if last is None or last.operation != "compare" or "direction=LT" not in last.text:
        return None
    return constants.get(last.operands[1])


def _called(text: str) -> Iterator[str]:
    yield from _CALLED.findall(text)
    for branches in _BRANCHES.findall(text):
        yield from re.findall(r"[\w.\-]+", branches)


def _payload(kind: str, one: _Instruction, shapes: dict[str, str]) -> int:
    """Bytes of the whole arrays: what an all-gather gives, what the others take."""
    operands = sum(_bytes(shapes.get(name, "")) for name in one.operands)
    if kind != "all-gather":
        return operands
    result = _bytes(one.shape)  # of a start: the operands beside what is gathered
    return result - operands if one.operation.endswith("-start") else result


def _bytes(shape: str) -> int:
    """Of a shape's text, such as (f32[8,16]{1,0}, u32[])."""
    total = 0
    for kind, dims in _ARRAY.findall(shape):
        bits = BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits[0]) if digits else 0
        sizes = [int(n.lstrip("<=")) for n in dims.split(",") if n]
        total += math.prod(sizes) * bits // 8
    return total


def _group_size(text: str) -> int:
    """Of the three ways in which XLA writes groups: lists, an array of them, axes of a mesh."""
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(groups[2])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        # A part of an axis is 'name':(sizes before it)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 0
