"""Every use of torch's private parts.

Tested on torch 2.6 to 2.15, unless noted. The Rust code imports from here too, and reads
`Tensor._backward_hooks` and `UntypedStorage._cdata` by name.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.jit._recursive import wrap_cpp_module
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from ray_zerocopy.pickled import named

__all__ = [
    "FakeTensor",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "tree_leaves",
    "wrap_cpp_module",
]

# A module's dicts of parts, in its `__dict__`.
REGISTRIES = ("_parameters", "_buffers", "_modules")

# Tensors.
has_storage = torch._C._has_storage
make_subclass = torch.Tensor._make_subclass
set_conj = torch._C._set_conj
set_neg = torch._C._set_neg
ignoring_torch_function = torch._C.DisableTorchFunctionSubclass
outside_of_torch_functions = torch._C.DisableTorchFunction  # modes, too
parse_to = torch._C._nn._parse_to

# A tensor's attributes and slots, as in its own `__reduce_ex__`.
get_state = torch._utils._get_obj_state
set_state = torch._utils._set_obj_state

# `parametrize` makes a class for a module, and a property for a parameter.
inject_class = parametrize._inject_new_class
inject_property = parametrize._inject_property

# TorchScript: the functions beneath `torch.jit.save`, `torch.jit.load` and `torch.package`. Only
# these three warn of deprecation, from 2.9 on.
CompilationUnit = torch._C.CompilationUnit
DeserializationStorageContext = torch._C.DeserializationStorageContext
ModuleDict = torch._C.ModuleDict
PyTorchFileReader = torch._C.PyTorchFileReader
PyTorchFileWriter = torch._C.PyTorchFileWriter
ScriptMethod = torch._C.ScriptMethod
ScriptModuleSerializer = torch._C.ScriptModuleSerializer
create_function_from_graph = torch._C._create_function_from_graph
import_module_from_buffer = torch._C.import_ir_module_from_buffer
import_module_from_package = torch._C._import_ir_module_from_package


def default_device(device: torch.device | str) -> AbstractContextManager[Any]:
    """Create tensors on this device, whatever default device the caller has set.

    `torch.device(...)` and `set_default_device` are modes on a stack. A mode slows torch down, so
    this does nothing if the stack is empty.
    """
    return torch.device(device) if torch._C._len_torch_function_stack() else nullcontext()


def rebuilt_sparse() -> list[torch.Tensor]:
    """Return the list in which torch keeps each sparse tensor that was unpickled by this thread.

    Only `torch.load` empties it.
    """
    found = getattr(torch._utils, "_get_sparse_tensors_to_validate", None)  # a newer torch
    kept: list[torch.Tensor] = found() if found else torch._utils._sparse_tensors_to_validate
    return kept


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return the dict of a module's own parameters; None is an unset one."""
    own: dict[str, torch.nn.Parameter | None] = module._parameters
    return own


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the dict of a module's own buffers."""
    own: dict[str, torch.Tensor | None] = module._buffers
    return own


def renew_flat_weights(module: torch.nn.RNNBase) -> None:
    """Update an RNN's second list of its weights, and its weak references to them."""
    module._init_flat_weights()


def holds_meta(skeleton: bytes) -> bool:
    """Whether a pickle holds tensors on the meta device, which have no bytes."""
    return b"_rebuild_meta_tensor" in skeleton


def graph_makers(graph: torch.fx.Graph) -> tuple[Any, Any]:
    """Return the class that traced a graph, or None, and its code generator."""
    return graph._tracer_cls, graph._codegen


def graph_in(state: dict[str, Any]) -> Any:
    """Return the graph in a graph module's state."""
    return state["_graph"]


def compiled(module: torch.jit.ScriptModule) -> Any:
    """Return the C++ module of a script module."""
    return module._c


def outer(module: torch.jit.ScriptModule) -> Any:
    """Return the module that has the Python attributes; a traced module wraps it."""
    return vars(module).get("_actual_script_module", module)


def attribute_names(module: Any) -> Any:
    """Return the names of all attributes of a compiled module, without submodules.

    torch's own lists have only parameters and buffers.
    """
    return torch._C.ConcreteModuleType.from_jit_type(module._type()).get_attributes()


def methods_of(module: Any) -> list[Any]:
    """Return the methods of a compiled module; each has a `graph` and an `inlined_graph`."""
    return [module._get_method(name) for name in module._method_names()]


def shares_storage(tensor: torch.Tensor) -> bool:
    """Whether other tensors share the storage of this one."""
    return not has_storage(tensor) or holders(tensor.untyped_storage()) > 2


def holders(storage: torch.UntypedStorage) -> int:
    """Return the refcount of a storage, this reference included (tested on torch 2.15)."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def is_sole(storage: torch.UntypedStorage) -> bool:
    """Whether only this object can reach the bytes of a storage.

    That is certain only for resizable storages: torch's allocator made them, and numpy has no
    view of them. A device may read pinned memory, and torch keeps it for its next user.
    """
    return holders(storage) == 1 and storage.resizable() and not storage.is_pinned()


@named
def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    """Make a typed storage without a deprecation warning, as torch does internally."""
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def untyped(storage: torch.TypedStorage) -> torch.UntypedStorage:
    """Return the untyped storage of a typed one, without a deprecation warning."""
    return storage._untyped_storage


def program_graph(program: torch.export.ExportedProgram) -> bytes:
    """Serialize the graph of an exported program like `torch.export.save`, without its tensors.

    torch can leave the tensors out from 2.12 on. For older ones, replace them by empty tensors.
    """
    from torch._export.serde.serialize import serialize  # noqa: PLC0415 - imports sympy: a second

    tensors = ("serialize_state_dict", "serialize_constants", "serialize_example_inputs")
    if tensors[0] in inspect.signature(serialize).parameters:
        return bytes(serialize(program, **dict.fromkeys(tensors, False)).exported_program)
    hollow: Any = copy.copy(program)
    hollow._state_dict = {name: _hollow(value) for name, value in program.state_dict.items()}
    hollow._constants = {name: _hollow(value) for name, value in program.constants.items()}
    hollow._example_inputs = None
    return bytes(serialize(hollow).exported_program)


def _hollow(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    empty = torch.empty(0)
    return torch.nn.Parameter(empty) if isinstance(value, torch.nn.Parameter) else empty


@named
def exported_program(graph: bytes, *tensors: Any) -> torch.export.ExportedProgram:
    """Build an exported program from its graph, state dict, constants and example inputs."""
    from torch._export.serde.serialize import (  # noqa: PLC0415 - likewise
        SerializedArtifact,
        deserialize,
    )

    with torch.inference_mode(False):
        return deserialize(SerializedArtifact(graph, *tensors))
