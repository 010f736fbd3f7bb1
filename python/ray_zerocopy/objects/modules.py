"""Reduce modules to their class and the state that differs from a new module's defaults."""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import parametrize

from ray_zerocopy import _core
from ray_zerocopy.objects import torch_inside as inside
from ray_zerocopy.objects import transformers_inside
from ray_zerocopy.pickled import named

restore_module = named(_core.restore_module)
initialized_module = named(_core.initialized_module)

# Makes an object without calling `__init__`; pickle has an opcode for this function.
_new_object = copyreg.__newobj__  # type: ignore[attr-defined]


def reducer(module: torch.nn.Module) -> Callable[[Any], Any] | None:
    """Return the function that reduces modules of this class, or None if the class reduces itself.

    It reduces a module to the class and the state that differs from the defaults.
    """
    kind: Any = type(module)
    reduces_by_default = (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__new__ is object.__new__
    )
    if not reduces_by_default:
        return None
    if _refuses_to_pickle(kind):
        base = parametrize.type_before_parametrizations(module)
        return _core.ModuleReducer(base, new_parametrized, restore_parametrized).reduce
    restore = restore_module
    if kind.__setstate__ is not torch.nn.Module.__setstate__ or _has_properties(kind):
        restore = restore_by_setstate
    if _resizes_buffers(kind):
        restore = restore_resizing
    if transformers_inside.is_pretrained(kind):
        restore = restore_pretrained
    return _core.ModuleReducer(kind, _new_object, restore).reduce


def _has_properties(kind: type) -> bool:
    """Whether the class has properties or slots: its attributes are then not all in its dict."""
    own = [vars(base) for base in kind.__mro__ if base not in (torch.nn.Module, object)]
    return any(
        hasattr(value, "__set__")
        for attributes in own
        for name, value in attributes.items()
        if name not in ("__dict__", "__weakref__")
    )


@functools.cache
def _resizes_buffers(kind: type) -> bool:
    """Whether a method of the class calls `resize_`, as in observers and fake quantisers."""
    return any(
        "resize_" in method.__code__.co_names
        for base in kind.__mro__
        for method in vars(base).values()
        if isinstance(method, types.FunctionType)
    )


def _refuses_to_pickle(kind: type) -> bool:
    """Whether `parametrize` made this class: it has a `__getstate__` that only raises."""
    getstate = kind.__dict__.get("__getstate__")
    return getstate is not None and getstate.__module__ == parametrize.__name__


@named
def restore_by_setstate(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module through `__setstate__`: its class defines one, or has properties."""
    _core.note_module(module)
    module.__setstate__(_core.module_state(differing))


@named
def restore_resizing(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module that resizes its buffers; copy them into storages that torch can resize.

    torch cannot resize a storage over memory that it has not allocated (pytorch#170298). Buffers
    that share their storage stay over the block.
    """
    restore_by_setstate(module, differing)
    with torch.no_grad():
        for buffer in inside.buffers_of(module).values():
            if buffer is not None and not inside.shares_storage(buffer):
                buffer.set_(buffer.clone())


@named
def restore_pretrained(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a model of transformers, and register its class in this process."""
    restore_by_setstate(module, differing)
    transformers_inside.enter_class(module)


@named
def new_parametrized(kind: Any) -> Any:
    """Make a module of this class; `restore_parametrized` derives its final class."""
    return kind.__new__(kind)


@named
def restore_parametrized(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module and the class that `parametrize` made for it.

    That class does not pickle. torch makes it again, so that `parametrize.cached` still works.
    """
    restore_by_setstate(module, differing)
    inside.inject_class(module)
    for name in module.parametrizations:
        inside.inject_property(module, name)


def make_picklable(module: torch.nn.Module) -> None:
    """Make a parametrized module from `join` picklable on its own.

    `join` has made its class for this module only. Other modules do not change.
    """
    if _refuses_to_pickle(type(module)):
        type(module).__reduce_ex__ = _reduce_parametrized  # type: ignore[assignment]


def _reduce_parametrized(module: torch.nn.Module, protocol: Any) -> Any:
    base = parametrize.type_before_parametrizations(module)
    return _core.ModuleReducer(base, new_parametrized, restore_parametrized).reduce(module)
