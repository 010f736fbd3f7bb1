"""Find the models in any object, at any depth, and replace them in a copy.

pipeline ─ replace ─▶ a copy with other objects in place of its models; all else is shared
"""

from __future__ import annotations

import copy
import copyreg
import functools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import torch


class StandsForModel:
    """Base class of objects that stand for a published model."""


MODELS = (torch.nn.Module, StandsForModel)


class Leaf:
    """Base class of objects that are not searched for models."""


# A function that sets a part in its holder, the part's key, and the part.
Part = tuple[Callable[[Any, Any, Any], None], Any, Any]

_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, type),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
    *(torch.Tensor, np.ndarray, ray.ObjectRef, Leaf),
)
_FIXED = (tuple, frozenset, functools.partial, types.MethodType)


def replace(root: Any, stand_in: Callable[[Any], Any]) -> Any:
    """Copy the objects that lead to a model, with `stand_in(model)` in place of each model.

    Each object is copied or replaced once, so a shared object stays shared. `root` does not change;
    the copy shares all objects that do not lead to a model.
    """
    return _Replacer(root, stand_in).copy(root)


class _Replacer:
    def __init__(self, root: object, stand_in: Callable[[Any], Any]) -> None:
        self.leading = leading_to_models(root)
        self.stand_in = stand_in
        self.copies: dict[int, Any] = {}

    def copy(self, node: Any) -> Any:
        if id(node) not in self.leading:
            return node
        if id(node) not in self.copies:
            if isinstance(node, MODELS):
                self.copies[id(node)] = self.stand_in(node)
            elif isinstance(node, _FIXED):
                remade = _remade(node, [self.copy(part) for part in _held(node)])
                self.copies.setdefault(id(node), remade)  # a cycle has made it already
            else:
                self.copies[id(node)] = new = _shallow(node)
                for set_part, key, part in _parts(node):
                    if id(part) in self.leading:
                        set_part(new, key, self.copy(part))
        return self.copies[id(node)]


def leading_to_models(root: object) -> dict[int, object]:
    """Return the root, the models it leads to, and all objects in between, by id."""
    found, waiting = {id(root): root}, [root]
    models: list[object] = []
    holders: dict[int, list[object]] = {}
    while waiting:
        node = waiting.pop()
        if isinstance(node, MODELS):
            models.append(node)
            continue
        for _, _, part in _parts(node):
            if isinstance(part, _LEAVES):
                continue
            holders.setdefault(id(part), []).append(node)
            if id(part) not in found:
                found[id(part)] = part
                waiting.append(part)

    leading: dict[int, object] = {}
    while models:
        node = models.pop()
        if id(node) not in leading:
            leading[id(node)] = node
            models += holders.get(id(node), [])
    return leading | {id(root): root}


def _parts(node: Any) -> Iterator[Part]:
    if isinstance(node, _FIXED):
        yield from ((operator.setitem, index, part) for index, part in enumerate(_held(node)))
        return
    if isinstance(node, dict):
        yield from ((operator.setitem, key, part) for key, part in node.items())
    elif isinstance(node, list | deque):
        yield from ((operator.setitem, index, part) for index, part in enumerate(node))
    elif isinstance(node, set):
        yield from ((_exchange, part, part) for part in node)
    yield from _attributes(node)


def _attributes(node: Any) -> Iterator[Part]:
    attributes = getattr(node, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((_set_in_dict, name, part) for name, part in attributes.items())
    for name in copyreg._slotnames(type(node)):  # type: ignore[attr-defined]
        if hasattr(node, name):
            yield object.__setattr__, name, getattr(node, name)


def _set_in_dict(node: Any, name: str, part: object) -> None:
    """Set an attribute, bypassing frozen dataclasses and properties of the same name."""
    node.__dict__[name] = part


def _exchange(node: set[Any], old: object, new: object) -> None:
    node.discard(old)
    node.add(new)


def _shallow(node: Any) -> Any:
    """Copy an object, bypassing its own copy and pickle methods, which may drop attributes."""
    if isinstance(node, dict | list | deque | set):
        return copy.copy(node)
    try:
        new = object.__new__(type(node))
    except TypeError:  # a class with its own memory layout
        return copy.copy(node)
    for set_part, name, part in _attributes(node):
        set_part(new, name, part)
    return new


def _held(node: Any) -> tuple[Any, ...]:
    """Return the parts of an immutable object."""
    match node:
        case functools.partial():
            return node.func, node.args, node.keywords
        case types.MethodType():
            return (node.__self__,)
    return tuple(node)


def _remade(node: Any, parts: list[Any]) -> Any:
    match node:
        case functools.partial():
            function, args, keywords = parts
            return type(node)(function, *args, **keywords)
        case types.MethodType():
            [owner] = parts
            replaced = isinstance(node.__self__, torch.nn.Module)
            return getattr(owner, node.__name__) if replaced else node.__func__.__get__(owner)
        case tuple() if hasattr(node, "_make"):
            return node._make(parts)
    return type(node)(parts)
