"""Split an object graph into its skeleton and its tensors, and join them again.

The skeleton is a pickle in which every tensor is a number. `split` writes it and notes, for each
number, a view (dtype, shape, stride, offset) over a storage; `join` reads it with the tensors at
hand. A pickler reaches every tensor wherever it hangs, and sees the same object twice as one.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ray import cloudpickle
from torch.nn.utils import parametrize
from torch.utils.hooks import warn_if_has_hooks

from ray_zerocopy import _core, torchscript
from ray_zerocopy.errors import HostCopyWarning

# Buffers of numpy arrays and the like stay in the skeleton below one page.
_BUFFER_NBYTES = 4096

# (address, nbytes, owner)
Storage = tuple[int, int, Any]
# (index of the storage, dtype, flags, offset, shape, stride), counted in elements as in torch
View = tuple[int, str, int, int, Sequence[int], Sequence[int]]


@dataclass
class Split:
    """An object graph in parts: its skeleton, and views over storages that are still the source's.

    `tensors` are what the views describe. `buffers` names those views that are no tensors but
    buffers, such as numpy's.
    """

    skeleton: bytes = b""
    storages: list[Storage] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)


def split(obj: object) -> Split:
    """Take the tensors out of `obj`, which is not changed and of which nothing is copied.

    Tensors of another device are the exception: they are copied to the host, with a
    `HostCopyWarning`. As in any pickle, gradients and hooks of tensors stay behind.
    """
    file = io.BytesIO()
    splitter = _Splitter(file)
    splitter.dump(obj)
    splitter.parts.skeleton = file.getvalue()
    return splitter.parts


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
        self.persistent_id = _core.TensorIds(self._tensor_id)
        super().__init__(file, protocol=5, buffer_callback=self._take_buffer)
        self.parts = Split()
        self._tensors: dict[int, int] = {}  # index by id; the parts keep the tensors, so ids stay
        self._storages: dict[int, int] = {}  # by the address of torch's own StorageImpl
        self._module_setters: dict[type, Any] = {}

    def _tensor_id(self, tensor: torch.Tensor) -> int | None:
        """Give the number of a plain tensor or parameter; None for one that needs reducing."""
        known = self._tensors.get(id(tensor))
        if known is not None:
            return known
        if not _has_plain_storage(tensor) or tensor.__dict__:
            return None
        flags = _core.PARAMETER if type(tensor) is torch.nn.Parameter else 0
        index = self._tensors[id(tensor)] = self._take_tensor(tensor, flags)
        return index

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            return self._reduce_tensor(obj)
        if isinstance(obj, torchscript.PROGRAMS):
            return torchscript.reduce(obj)
        if isinstance(obj, torch.nn.Module):
            return self._reduce_module(obj)
        if isinstance(obj, torch.UntypedStorage):
            everything = torch.empty(0, dtype=torch.uint8, device=obj.device).set_(obj)
            return torch.Tensor.untyped_storage, (everything,)
        if isinstance(obj, torch.TypedStorage):
            return _typed_storage, (obj._untyped_storage, obj.dtype)
        return super().reducer_override(obj)

    def _take_tensor(self, tensor: torch.Tensor, flags: int = 0) -> int:
        warn_if_has_hooks(tensor)
        if tensor.requires_grad:
            flags |= _core.REQUIRES_GRAD
        if tensor.is_conj():
            flags |= _core.CONJ
        if tensor.is_neg():
            flags |= _core.NEG
        return self._take_view(
            tensor,
            self._take_storage(tensor),
            str(tensor.dtype).removeprefix("torch."),
            flags,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )

    def _take_view(self, tensor: Any, *view: Any) -> int:
        self.parts.tensors.append(tensor)
        self.parts.views.append(view)
        return len(self.parts.views) - 1

    def _take_storage(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        index = self._storages.get(storage._cdata)
        if index is None:
            index = self._storages[storage._cdata] = len(self.parts.storages)
            host = storage
            if not tensor.is_cpu:
                host = storage.cpu()
                message = f"tensors on {storage.device} are copied to the host and load on the CPU"
                warnings.warn(f"{message}; see rzc.get(device=...)", HostCopyWarning, stacklevel=2)
            self.parts.storages.append((host.data_ptr(), host.nbytes(), (host, storage)))
        return index

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of band; true leaves it in the skeleton, as pickle has it."""
        array = np.frombuffer(buffer.raw(), dtype=np.uint8)
        if array.nbytes < _BUFFER_NBYTES:
            return True
        self.parts.storages.append((array.ctypes.data, array.nbytes, array))
        storage = len(self.parts.storages) - 1
        view = (storage, "uint8", 0, 0, array.shape, (1,))
        self.parts.buffers.append(self._take_view(array, *view))
        return False

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        """Reduce what is more than a plain tensor: attributes, a class of its own, components."""
        kind = type(tensor)
        own = kind.__reduce_ex__ not in (
            torch.Tensor.__reduce_ex__,
            torch.nn.Parameter.__reduce_ex__,
        )
        dispatches = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        if own or dispatches or not _has_plain_storage(tensor):
            return tensor.__reduce_ex__(5)
        warn_if_has_hooks(tensor)
        with torch._C.DisableTorchFunctionSubclass():
            plain = tensor.detach().as_subclass(torch.Tensor)
        made = (_subclass_tensor, (kind, plain, tensor.requires_grad))
        state = torch._utils._get_obj_state(tensor)
        return (*made, state, None, None, torch._utils._set_obj_state) if state else made

    def _reduce_module(self, module: torch.nn.Module) -> Any:
        """Reduce a module to its class and what differs from `nn.Module`'s defaults."""
        kind: Any = type(module)
        if kind not in self._module_setters:
            self._module_setters[kind] = _module_setter(kind)
        setter = self._module_setters[kind]
        if setter is None:
            return super().reducer_override(module)
        make = _new_object
        if setter is _restore_parametrized:
            kind, make = parametrize.type_before_parametrizations(module), _new_parametrized
        state = kind.__getstate__(module)
        differing = _core.differing(state) if type(state) is dict else None
        if differing is None:
            return super().reducer_override(module)
        if setter is _core.restore_module and _has_any(kind, differing):
            setter = _restore_through_setstate
        return make, (kind,), differing, None, None, setter


def _has_plain_storage(tensor: torch.Tensor) -> bool:
    """Whether a storage, a dtype and strides are all there is to it."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_nested
        and torch._C._has_storage(tensor)
    )


def _typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _subclass_tensor(kind: type, plain: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    return torch.Tensor._make_subclass(kind, plain, requires_grad)


def _module_setter(kind: Any) -> Any:
    """Give the function that restores modules of this class; None if the class reduces itself."""
    reduces_by_default = (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__new__ is object.__new__
        and kind not in cloudpickle.CloudPickler.dispatch
    )
    if not reduces_by_default:
        return None
    if _refuses_to_pickle(kind):
        return _restore_parametrized
    if kind.__setstate__ is not torch.nn.Module.__setstate__ or _has_any(kind, _DEFAULTS):
        return _restore_through_setstate
    return _core.restore_module


_DEFAULTS = tuple(vars(torch.nn.Module()))


def _has_any(kind: type, names: Iterable[str]) -> bool:
    """Whether the class has an attribute of such a name: a property, which would be set instead."""
    return any(hasattr(kind, name) for name in names)


def _refuses_to_pickle(kind: type) -> bool:
    """Whether `parametrize` made this class: it has a `__getstate__` that only raises."""
    getstate = kind.__dict__.get("__getstate__")
    return getstate is not None and getstate.__module__ == parametrize.__name__


def _restore_through_setstate(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """Restore a module through its dict: it has a `__setstate__`, or properties in the way."""
    module.__setstate__(_core.module_state(state))


def _new_parametrized(kind: Any) -> Any:
    """Make what will be of a class that `parametrize` derives from this one."""
    return kind.__new__(kind)


def _restore_parametrized(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """Restore a module and the class that `parametrize` made for it.

    That class refuses to pickle; torch makes it anew, so that `parametrize.cached` still works.
    """
    _restore_through_setstate(module, state)
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
    differing = _core.differing(base.__getstate__(module))
    return _new_parametrized, (base,), differing, None, None, _restore_parametrized
