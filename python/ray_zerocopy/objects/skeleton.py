"""Split an object graph into its skeleton and its tensors, and join them again.

The skeleton is a pickle in which every tensor is a number. `split` writes it and notes, for each
number, a view (dtype, shape, stride, offset) over a storage; `join` reads it with the tensors at
hand. A pickler reaches every tensor wherever it hangs, and sees the same object twice as one.
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

# What a skeleton has in one piece from a page on counts as data.
_DATA_NBYTES = 4096


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


def join(
    skeleton: bytes,
    tensors: Sequence[object],
    buffers: Sequence[object],
    device: torch.device | str | None = None,
) -> Any:
    """Build the object again around its tensors; the inverse of `split`.

    What torch makes of them, as sparse tensors, lies where they do, on `device` or on the CPU, and
    is no inference tensor either, whatever mode the caller is in.

    Raises `ModuleNotFoundError` where the module of a class is not installed.
    """
    unpickler = _Joiner(io.BytesIO(skeleton), buffers=buffers)
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    with torch.inference_mode(False), torch_inside.default_device(device or "cpu"):
        try:
            return unpickler.load()
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error}, which a class of this object needs: install it here, ship it with "
                f"runtime_env, or store the object after ray.cloudpickle.register_pickle_by_value",
                name=error.name,
            ) from error


def unshared_nbytes(skeleton: bytes) -> int:
    """Count the bytes of a page and more that lie in a skeleton, where each load copies them.

    They belong to objects that turn their weights into `bytes` or text themselves, to compiled
    code, and to tensors in formats that torch packs.
    """
    parts = (part for _, part, _ in pickletools.genops(skeleton))
    sizes = [len(part) for part in parts if isinstance(part, bytes | bytearray | str)]
    return sum(size for size in sizes if size >= _DATA_NBYTES)


class _Joiner(pickle.Unpickler):
    """A class of our own, so that its `persistent_load` can be set."""


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
        if issubclass(kind, type) or kind is types.FunctionType:
            transformers_inside.send_by_value(obj)
        if kind not in self._reducers:
            self._reducers[kind] = _reducer(obj)
        reduce = self._reducers[kind] or super().reducer_override
        return reduce(obj)


def _take_buffer(sources: _core.Sources, taken: list[int], buffer: pickle.PickleBuffer) -> bool:
    """Take a buffer out of band; true leaves it in the skeleton, as it does an empty one."""
    if not memoryview(buffer).nbytes:
        return True
    taken.append(sources.take_buffer(buffer))
    return False


def _to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    message = f"tensors on {storage.device} are copied to the host and load on the CPU"
    warnings.warn(f"{message}; see rzc.get(device=...)", HostCopyWarning, stacklevel=2)
    return storage.cpu()


Reduce = Callable[[Any], Any]

# What reduces an object, by the first class that it is of: given one, `reducer` of a module tells
# what reduces all objects of its very class, or None.
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
    """Give what reduces objects of this one's class; None if that is cloudpickle's affair.

    So it is where the class was registered, with Ray or `copyreg`; the plain ones are ours.
    """
    kind = type(obj)
    registered = cloudpickle.CloudPickler.dispatch.get(kind)
    by_itself = getattr(registered, "__module__", None) or ""  # as of sets of weak references
    if registered and kind not in _PLAIN and not by_itself.startswith(cloudpickle.__name__):
        return None
    for kinds, reducer in _BY_CLASS:
        if isinstance(obj, kinds):
            return reducer(obj)
    return None
