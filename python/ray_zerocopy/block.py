"""The block, from Python: gathered from a split object, opened where it is read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from ray_zerocopy import _core
from ray_zerocopy.errors import IsolationWarning
from ray_zerocopy.skeleton import Split

Isolation = Literal["private", "shared", "copy"]
Prefault = Literal["auto", True, False]


def gather(parts: Split) -> _core.Gather:
    """Plan the block: its offset table, and where in the model its bytes still lie.

    `Gather.write` writes it whole. Where Ray is to do so, `Gather.segments` gives it as buffers:
    written one after the other, each at a multiple of 64 bytes, they are the block. Only storages
    below 16 KiB are copied before.
    """
    return _core.Gather(parts.sources)


def open_block(
    table: bytes, buffers: Sequence[Any], isolation: Isolation, anchored: bool = False
) -> _core.Block:
    """Map a block from the buffers that came out of the store.

    They are all of it, or with `anchored` only its header, which the rest follows in memory.

    Raises `BlockError` where the buffers are not the block of this table, and warns with
    `IsolationWarning` where private pages were asked for and shared ones are all there is.
    """
    block = _core.Block(table, buffers, isolation, anchored)
    if block.held == "shared" and isolation == "private":
        message = f"{block.fallback}: a write into these weights changes every process on the node"
        warnings.warn(message, IsolationWarning, stacklevel=2)
    return block
