"""Reduce tensors for a pickler that takes their bytes out, and rebuild them over a block."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.utils.hooks import warn_if_has_hooks

from ray_zerocopy import _core
from ray_zerocopy.errors import VersionError
from ray_zerocopy.objects import torch_inside as inside
from ray_zerocopy.pickled import named

# (span, dtype, flags, offset, shape, stride), counted in elements as in torch
View: TypeAlias = tuple[int, str, int, int, tuple[int, ...], tuple[int, ...]]

# How this process makes views. Every torch has `from_numpy`; DLPack's exchange API, from torch 2.10
# on, is faster and gives the same tensors.
way: Literal["dlpack", "from_numpy"] = "dlpack" if _core.borrows() else "from_numpy"


def nbytes_of(tensor: torch.Tensor) -> int:
    """Count the bytes of all elements, including those that a sparse tensor does not store."""
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


# --- reduced --------------------------------------------------------------------------------------


def reduce_tensor(tensor: torch.Tensor) -> Any:
    """Reduce a tensor that is not plain: it has attributes, its own class, or components."""
    kind = type(tensor)
    if (kind.__module__, kind.__name__) == _IN_A_FILE:
        kind, tensor = torch.Tensor, tensor.as_subclass(torch.Tensor)
        return tensor_subclass, (kind, tensor.detach(), tensor.requires_grad)
    own = kind.__reduce_ex__ not in (
        torch.Tensor.__reduce_ex__,
        torch.nn.Parameter.__reduce_ex__,
    )
    dispatches = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own or dispatches or not _core.has_plain_storage(tensor):
        if kind is torch.Tensor and tensor.requires_grad:  # torch drops it for sparse and nested
            return tensor_subclass, (kind, tensor.detach(), True)
        return tensor.__reduce_ex__(5)
    warn_if_has_hooks(tensor)
    with inside.ignoring_torch_function():
        plain = tensor.detach().as_subclass(torch.Tensor)
    made = (tensor_subclass, (kind, plain, tensor.requires_grad))
    state = inside.get_state(tensor)
    if kind.__setstate__ is not torch.Tensor.__setstate__:
        return (*made, (state,), None, None, set_subclass_state)
    return (*made, state, None, None, inside.set_state) if state else made


# It pickles as the name of its file. We load it as memory, like numpy's maps. (tensordict 0.15)
_IN_A_FILE = ("tensordict.memmap", "MemoryMappedTensor")


@named
def tensor_subclass(kind: type, plain: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """Unpickle a tensor of a subclass."""
    return inside.make_subclass(kind, plain, requires_grad)


@named
def set_subclass_state(tensor: Any, state: tuple[Any]) -> None:
    """Set the state of a tensor whose class has its own `__setstate__`."""
    tensor.__setstate__(*state)


def reduce_storage(storage: torch.UntypedStorage) -> Any:
    """Reduce a storage to a tensor over all of it."""
    everything = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch.Tensor.untyped_storage, (everything,)


def reduce_typed_storage(storage: torch.TypedStorage) -> Any:
    """Reduce a typed storage to its untyped storage."""
    return inside.typed_storage, (inside.untyped(storage), storage.dtype)


# --- over a block ---------------------------------------------------------------------------------


def over(
    block: _core.Block, buffers: list[int], device: torch.device | str | None = None
) -> list[torch.Tensor | None]:
    """Build the tensor of each view in the block's table; None for views that are `buffers`.

    A view with its own span, as nearly all have, becomes a tensor with its own storage. Views of
    one span share a storage, as in the source. Each storage is copied to `device` unless that is
    the CPU.

    The tensors keep the block alive. No tensor is an inference tensor, whatever mode the caller is
    in.
    """
    with torch.inference_mode(False):
        if device is None or torch.device(device).type == "cpu":
            made = block.tensors(buffers) if way == "dlpack" else _from_numpy(block, buffers)
            device = "cpu"
        else:
            made = [None] * len(block.views)
        known = set(buffers)
        missing = [i for i, tensor in enumerate(made) if tensor is None and i not in known]
        if not missing:
            return made
        memory, spans, views = memoryview(block), block.spans, block.views
        storages: dict[int, torch.UntypedStorage] = {}
        for index in missing:
            span = views[index][0]
            if span not in storages:
                offset, nbytes = spans[span]
                whole = torch.from_numpy(np.ndarray((nbytes,), np.uint8, memory, offset))
                storages[span] = whole.to(device).untyped_storage()
            made[index] = _strided(storages[span], views[index])
    return made


def buffers_over(block: _core.Block, buffers: list[int]) -> list[memoryview]:
    """Return the bytes of the views that are buffers; they are read-only if the block is shared."""
    memory = memoryview(block)
    if block.held == "shared":
        memory = memory.toreadonly()
    return [memory[start:end] for start, end in block.ranges(buffers)]


def over_blocks(
    blocks: Sequence[tuple[_core.Block, Sequence[int]]],
    buffers: list[int],
    device: torch.device | str | None = None,
) -> tuple[list[torch.Tensor | None], list[memoryview]]:
    """Return `over` and `buffers_over` for several blocks, each with the numbers of its views."""
    if len(blocks) == 1:
        block, _ = blocks[0]
        return over(block, buffers, device), buffers_over(block, buffers)
    made: list[torch.Tensor | None] = [None] * sum(len(numbers) for _, numbers in blocks)
    known, bytes_of = set(buffers), {}
    for block, numbers in blocks:
        own = [index for index, number in enumerate(numbers) if number in known]
        for number, tensor in zip(numbers, over(block, own, device), strict=True):
            made[number] = tensor
        for index, memory in zip(own, buffers_over(block, own), strict=True):
            bytes_of[numbers[index]] = memory
    return made, [bytes_of[number] for number in buffers]


def _from_numpy(block: _core.Block, buffers: list[int]) -> list[torch.Tensor | None]:
    """Like `Block.tensors`, in any torch: None for views that share a span, or are lazy."""
    memory, spans, views = memoryview(block), block.spans, block.views
    known = set(buffers)
    views_on = Counter(view[0] for index, view in enumerate(views) if index not in known)
    made: list[torch.Tensor | None] = []
    for index, (span, name, flags, offset, shape, stride) in enumerate(views):
        if index in known:
            made.append(None)
            continue
        if views_on[span] > 1 or flags & (_core.CONJ | _core.NEG) or 0 in shape:
            made.append(None)
            continue
        dtype, via, itemsize = _dtypes(name)
        start, strides = spans[span][0] + offset * itemsize, [step * itemsize for step in stride]
        try:
            array = np.ndarray(shape, via, memory, start, strides)
        except ValueError:  # more dimensions or repeated elements than numpy allows
            made.append(None)
            continue
        tensor = torch.from_numpy(array)
        if tensor.dtype is not dtype:
            tensor = tensor.view(dtype)
        if flags & _core.PARAMETER:
            # like torch's own lazy modules; `Parameter(tensor)` would make a second tensor
            tensor.__class__ = torch.nn.Parameter
        if flags & _core.REQUIRES_GRAD:
            tensor.requires_grad = True
        made.append(tensor)
    return made


@functools.cache
def _dtypes(name: str) -> tuple[torch.dtype, np.dtype, int]:
    """Return torch's dtype of this name, numpy's (or an integer of that size), and the size."""
    dtype = _dtype(name)
    try:
        via = np.dtype(name)
        known = via.isbuiltin == 1  # False if a package registered it, as ml_dtypes does bfloat16
    except TypeError:
        known = False
    return dtype, via if known else np.dtype(f"i{dtype.itemsize}"), dtype.itemsize


def _dtype(name: str) -> torch.dtype:
    try:
        return getattr(torch, name)
    except AttributeError:
        message = f"this model uses torch.{name}, which torch {torch.__version__} lacks"
        raise VersionError(f"{message}: upgrade torch in this process") from None


def _strided(storage: torch.UntypedStorage, view: View) -> torch.Tensor:
    """Build a view that shares its span, or that DLPack cannot express."""
    _, name, flags, offset, shape, stride = view
    tensor = torch.empty(0, dtype=_dtype(name), device=storage.device)
    tensor.set_(storage, offset, shape, stride)
    if flags & _core.CONJ:
        inside.set_conj(tensor, True)
    if flags & _core.NEG:
        inside.set_neg(tensor, True)
    requires_grad = bool(flags & _core.REQUIRES_GRAD)
    if flags & _core.PARAMETER:
        return inside.make_subclass(torch.nn.Parameter, tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
