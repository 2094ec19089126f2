"""Comparing speeds fairly: contenders take turns in one run, and ratios are taken pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Spread(NamedTuple):
    """The median of some measurements, with the least and the largest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one measurement."""
    return Spread(median(values), min(values), max(values))


def take_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Measures every contender once a round, so that a machine that slows down slows down all.

    The order is reversed in every other round.

    Args:
      contenders: each measures itself once (seconds, or anything else) and is warm already.
      rounds: at least 1.

    Returns:
      {contender: one value per round}.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names[:: -1 if number % 2 else 1]:
            found[name].append(contenders[name]())
    return found


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of a / b over the rounds in which both were measured."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])
