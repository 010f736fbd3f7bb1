"""Split an object graph into its skeleton and its tensors, and join them again.

The skeleton is a pickle in which every tensor is a number. `split` writes it and notes, for each
number, a view (dtype, shape, stride, offset) over a storage; `join` reads it with the tensors at
hand. A pickler reaches every tensor wherever it hangs, and sees the same object twice as one.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray import cloudpickle
from torch.nn.utils import parametrize
from torch.utils.hooks import warn_if_has_hooks

from ray_zerocopy import _core, torchscript
from ray_zerocopy.errors import HostCopyWarning

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


class _Joiner(pickle.Unpickler):
    """A class of our own, so that its `persistent_load` can be set."""


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
    if isinstance(obj, torch.nn.Module):
        return _module_reducer(obj)
    if isinstance(obj, torch.UntypedStorage):
        return _reduce_storage
    if isinstance(obj, torch.TypedStorage):
        return _reduce_typed_storage
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
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach().as_subclass(torch.Tensor)
    made = (_subclass_tensor, (kind, plain, tensor.requires_grad))
    state = torch._utils._get_obj_state(tensor)
    return (*made, state, None, None, torch._utils._set_obj_state) if state else made


def _subclass_tensor(kind: type, plain: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    return torch.Tensor._make_subclass(kind, plain, requires_grad)


def _reduce_storage(storage: torch.UntypedStorage) -> Any:
    everything = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch.Tensor.untyped_storage, (everything,)


def _reduce_typed_storage(storage: torch.TypedStorage) -> Any:
    return _typed_storage, (storage._untyped_storage, storage.dtype)


def _typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


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
        return _core.ModuleReducer(base, _new_parametrized, _restore_parametrized).reduce
    restore = _core.restore_module
    if kind.__setstate__ is not torch.nn.Module.__setstate__ or _has_properties(kind):
        restore = _restore_through_setstate
    return _core.ModuleReducer(kind, _new_object, restore).reduce


def _has_properties(kind: type) -> bool:
    """Whether the class may have to do with how attributes are set: not all are in the dict."""
    own = kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
    return any(hasattr(value, "__set__") for base in own for value in vars(base).values())


def _refuses_to_pickle(kind: type) -> bool:
    """Whether `parametrize` made this class: it has a `__getstate__` that only raises."""
    getstate = kind.__dict__.get("__getstate__")
    return getstate is not None and getstate.__module__ == parametrize.__name__


def _restore_through_setstate(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module through its dict: it has a `__setstate__`, or properties in the way."""
    module.__setstate__(_core.module_state(differing))


def _new_parametrized(kind: Any) -> Any:
    """Make what will be of a class that `parametrize` derives from this one."""
    return kind.__new__(kind)


def _restore_parametrized(module: torch.nn.Module, differing: dict[str, Any]) -> None:
    """Restore a module and the class that `parametrize` made for it.

    That class refuses to pickle; torch makes it anew, so that `parametrize.cached` still works.
    """
    _restore_through_setstate(module, differing)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)


def make_picklable(module: torch.nn.Module) -> None:
    """Let a parametrized module that `join` made pickle, wherever it goes by itself.

    `join` has made its class for it alone; other modules are left as they are.
    """
    if _refuses_to_pickle(type(module)):
        type(module).__reduce_ex__ = _reduce_parametrized  # type: ignore[assignment]


def _reduce_parametrized(module: torch.nn.Module, protocol: Any) -> Any:
    base = parametrize.type_before_parametrizations(module)
    return _core.ModuleReducer(base, _new_parametrized, _restore_parametrized).reduce(module)
