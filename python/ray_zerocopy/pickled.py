"""Every name of this package that a stored pickle can contain.

A pickle refers to functions by module and name, so these names are part of the format and never
change. `HOMES` lists them. A function may live in any module; `named` makes pickles refer to it
here. New arguments must have defaults. `tests/test_pickled.py` fails when a pickle contains
another name of this package.

This module imports no other module of this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

HOMES = {
    # an object: its skeleton, its table, its block
    "load": "store.envelope",
    "item": "store.automatic",
    # tensors and storages
    "set_subclass_state": "objects.tensors",
    "tensor_subclass": "objects.tensors",
    "typed_storage": "objects.torch_inside",
    # numpy arrays
    "array": "objects.arrays",
    "set_array_attributes": "objects.arrays",
    # modules
    "initialized_module": "_core",
    "restore_module": "_core",
    "restore_by_setstate": "objects.modules",
    "restore_resizing": "objects.modules",
    "restore_pretrained": "objects.modules",
    "new_parametrized": "objects.modules",
    "restore_parametrized": "objects.modules",
    # functions and classes by value
    "code": "objects.bytecode",
    # torch.fx
    "graph_module": "objects.fx",
    "restore_graph_module": "objects.fx",
    "graph": "objects.fx",
    "set_graph_metadata": "objects.fx",
    "graph_node": "objects.fx",
    "graph_index": "objects.fx",
    # TorchScript, torch.export
    "script_module": "objects.programs",
    "set_script_attributes": "objects.programs",
    "script_function": "objects.programs",
    "exported_program": "objects.torch_inside",
    # handles that stand for a model
    "tensors": "rewrite",
    "call": "invoke",
    "method": "invoke",
    "shim": "invoke",
    "evaluated": "invoke",
    "wrapper": "wrappers",
    "handle": "wrappers",
    "in_eval_mode": "wrappers",
    # published versions
    "version": "registry.records",
    "plan": "registry.records",
    "live": "registry.follower",
}
"""Name in pickles to the module that defines the function."""

F = TypeVar("F", bound=Callable[..., Any])


def named(function: F) -> F:
    """Make pickles refer to a function by this module (a decorator)."""
    if function.__name__ not in HOMES:
        raise LookupError(f"{function.__name__} is not in ray_zerocopy.pickled.HOMES")
    function.__module__ = __name__
    return function


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ray_zerocopy.{HOMES[name]}"), name)
