"""Reduce sets of a subclass to the class and a plain set.

Python reduces them to a list, in an order that depends on the process's hash seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

KINDS = (set, frozenset, WeakSet)


def reducer(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that reduces sets of a class; None if the class pickles its own way."""
    if kind is WeakSet:
        return _reduce_weak
    own = kind.__reduce_ex__, kind.__reduce__
    known = [(object.__reduce_ex__, base.__reduce__) for base in (set, frozenset)]
    return _reduce if own in known else None


def _reduce(members: Any) -> Any:
    kind, _, state = members.__reduce__()
    return kind, (frozenset(members),), state


def _reduce_weak(members: Any) -> Any:
    return WeakSet, (frozenset(members),)
