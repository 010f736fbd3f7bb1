"""Split an object graph into its skeleton and its tensors, and join them again.

The skeleton is a pickle in which every tensor is a number. `split` writes it and notes, for each
number, a view (dtype, shape, stride, offset) over a storage; `join` reads it with the tensors at
hand. A pickler reaches every tensor wherever it hangs, and sees the same object twice as one.
"""

from __future__ import annotations

import copyreg
import functools
import io
import operator
import pickle
import pickletools
import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import cloudpickle
from torch.nn.utils import parametrize
from torch.utils.hooks import warn_if_has_hooks

from ray_zerocopy import _core, graph, torchscript
from ray_zerocopy import torch_inside as inside
from ray_zerocopy.errors import HostCopyWarning
from ray_zerocopy.pickled import named

# Buffers of numpy arrays and the like stay in the skeleton below one page.
_BUFFER_NBYTES = 4096


@dataclass
class Split:
    """An object graph in parts: its skeleton, and its tensors where they still lie.

    `buffers` names those of the sources that are no tensors but buffers, such as numpy's.
    """

    skeleton: bytes
    sources: _core.Sources
    buffers: list[int]


def split(obj: object) -> Split:
    """Take the tensors out of `obj`, which is not changed and of which nothing is copied.

    Tensors of another device are the exception: they are copied to the host, with a
    `HostCopyWarning`. As in any pickle, gradients and hooks of tensors stay behind.
    """
    file = io.BytesIO()
    splitter = _Splitter(file)
    splitter.dump(obj)
    return Split(file.getvalue(), splitter.sources, splitter.buffers)


def join(skeleton: bytes, tensors: Sequence[object], buffers: Sequence[object]) -> Any:
    """Build the object again around its tensors; the inverse of `split`."""
    unpickler = _Joiner(io.BytesIO(skeleton), buffers=buffers)
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return unpickler.load()


def unshared_nbytes(skeleton: bytes) -> int:
    """Count the bytes of a page and more that lie in a skeleton, where each load copies them.

    They belong to objects that turn their weights into `bytes` themselves, to compiled code, and to
    tensors in formats that torch packs.
    """
    parts = (part for _, part, _ in pickletools.genops(skeleton))
    sizes = [len(part) for part in parts if isinstance(part, bytes | bytearray)]
    return sum(size for size in sizes if size >= _BUFFER_NBYTES)


class _Joiner(pickle.Unpickler):
    """A class of our own, so that its `persistent_load` can be set."""


restore_module = named(_core.restore_module)
initialized_module = named(_core.initialized_module)

# Makes an object without its `__init__`; pickle knows this function and has an opcode for it.
_new_object = copyreg.__newobj__  # type: ignore[attr-defined]


class _Splitter(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Pickles everything but the bytes of tensors.

    It is Ray's own pickler, so that ObjectRefs, actor handles and registered serializers in the
    graph behave as in `ray.put`.
    """

    def __init__(self, file: io.BytesIO) -> None:
        self.sources = _core.Sources(_to_host)
        self.persistent_id = self.sources.take
        self.buffers: list[int] = []
        # never a method of this object's: in a cycle, it would keep the model until a collection
        take = functools.partial(_take_buffer, self.sources, self.buffers)
        super().__init__(file, protocol=5, buffer_callback=take)
        self._reducers: dict[type, Callable[[Any], Any] | None] = {}

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind not in self._reducers:
            self._reducers[kind] = _reducer(obj)
        reduce = self._reducers[kind] or super().reducer_override
        return reduce(obj)


def _take_buffer(sources: _core.Sources, taken: list[int], buffer: pickle.PickleBuffer) -> bool:
    """Take a buffer out of band; true leaves it in the skeleton, as pickle has it."""
    raw = buffer.raw()
    if raw.nbytes < _BUFFER_NBYTES:
        return True
    taken.append(sources.take_buffer(raw))
    return False


def _to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    message = f"tensors on {storage.device} are copied to the host and load on the CPU"
    warnings.warn(f"{message}; see rzc.get(device=...)", HostCopyWarning, stacklevel=2)
    return storage.cpu()


def _reducer(obj: Any) -> Callable[[Any], Any] | None:
    """Give what reduces objects of this one's class; None if that is cloudpickle's affair."""
    if isinstance(obj, torch.Tensor):
        return _reduce_tensor
    if isinstance(obj, torchscript.PROGRAMS):
        return torchscript.reduce
    if isinstance(obj, torch.fx.GraphModule):
        return graph.module_reducer(type(obj))
    if isinstance(obj, torch.nn.Module):
        return _module_reducer(obj)
    if isinstance(obj, torch.fx.Graph):
        return graph.reduce_graph
    if isinstance(obj, torch.fx.Node):
        return graph.reduce_node
    if isinstance(obj, graph.OPERATORS):
        return graph.reduce_operator
    if isinstance(obj, np.ndarray):
        return _array_reducer(type(obj))
    if isinstance(obj, torch.UntypedStorage):
        return _reduce_storage
    if isinstance(obj, torch.TypedStorage):
        return _reduce_typed_storage
    if isinstance(obj, ContextVar):
        return _reduce_context_var
    return None


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """Reduce what is more than a plain tensor: attributes, a class of its own, components."""
    kind = type(tensor)
    own = kind.__reduce_ex__ not in (
        torch.Tensor.__reduce_ex__,
        torch.nn.Parameter.__reduce_ex__,
    )
    dispatches = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own or dispatches or not _core.has_plain_storage(tensor):
        return tensor.__reduce_ex__(5)
    warn_if_has_hooks(tensor)
    with inside.ignoring_torch_function():
        plain = tensor.detach().as_subclass(torch.Tensor)
    made = (tensor_subclass, (kind, plain, tensor.requires_grad))
    state = inside.get_state(tensor)
    return (*made, state, None, None, inside.set_state) if state else made


@named
def tensor_subclass(kind: type, plain: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """Unpickle a tensor of a class of its own."""
    return inside.make_subclass(kind, plain, requires_grad)


def _reduce_storage(storage: torch.UntypedStorage) -> Any:
    everything = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch.Tensor.untyped_storage, (everything,)


def _reduce_typed_storage(storage: torch.TypedStorage) -> Any:
    return inside.typed_storage, (inside.untyped(storage), storage.dtype)


def _array_reducer(kind: Any) -> Callable[[Any], Any] | None:
    """Give what reduces arrays of a class; None if the class has to do with how it pickles."""
    _ = np.rec  # numpy 2 imports it when asked; before, its classes would travel by value
    pickled = ("__reduce__", "__reduce_ex__", "__setstate__")
    own = [getattr(kind, name) for name in pickled]
    known = [[getattr(base, name) for name in pickled] for base in (np.ndarray, np.ma.MaskedArray)]
    return _reduce_array if own in known else None


def _reduce_array(whole: np.ndarray) -> Any:
    """Reduce an array to a buffer of its elements, in the order in which they lie in memory.

    numpy does so only for arrays of no other class than its own; of a memory map it writes the
    whole file into the pickle. What has gaps comes back without. (numpy 2.4)
    """
    plain = whole.view(np.ndarray)
    if plain.dtype.hasobject or not plain.nbytes:
        return NotImplemented
    if not np.may_share_memory(elements := plain.ravel(order="K"), plain):
        plain = plain.copy(order="K")
        elements = plain.ravel(order="K")
    buffer = pickle.PickleBuffer(elements.view(np.uint8).data)
    made = (array, (type(whole), plain.shape, plain.dtype, plain.strides, buffer))
    state = {k: v for k, v in getattr(whole, "__dict__", {}).items() if k not in _OF_A_FILE}
    return (*made, state, None, None, set_array_attributes) if state else made


# What a memory map knows of its file, which its elements leave for the block.
_OF_A_FILE = ("_mmap", "filename", "mode", "offset")


@named
def array(
    kind: type[np.ndarray], shape: Any, dtype: np.dtype, strides: Any, buffer: Any
) -> np.ndarray:
    """Unpickle an array over a buffer; strides in bytes."""
    return np.ndarray(shape, dtype, buffer, 0, strides).view(kind)


@named
def set_array_attributes(array: np.ndarray, attributes: dict[str, Any]) -> None:
    """Give an array of a subclass its attributes."""
    vars(array).update(attributes)


def _reduce_context_var(variable: ContextVar[Any]) -> Any:
    """Reduce a context variable to where a module keeps it: by itself, or in an object of its own.

    Every process has one of its own there. The hooks of `output_hidden_states=True` hold one in an
    object that is global to them. (transformers 5)
    """
    for name, module in list(sys.modules.items()):
        for path, value in list(getattr(module, "__dict__", {}).items()):
            inner = getattr(value, "__dict__", {}) if type(value).__module__ == name else {}
            found = {path: value, **{f"{path}.{key}": part for key, part in inner.items()}}
            for path, value in found.items():
                if value is variable and name != "__main__":
                    return operator.attrgetter(path), (module,)
    return NotImplemented


def _module_reducer(module: torch.nn.Module) -> Callable[[Any], Any] | None:
    """Give what reduces modules of this one's class to the class and what differs from defaults.

    None if the class reduces itself.
    """
    kind: Any = type(module)
    reduces_by_default = (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__new__ is object.__new__
        and kind not in cloudpickle.CloudPickler.dispatch
    )
    if not reduces_by_default:
        return None
    if _refuses_to_pickle(kind):
        base = parametrize.type_before_parametrizations(module)
        return _core.ModuleReducer(base, new_parametrized, restore_parametrized).reduce
    restore = restore_module
    if kind.__setstate__ is not torch.nn.Module.__setstate__ or _has_properties(kind):
        restore = restore_by_setstate
    if any(base.__module__ == "transformers.modeling_utils" for base in kind.__mro__):
        restore = restore_pretrained
    return _core.ModuleReducer(kind, _new_object, restore).reduce


def _has_properties(kind: type) -> bool:
    """Whether the class may have to do with how attributes are set: not all are in the dict."""
    own = [vars(base) for base in kind.__mro__ if base not in (torch.nn.Module, object)]
    return any(
        hasattr(value, "__set__")
        for attributes in own
        for name, value in attributes.items()
        if name not in ("__dict__", "__weakref__")
    )


def _refuses_to_pickle(kind: type) -> bool:
    """Whether `parametrize` made this class: it has a `__getstate__` that only raises."""
    getstate = kind.__dict__.get("__getstate__")
    return getstate is not None and getstate.__module__ == parametrize.__name__


@named
def restore_by_setstate(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module through its dict: it has a `__setstate__`, or properties in the way."""
    module.__setstate__(_core.module_state(differing))


@named
def restore_pretrained(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a model of transformers, which knows of a class what its `__init__` has entered.

    In a process that has made none of that class, `output_hidden_states=True` gives none, and no
    error, however the model came there. (transformers 5)
    """
    restore_by_setstate(module, differing)
    known = getattr(sys.modules["transformers.modeling_utils"], "_CAN_RECORD_REGISTRY", None)
    if known is not None:
        dict.__setitem__(known, str(type(module)), module._can_record_outputs)


@named
def new_parametrized(kind: Any) -> Any:
    """Make what will be of a class that `parametrize` derives from this one."""
    return kind.__new__(kind)


@named
def restore_parametrized(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module and the class that `parametrize` made for it.

    That class refuses to pickle; torch makes it anew, so that `parametrize.cached` still works.
    """
    restore_by_setstate(module, differing)
    inside.inject_class(module)
    for name in module.parametrizations:
        inside.inject_property(module, name)


def make_picklable(module: torch.nn.Module) -> None:
    """Let a parametrized module that `join` made pickle, wherever it goes by itself.

    `join` has made its class for it alone; other modules are left as they are.
    """
    if _refuses_to_pickle(type(module)):
        type(module).__reduce_ex__ = _reduce_parametrized  # type: ignore[assignment]


def _reduce_parametrized(module: torch.nn.Module, protocol: Any) -> Any:
    base = parametrize.type_before_parametrizations(module)
    return _core.ModuleReducer(base, new_parametrized, restore_parametrized).reduce(module)
