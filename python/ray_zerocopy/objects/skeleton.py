"""Split an object graph into its skeleton and its tensors, and join them again.

The skeleton is a pickle with a number in place of each tensor. `split` writes it, and notes for
each number a view (dtype, shape, stride, offset) of a storage; `join` reads it and puts the tensors
in. A pickler reaches tensors in any attribute or container, and writes a shared object once.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import types
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import cloudpickle

from ray_zerocopy import _core
from ray_zerocopy.errors import HostCopyWarning
from ray_zerocopy.objects import (
    arrays,
    bytecode,
    fx,
    modules,
    programs,
    sets,
    tensors,
    torch_inside,
    transformers_inside,
)

# A piece of a skeleton of at least a page counts as data.
_DATA_NBYTES = 4096


@dataclass
class Split:
    """An object graph in parts: its skeleton, and its tensors in their original memory.

    `buffers` are the numbers of those sources that are not tensors but buffers, such as numpy's.
    """

    skeleton: bytes
    sources: _core.Sources
    buffers: list[int]


ToHost = Callable[[torch.UntypedStorage], torch.UntypedStorage]


def to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy a storage of another device to the host, with a `HostCopyWarning`."""
    message = f"tensors on {storage.device} are copied to the host and load on the CPU"
    warnings.warn(f"{message}; see rzc.get(device=...)", HostCopyWarning, stacklevel=2)
    return storage.cpu()


def split(obj: object, to_host: ToHost = to_host) -> Split:
    """Separate the tensors of `obj` from its skeleton, without changing `obj` or copying tensors.

    Only tensors on another device are copied, to the host, with a `HostCopyWarning`. As in any
    pickle, gradients and hooks of tensors are dropped.
    """
    file = io.BytesIO()
    splitter = _Splitter(file, to_host)
    splitter.dump(obj)
    return Split(file.getvalue(), splitter.sources, splitter.buffers)


def join(
    skeleton: bytes,
    tensors: Sequence[object],
    buffers: Sequence[object],
    device: torch.device | str | None = None,
) -> Any:
    """Rebuild the object around its tensors; the inverse of `split`.

    Tensors that torch derives from them, such as sparse ones, are on the same device (`device` or
    the CPU). No tensor is an inference tensor, whatever mode the caller is in.

    Raises `ModuleNotFoundError` if the module of a class is not installed.
    """
    unpickler = _Joiner(io.BytesIO(skeleton), buffers=buffers)
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    kept = torch_inside.rebuilt_sparse()
    before = len(kept)
    with torch.inference_mode(False), torch_inside.default_device(device or "cpu"):
        try:
            return unpickler.load()
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error}, which a class of this object needs: install it here, ship it with "
                f"runtime_env, or store the object after ray.cloudpickle.register_pickle_by_value",
                name=error.name,
            ) from error
        finally:
            del kept[before:]


def unshared_nbytes(skeleton: bytes) -> int:
    """Count the bytes of a skeleton in pieces of a page or more, which each load copies.

    These are weights that objects turn into `bytes` or text themselves, compiled code, and tensors
    in formats that torch packs.
    """
    parts = (part for _, part, _ in pickletools.genops(skeleton))
    sizes = [len(part) for part in parts if isinstance(part, bytes | bytearray | str)]
    return sum(size for size in sizes if size >= _DATA_NBYTES)


class _Joiner(pickle.Unpickler):
    """A subclass, so that `persistent_load` can be set."""


class _Splitter(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Pickles everything but the bytes of tensors.

    It is Ray's own pickler, so that ObjectRefs, actor handles and registered serializers in the
    graph behave as in `ray.put`.
    """

    def __init__(self, file: io.BytesIO, to_host: ToHost) -> None:
        self.sources = _core.Sources(to_host)
        self.persistent_id = self.sources.take
        self.buffers: list[int] = []
        # not a bound method: that is a cycle, which would keep the model until a collection
        take = functools.partial(_take_buffer, self.sources, self.buffers)
        super().__init__(file, protocol=5, buffer_callback=take)
        self._reducers: dict[type, Callable[[Any], Any] | None] = {}

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if issubclass(kind, type) or kind is types.FunctionType:
            transformers_inside.send_by_value(obj)
        if kind not in self._reducers:
            self._reducers[kind] = _reducer(obj)
        reduce = self._reducers[kind] or super().reducer_override
        return reduce(obj)


def _take_buffer(sources: _core.Sources, taken: list[int], buffer: pickle.PickleBuffer) -> bool:
    """Take a buffer out of band, or return True to leave an empty one in the skeleton."""
    if not memoryview(buffer).nbytes:
        return True
    taken.append(sources.take_buffer(buffer))
    return False


Reduce = Callable[[Any], Any]

# The first entry whose class matches an object makes the function that reduces all objects of
# exactly that object's class, or None.
_BY_CLASS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Reduce | None]], ...] = (
    (torch.Tensor, lambda _: tensors.reduce_tensor),
    (programs.PROGRAMS, lambda _: programs.reduce),
    (torch.fx.GraphModule, lambda module: fx.module_reducer(type(module))),
    (torch.nn.Module, modules.reducer),
    (torch.fx.Graph, lambda _: fx.reduce_graph),
    (torch.fx.Node, lambda _: fx.reduce_node),
    (fx.OPERATORS, lambda _: fx.reduce_operator),
    (np.ndarray, lambda array: arrays.reducer(type(array))),
    (torch.UntypedStorage, lambda _: tensors.reduce_storage),
    (torch.TypedStorage, lambda _: tensors.reduce_typed_storage),
    (ContextVar, lambda _: transformers_inside.reduce_context_var),
    (sets.KINDS, lambda members: sets.reducer(type(members))),
    (types.CodeType, lambda _: bytecode.reduce_code),
)


_PLAIN = (torch.Tensor, torch.nn.Parameter, np.ndarray)


def _reducer(obj: Any) -> Reduce | None:
    """Return the function that reduces objects of this class, or None to leave it to cloudpickle.

    Classes registered with Ray or `copyreg` are left to cloudpickle, except the plain ones.
    """
    kind = type(obj)
    registered = cloudpickle.CloudPickler.dispatch.get(kind)
    by_itself = getattr(registered, "__module__", None) or ""  # such as cloudpickle's for WeakSet
    if registered and kind not in _PLAIN and not by_itself.startswith(cloudpickle.__name__):
        return None
    for kinds, reducer in _BY_CLASS:
        if isinstance(obj, kinds):
            return reducer(obj)
    return arrays.columns_reducer(kind)
