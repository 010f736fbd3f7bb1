"""The block, from Python: gathered from a split object, opened where it is read."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from ray_zerocopy import _core
from ray_zerocopy.errors import IsolationWarning
from ray_zerocopy.skeleton import Split

Isolation = Literal["private", "shared", "copy"]


def gather(parts: Split) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Give the offset table and the block, as buffers that still lie in the model.

    Whoever writes the buffers one after the other, each at a multiple of 64 bytes, has the block:
    Ray does so, straight into shared memory. Only storages below 16 KiB are copied before.
    """
    block = _core.Gather(parts.storages, parts.views)
    return block.table, [pickle.PickleBuffer(segment) for segment in block.segments()]


def open_block(table: bytes, buffers: Sequence[Any], isolation: Isolation) -> _core.Block:
    """Map a block from the buffers that came out of the store.

    Raises `BlockError` where the buffers are not the block of this table, and warns with
    `IsolationWarning` where private pages were asked for and shared ones are all there is.
    """
    block = _core.Block(table, buffers, isolation)
    if block.held == "shared" and isolation == "private":
        message = f"{block.fallback}: a write into these weights changes every process on the node"
        warnings.warn(message, IsolationWarning, stacklevel=2)
    return block
