"""Every use of private parts of transformers and accelerate.

Tested on transformers 4.50 to 5.23 and accelerate 1.15. It imports neither.
"""

from __future__ import annotations

import operator
import sys
from contextvars import ContextVar
from typing import Any

import torch
from ray import cloudpickle


def is_pretrained(kind: type) -> bool:
    """Whether a class is one of transformers' models."""
    return any(base.__module__ == "transformers.modeling_utils" for base in kind.__mro__)


def send_by_value(obj: Any) -> None:
    """Make cloudpickle pickle a class or function by value that came with a checkpoint.

    `trust_remote_code=True` imports it from a folder that is not on the path of other processes.
    """
    if (obj.__module__ or "").startswith("transformers_modules."):
        module = sys.modules.get(obj.__module__)
        if module is not None and obj.__module__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)


def is_offloaded(skeleton: bytes) -> bool:
    """Whether a pickle holds a model whose hooks load its values at each call."""
    return b"AlignDevicesHook" in skeleton


def reads_files(part: object) -> bool:
    """Whether such hooks read values from files through this object."""
    return type(part).__name__ == "OffloadedWeightsLoader" and bool(vars(part)["index"])


def enter_class(module: torch.nn.Module) -> None:
    """Register a model's class, as `__init__` would.

    Without it, `output_hidden_states=True` returns none and raises no error in a process that has
    never made a model of that class. (transformers 5)
    """
    known = getattr(sys.modules["transformers.modeling_utils"], "_CAN_RECORD_REGISTRY", None)
    if known is not None:
        dict.__setitem__(known, str(type(module)), module._can_record_outputs)


def reduce_context_var(variable: ContextVar[Any]) -> Any:
    """Reduce a context variable to its path in a module: a global, or an attribute of one.

    Every process has its own there. The hooks of `output_hidden_states=True` hold one in a global
    object. (transformers 5)
    """
    for name, module in list(sys.modules.items()):
        for path, value in list(getattr(module, "__dict__", {}).items()):
            inner = getattr(value, "__dict__", {}) if type(value).__module__ == name else {}
            found = {path: value, **{f"{path}.{key}": part for key, part in inner.items()}}
            for path, value in found.items():
                if value is variable and name != "__main__":
                    return operator.attrgetter(path), (module,)
    return NotImplemented
