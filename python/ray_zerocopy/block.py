"""The block, from Python: gathered from a split object, opened where it is read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from ray_zerocopy import _core
from ray_zerocopy.errors import IsolationWarning
from ray_zerocopy.skeleton import Split

Isolation = Literal["private", "shared", "copy"]


def gather(parts: Split, adjoin: bool = False) -> _core.Gather:
    """Plan the block: its offset table, and its segments, buffers that still lie in the model.

    Whoever writes the segments one after the other, each at a multiple of 64 bytes, has the block:
    Ray does so, straight into shared memory. Only storages below 16 KiB are copied before.

    With `adjoin`, storages that lie side by side in memory travel as one segment, with the
    allocator's few bytes between them: BERT-base as 3 segments instead of 175. Ray copies these at
    twice the speed, and they are cleared with `Block.clear` before anyone else has the reference.
    """
    return _core.Gather(parts.storages, parts.views, adjoin)


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
