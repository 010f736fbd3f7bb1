"""Every name of ours that a stored pickle holds.

A pickle names functions by module and name, so these names are part of the format: they never
change. `HOMES` lists them. A function may live in any module; `named` makes pickles name it here.
Its signature may grow by arguments that have defaults. `tests/test_pickled.py` fails when a pickle
names anything else of ours.

This module imports nothing of ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

HOMES = {
    # an object: its skeleton, its table, its block
    "load": "shared",
    # tensors and storages
    "tensor_subclass": "skeleton",
    "typed_storage": "torch_inside",
    # numpy arrays
    "array": "skeleton",
    "set_array_attributes": "skeleton",
    # modules
    "initialized_module": "_core",
    "restore_module": "_core",
    "restore_by_setstate": "skeleton",
    "restore_pretrained": "skeleton",
    "new_parametrized": "skeleton",
    "restore_parametrized": "skeleton",
    # torch.fx
    "graph_module": "graph",
    "restore_graph_module": "graph",
    "graph": "graph",
    "set_graph_metadata": "graph",
    "graph_node": "graph",
    "graph_index": "graph",
    # TorchScript, torch.export
    "script_module": "torchscript",
    "set_script_attributes": "torchscript",
    "script_function": "torchscript",
    "exported_program": "torch_inside",
    # what is passed about instead of a model
    "tensors": "rewrite",
    "call": "invoke",
    "method": "invoke",
    "shim": "invoke",
    "evaluated": "invoke",
    "wrapper": "wrappers",
    "handle": "wrappers",
    "in_eval_mode": "wrappers",
}
"""The module where each function lives, by the name in pickles."""

F = TypeVar("F", bound=Callable[..., Any])


def named(function: F) -> F:
    """Have pickles name a function by this module; a decorator."""
    if function.__name__ not in HOMES:
        raise LookupError(f"{function.__name__} is not in ray_zerocopy.pickled.HOMES")
    function.__module__ = __name__
    return function


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ray_zerocopy.{HOMES[name]}"), name)
