"""Tensors over the spans of a block."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

from ray_zerocopy import _core

# (span, dtype, flags, offset, shape, stride), counted in elements as in torch
View: TypeAlias = tuple[int, str, int, int, tuple[int, ...], tuple[int, ...]]


def tensors(block: _core.Block, device: torch.device | str | None = None) -> list[torch.Tensor]:
    """Build the tensor of each view in the block's table.

    A view that has a span for itself, as nearly all have, becomes a tensor with a storage of its
    own. Views of one span share a storage, as they did in the source. On another device than the
    CPU each storage is copied there.

    The tensors keep the block alive. None is an inference tensor, whatever mode the caller is in.
    """
    with torch.inference_mode(False):
        if device is None or torch.device(device).type == "cpu":
            made = block.tensors()
            device = "cpu"
        else:
            made = [None] * len(block.views)
        missing = [index for index, tensor in enumerate(made) if tensor is None]
        views = block.views if missing else []
        storages: dict[int, torch.UntypedStorage] = {}
        for index in missing:
            span = views[index][0]
            if span not in storages:
                whole = torch.from_numpy(_bytes(block, span)).to(device)
                storages[span] = whole.untyped_storage()
            made[index] = _strided(storages[span], views[index])
    return made


def buffers(block: _core.Block, indices: list[int]) -> list[np.ndarray]:
    """Give the bytes of the views that are buffers rather than tensors.

    They can be written where the block is this process's own, not where it is shared.
    """
    views = block.views if indices else []
    arrays = [_bytes(block, views[index][0]) for index in indices]
    if block.held == "shared":
        for array in arrays:
            array.flags.writeable = False
    return arrays


def _bytes(block: _core.Block, span: int) -> np.ndarray:
    offset, nbytes = block.spans[span]
    return np.ndarray((nbytes,), np.uint8, memoryview(block), offset)


def _strided(storage: torch.UntypedStorage, view: View) -> torch.Tensor:
    """Build a view that shares its span, or that DLPack cannot express."""
    _, name, flags, offset, shape, stride = view
    dtype = getattr(torch, name)
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, offset, shape, stride)
    if flags & _core.CONJ:
        torch._C._set_conj(tensor, True)
    if flags & _core.NEG:
        torch._C._set_neg(tensor, True)
    requires_grad = bool(flags & _core.REQUIRES_GRAD)
    if flags & _core.PARAMETER:
        return torch.Tensor._make_subclass(torch.nn.Parameter, tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
