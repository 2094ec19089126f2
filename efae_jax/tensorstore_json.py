"""Memory that TensorStore loses whenever it describes something as JSON, given back.

Up to 0.1.86 at least, TensorStore counts what it hands to Python as JSON once too often: every
name and every value in a JSON object, at any depth, has a reference that nobody holds, and is
never freed. Orbax asks for such JSON twice for every item and once for every array that it saves,
so that a run of some hundred arrays lost 0.15 MB with every checkpoint.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Collection
from typing import Any

import tensorstore


def give_back_references() -> None:
    """Has the functions of TensorStore that orbax asks for JSON lose none of it.

    Their results stay what they were. A TensorStore that counts rightly is left to itself. Further
    calls change nothing.
    """
    if not _counts_too_often(tensorstore.KvStore.Spec({"driver": "memory", "path": "tried/"})):
        return
    for owner, name in (
        (tensorstore, "experimental_collect_matching_metrics"),
        (tensorstore.KvStore.Spec, "to_json"),
        (tensorstore.Spec, "to_json"),
    ):
        setattr(owner, name, _giving_back(getattr(owner, name)))


def _counts_too_often(spec: Any) -> bool:
    """Whether every name and every value in its JSON has a reference that nobody holds."""
    json = spec.to_json()
    return {*_counts(json.keys()), *_counts(json.values())} == {_USUAL + 1}


def _giving_back(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        json = function(*args, **options)
        _give_back(json)
        return json

    return wrapper


def _give_back(json: Any) -> None:
    """Takes the references that nobody holds off the names and values of every object."""
    if isinstance(json, dict):
        for members in (json.keys(), json.values()):
            counts = _counts(members)
            # One without a reference too many says that this function counts rightly: an object
            # that two others hold would look as if one of them were lost.
            if _USUAL in counts:
                continue
            # One more than usual is the dictionary's reference and the one that nobody holds: no
            # one else has this. Small integers, None and the like are shared, and never freed.
            for member, count in zip(members, counts, strict=True):
                if count == _USUAL + 1:
                    _decrease(member)
    elif not isinstance(json, list):
        return
    for value in json.values() if isinstance(json, dict) else json:
        _give_back(value)


def _counts(members: Collection[Any]) -> list[int]:
    """References to each of them, those that counting takes among them."""
    return [sys.getrefcount(member) for member in members]


_USUAL = _counts({"": object()}.values())[0]  # of what lies in one dictionary and nowhere else
_decrease = ctypes.pythonapi.Py_DecRef
_decrease.argtypes, _decrease.restype = [ctypes.py_object], None
