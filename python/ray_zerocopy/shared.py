"""How an object travels through Ray: as its skeleton, its table and its block.

object ─ pickled in `Shared` ─▶ skeleton, table, block ═ Ray ═▶ `_load` ─▶ object, as `Reading` says
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import pickle
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ray_zerocopy import _core, metrics, views
from ray_zerocopy.blame import culprit
from ray_zerocopy.block import Isolation, Prefault, gather, open_block
from ray_zerocopy.errors import PublishError
from ray_zerocopy.info import describe
from ray_zerocopy.skeleton import join, split


class Shared:
    """An object that pickles as skeleton, table and block; unpickling gives the object itself.

    `put` wraps in it. A task may return one, so that Ray can make the block again from lineage.
    """

    def __init__(self, obj: object) -> None:
        self.obj = obj
        self.nbytes = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            with _quiet_collector():
                parts = split(self.obj)
                block = gather(parts)
                anchored, buffers = self._buffers(block)
        except Exception as error:
            raise PublishError(f"{culprit(self.obj)} cannot be published: {error}") from error
        self.nbytes = len(parts.skeleton) + block.nbytes
        segments = buffers if protocol >= 5 else [buffer.raw().tobytes() for buffer in buffers]
        return _load, (parts.skeleton, parts.buffers, block.table, anchored, *segments)

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        return False, [pickle.PickleBuffer(segment) for segment in block.segments()]


class Anchored(Shared):
    """One that leaves its block to `put`: its only buffer is where the block is to start."""

    block: _core.Gather

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        self.block = block
        return True, [pickle.PickleBuffer(bytes(_core.HEADER_NBYTES))]


class Parts:
    """A stored object taken apart: pickles to the same bytes, whatever process made them.

    None of its classes need to be importable, and nothing is copied: the segments, one after the
    other and each at a multiple of 64 bytes, are the block where it lies. With `anchored` the only
    one is where the block is to start, as for `Anchored`.
    """

    def __init__(
        self,
        skeleton: bytes,
        buffers: list[int],
        table: bytes,
        segments: list[Any],
        anchored: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.buffers = buffers
        self.table = table
        self.segments = [memoryview(segment).cast("B") for segment in segments]
        self.anchored = anchored
        self.nbytes = sum(segment.nbytes for segment in self.segments)

    @classmethod
    def of(cls, obj: object) -> Parts:
        """Take apart an object that is not stored yet; raises `PublishError` as `put` does."""
        _, (skeleton, buffers, table, _, *segments) = Shared(obj).__reduce_ex__(5)
        return cls(skeleton, buffers, table, [segment.raw() for segment in segments])

    def __reduce_ex__(self, protocol: Any) -> Any:
        segments = [pickle.PickleBuffer(segment) for segment in self.segments]
        return _load, (self.skeleton, self.buffers, self.table, self.anchored, *segments)

    def digest(self) -> str:
        """Give the SHA-256 of everything, in hexadecimal: equal for equal skeletons and weights."""
        hashed = hashlib.sha256()
        parts: tuple[Any, ...] = (self.skeleton, repr(self.buffers).encode(), self.table)
        for part in (*parts, *self.segments):
            hashed.update(part)
            hashed.update(bytes(-len(part) % 64))
        return hashed.hexdigest()


@dataclass(frozen=True)
class Reading:
    """How the objects that are being read in this context are wanted."""

    isolation: Isolation = "private"
    prefault: Prefault = "auto"
    device: torch.device | str | None = None
    inspect: bool = False
    parts: bool = False
    verify: bool = False
    anchor: bool = False


_AS_RAY_GET = Reading()
_READING = ContextVar("ray_zerocopy_reading", default=_AS_RAY_GET)


@contextlib.contextmanager
def reading(how: Reading) -> Iterator[None]:
    """Have what is unpickled in here read as told."""
    token = _READING.set(how)
    try:
        yield
    finally:
        _READING.reset(token)


def _load(skeleton: bytes, buffers: list[int], table: bytes, anchored: bool, *segments: Any) -> Any:
    """Build the object over its block; called by the unpickling of a `Shared`."""
    how = _READING.get()
    if how.anchor:
        return segments[0]
    if how.parts:
        whole = open_block(table, segments, "shared", anchored)
        return Parts(skeleton, buffers, table, [whole])
    start = time.perf_counter()
    block = open_block(table, segments, how.isolation, anchored)
    if how.inspect:
        return describe(block, skeleton, how.verify)
    if how.device is not None:  # the copy is to find the pages filled in
        _fill_in(block, how.prefault)
    with _quiet_collector():
        tensors = views.tensors(block, how.device)
        loaded = join(skeleton, tensors, views.buffers(block, buffers))
    _fill_in(block, how.prefault)  # the building reads none: beside it, a thread only holds it up
    metrics.loaded(block, how.isolation, time.perf_counter() - start)
    return loaded


def _fill_in(block: _core.Block, prefault: Prefault) -> None:
    """Start to fill in the page table, if that is wanted and has not started."""
    if prefault == "auto":
        block.settle()
    elif prefault:
        block.prefault()


# Python 3.12 starts with 375 objects frozen, for nobody; who freezes does it to tens of thousands.
_FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep the cyclic collector out of a walk over thousands of objects that all live.

    A full collection takes 200 ms in a process with torch and transformers. What is made in here
    goes straight to the oldest generation, where it would end up: a young collection of a model, at
    the next allocation, takes as long as half of its load. Garbage of others that is not older than
    the last young collection is collected before. To collect the middle generation, too, takes
    1.2 to 1.9 ms where all of a worker's imports have just gone through it: as long as the load.
    """
    if not gc.isenabled():
        yield
        return
    thaws = gc.get_freeze_count() < _FROZEN_BY_PYTHON  # what someone froze is to stay frozen
    if thaws:
        gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        if thaws:
            gc.freeze()
            gc.unfreeze()
        gc.enable()
