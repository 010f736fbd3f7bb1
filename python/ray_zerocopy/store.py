"""Put an object into Ray's store once, and get it in any process over the same bytes.

model ─ split ─▶ skeleton + storages ─ gather ─▶ block ═ room.put ═▶ object store
model ◀─ join ── skeleton + tensors ◀── open ─── block ◀═ ray.get ═══════╝
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import ray
import torch

from ray_zerocopy import _core, room, views
from ray_zerocopy.block import Isolation, gather, open_block
from ray_zerocopy.errors import (
    ClientError,
    NotABlockError,
    PublishError,
    RayZeroCopyError,
    StoreFullError,
)
from ray_zerocopy.skeleton import join, split


def put(obj: object) -> ray.ObjectRef:
    """Store an object once, its tensors as one block, and give an ordinary `ray.ObjectRef`.

    `obj` is a module, a pipeline, a dict or list of models: any picklable graph with tensors
    anywhere in it. `ray.get`, `rzc.get` and tasks that take the reference as an argument find an
    object equal to it whose tensors lie over the block: mapped copy-on-write, never copied.

    Each byte is copied once, from the tensors into shared memory, and the object is not changed.
    Nobody may write its tensors meanwhile. Gradients and tensors' hooks stay behind, as with
    pickle. The block lives as long as the reference, or anything loaded from it.

    Raises:
        PublishError: a part of `obj` does not pickle; the message gives the path to it.
        StoreFullError: the store has no room; the message gives the bytes it takes.
        ClientError: this is a Ray Client, with no object store on its side.

    Example:
        >>> ref = rzc.put(model)
        >>> outputs = ray.get([predict.remote(ref, batch) for batch in batches])

    """
    _refuse_client()
    if isinstance(obj, ray.ObjectRef):
        raise TypeError("this is an ObjectRef already: put what it refers to, or pass it on")
    shared = _Anchored(obj)
    try:
        with _reading(Reading(anchor=True)):
            placed = room.put(shared, lambda: shared.block.nbytes)
        if placed is None:
            return ray.put(Shared(obj))
        ref, anchor, memory = placed
        shared.block.write(anchor, memory)
        return ref
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise StoreFullError(
            f"the object store has no room for {shared.nbytes:,} bytes of {type(obj).__name__}: "
            f"start Ray with a larger store, as in "
            f"ray.init(object_store_memory={_roomy(shared.nbytes)}), or drop references"
        ) from error


def get(
    ref: Any,
    *,
    isolation: Isolation = "private",
    prefault: bool = False,
    device: torch.device | str | None = None,
    timeout: float | None = None,
) -> Any:
    """Load what `put` stored; `ray.get` with a say in how.

    Args:
        ref: the reference, or a list of them as for `ray.get`.
        isolation: `"private"`, as with `ray.get`: reads share the store's pages, a write copies
            the one page for this process. `"shared"`: plain views; a write changes the weights of
            every process on the node. `"copy"`: private memory of the model's size.
        prefault: fill the page table, so that the first forward does not. A thread does it while
            the caller goes on, from the first tensor to the last.
        device: copy the tensors there instead of leaving them on the CPU.
        timeout: seconds to wait for the object, as for `ray.get`.

    Raises:
        BlockError: the stored block is damaged, truncated or another object's.

    """
    if isolation not in ("private", "shared", "copy"):
        raise ValueError(f"isolation is 'private', 'shared' or 'copy', not {isolation!r}")
    _refuse_client()
    with _reading(Reading(isolation, prefault, device)):
        return _ray_get(ref, timeout)


@dataclass(frozen=True)
class TensorInfo:
    """One view of a block; shape, stride and offset in elements, offset from its span's start."""

    span: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Info:
    """What a reference holds, and how this process would hold it."""

    nbytes: int
    """Bytes in the block."""
    padding: int
    """Bytes of the block that belong to no span: its header and what alignment costs."""
    skeleton_nbytes: int
    """Bytes of the object minus its tensors."""
    spans: list[tuple[int, int]]
    """Offset and bytes of each storage in the block."""
    tensors: list[TensorInfo]
    """The views over them."""
    where: str
    """`"store"` (shared memory), `"disk"` (Ray's fallback) or `"inline"` (sent along by Ray)."""
    file: str | None
    """The store's file, as the kernel names it."""
    inode: int | None
    """Its inode: the same in every process that shares the block."""
    offset: int | None
    """Where in the file the block starts, in bytes."""
    held: str
    """`"private"` or `"shared"` pages of the store, or `"copied"` into private memory."""
    fallback: str | None
    """Why the pages are not private, if they are not."""

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each dtype."""
        names = [tensor.dtype for tensor in self.tensors]
        return {name: names.count(name) for name in sorted(set(names))}

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        lines = [
            f"{len(self.tensors)} tensors ({dtypes}) over {len(self.spans)} storages",
            f"block of {self.nbytes:,} bytes, {self.padding:,} of them padding; "
            f"skeleton of {self.skeleton_nbytes:,}",
            f"in {self.where}" + (f": {self.file} at byte {self.offset:,}" if self.file else ""),
            f"held {self.held}" + (f": {self.fallback}" if self.fallback else ""),
        ]
        return "\n".join(lines)


def inspect(ref: ray.ObjectRef, *, timeout: float | None = None) -> Info:
    """Tell what a reference holds and where its bytes lie, without loading it.

    Raises `NotABlockError` for a reference that does not come from `put`.
    """
    _refuse_client()
    with _reading(Reading(inspect=True)):
        info = _ray_get(ref, timeout)
    if not isinstance(info, Info):
        kind = type(info).__name__
        raise NotABlockError(f"{ref} holds a {kind}, not what ray_zerocopy.put stores")
    return info


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
            raise PublishError(f"{_blame(self.obj)} cannot be published: {error}") from error
        self.nbytes = len(parts.skeleton) + block.nbytes
        segments = buffers if protocol >= 5 else [buffer.raw().tobytes() for buffer in buffers]
        return _load, (parts.skeleton, parts.buffers, block.table, anchored, *segments)

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        return False, [pickle.PickleBuffer(segment) for segment in block.segments()]


class _Anchored(Shared):
    """One that leaves its block to `put`: its only buffer is where the block is to start."""

    block: _core.Gather

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        self.block = block
        return True, [pickle.PickleBuffer(bytes(_core.HEADER_NBYTES))]


@dataclass(frozen=True)
class Reading:
    """How the objects that are being read in this context are wanted."""

    isolation: Isolation = "private"
    prefault: bool = False
    device: torch.device | str | None = None
    inspect: bool = False
    anchor: bool = False


_AS_RAY_GET = Reading()
_READING = ContextVar("ray_zerocopy_reading", default=_AS_RAY_GET)


@contextlib.contextmanager
def _reading(reading: Reading) -> Iterator[None]:
    token = _READING.set(reading)
    try:
        yield
    finally:
        _READING.reset(token)


def _load(skeleton: bytes, buffers: list[int], table: bytes, anchored: bool, *segments: Any) -> Any:
    """Build the object over its block; called by the unpickling of a `Shared`."""
    reading = _READING.get()
    if reading.anchor:
        return segments[0]
    block = open_block(table, segments, reading.isolation, anchored)
    if reading.inspect:
        return _info(block, len(skeleton))
    if reading.prefault:
        block.prefault()
    with _quiet_collector():
        tensors = views.tensors(block, reading.device)
        return join(skeleton, tensors, views.buffers(block, buffers))


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep the cyclic collector out of a walk over thousands of objects that all live.

    A full collection takes 200 ms in a process with torch and transformers. What is made in here
    goes straight to the oldest generation, where it would end up: a young collection of a model, at
    the next allocation, takes as long as half of its load. Young garbage of others is collected
    before, so that none of it goes along.
    """
    if not gc.isenabled():
        yield
        return
    thaws = not gc.get_freeze_count()  # what someone froze is to stay frozen
    if thaws:
        gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if thaws:
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def _info(block: Any, skeleton_nbytes: int) -> Info:
    nbytes = memoryview(block).nbytes
    file, inode, offset = block.source or (None, None, None)
    return Info(
        nbytes=nbytes,
        padding=nbytes - sum(nbytes for _, nbytes in block.spans),
        skeleton_nbytes=skeleton_nbytes,
        spans=block.spans,
        tensors=[
            TensorInfo(span, dtype, shape, stride, offset)
            for span, dtype, _, offset, shape, stride in block.views
        ],
        where=_where(file),
        file=file,
        inode=inode,
        offset=offset,
        held=block.held,
        fallback=block.fallback,
    )


def _where(file: str | None) -> str:
    if file is None:
        return "inline"
    return "store" if os.path.dirname(file) == "/dev/shm" else "disk"


def _ray_get(ref: Any, timeout: float | None) -> Any:
    """`ray.get`, with our own errors as themselves rather than wrapped in Ray's."""
    try:
        return ray.get(ref, timeout=timeout)
    except ray.exceptions.RaySystemError as error:
        cause = getattr(error, "client_exc", None)
        if isinstance(cause, RayZeroCopyError):
            raise cause from error
        raise


def _refuse_client() -> None:
    if ray.util.client.ray.is_connected():
        raise ClientError(
            "this is a Ray Client, with no object store on its side: call ray_zerocopy inside a "
            "task or actor, or connect with ray.init(address='auto') on a node of the cluster"
        )


def _roomy(nbytes: int) -> int:
    """Give a store size with room for this and as much again, in whole MiB."""
    return -(-2 * nbytes // 2**20) * 2**20


def _blame(obj: object) -> str:
    """Give the path to the innermost part of an object graph that cannot be published."""
    path, seen = type(obj).__name__, set()
    while id(obj) not in seen:
        seen.add(id(obj))
        for step, part in _parts_of(obj):
            if id(part) not in seen and not _can_be_published(part):
                path, obj = path + step, part
                break
    return f"{path} ({type(obj).__name__})"


def _can_be_published(obj: object) -> bool:
    try:
        gather(split(obj))
    except Exception:
        return False
    return True


def _parts_of(obj: object) -> Iterator[tuple[str, object]]:
    """Name the parts of an object as one would write them after it."""
    if isinstance(obj, dict):
        yield from ((f"[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, list | tuple | set | frozenset):
        yield from ((f"[{index}]", value) for index, value in enumerate(obj))
    else:
        attributes = dict(getattr(obj, "__dict__", {}))
        if isinstance(obj, torch.nn.Module):
            for registry in ("_parameters", "_buffers", "_modules"):
                attributes |= attributes.pop(registry, {})
        yield from ((f".{name}", value) for name, value in attributes.items())
