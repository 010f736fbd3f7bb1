"""Put an object into Ray's store once, and get it in any process over the same bytes.

model ─ split ─▶ skeleton + storages ─ gather ─▶ block ═ ray_inside.put ═▶ object store
model ◀─ join ── skeleton + tensors ◀── open ─── block ◀═ ray.get ═══════╝
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
import torch

from ray_zerocopy import _core, metrics
from ray_zerocopy.errors import (
    ClientError,
    DeviceError,
    NotABlockError,
    OnDiskWarning,
    RayZeroCopyError,
    ResourceError,
    StoreFullError,
)
from ray_zerocopy.store import cycles, ray_inside
from ray_zerocopy.store.description import Info
from ray_zerocopy.store.envelope import (
    Anchored,
    Inspecting,
    Isolation,
    Loading,
    Parts,
    Shared,
    anchor,
    in_place,
    reading,
)
from ray_zerocopy.store.loader import following


def put(
    obj: object, *, base: ray.ObjectRef | Sequence[ray.ObjectRef] | None = None
) -> ray.ObjectRef:
    """Store an object once, its tensors as one block, and give an ordinary `ray.ObjectRef`.

    `obj` is a module, a pipeline, a dict or list of models: any picklable graph with tensors
    anywhere in it. `ray.get`, `rzc.get` and tasks that take the reference as an argument find an
    object equal to it whose tensors lie over the block: mapped copy-on-write, never copied.

    Each byte is copied once, from the tensors into shared memory, and the object is not changed.
    Nobody may write its tensors meanwhile. Gradients and tensors' hooks stay behind, as with
    pickle. The block lives as long as the reference, or anything loaded from it.

    Args:
        obj: what to store.
        base: objects that `put` has stored, such as the backbone of a model with another head. What
            has the same bytes there is not stored again; it is found by its bytes, and may come
            from another process or checkpoint. The new object keeps its bases in the store.

    Raises:
        BaseLostError: a base is gone.
        NotABlockError: a base does not come from `put`.
        PublishError: a part of `obj` does not pickle; the message gives the path to it.
        StoreFullError: the store has no room; the message gives the bytes it takes.
        ClientError: this is a Ray Client, with no object store on its side.

    Example:
        >>> ref = rzc.put(model)
        >>> outputs = ray.get([predict.remote(ref, batch) for batch in batches])

    """
    refuse_client()
    return _publish(Anchored(obj, bases_of(base)))


def bases_of(base: ray.ObjectRef | Sequence[ray.ObjectRef] | None) -> list[ray.ObjectRef]:
    """Give the bases of a variant as a list; raises `TypeError` for what is no reference."""
    refs = [] if base is None else [base] if isinstance(base, ray.ObjectRef) else list(base)
    for ref in refs:
        if not isinstance(ref, ray.ObjectRef):
            raise TypeError(f"base is an ObjectRef that put gave, or a list of such, not {ref!r}")
    return refs


def build(make: Callable[..., object], *args: Any, **kwargs: Any) -> ray.ObjectRef:
    """Store what `make(*args, **kwargs)` gives, as `put` would, without holding it twice.

    `make` is a loader, as `AutoModel.from_pretrained`, or a function that calls some. Whatever
    tensors and arrays it gives are freed as they are written to the block, large tensors by the
    page. Results of casts and merges of weights go to shared memory from the start, also those of
    threads that the loader starts. Tensors that lie in files' mappings are read from the files.

    What the loader keeps of its model, in a cache or a global, stays whole, and keeps its memory.
    If `make` raises, nothing is left. Linux only.

    Raises:
        Whatever `make` raises, and what `put` does.

    Example:
        >>> ref = rzc.build(AutoModelForCausalLM.from_pretrained, path, dtype=torch.bfloat16)

    """
    refuse_client()
    arena = _core.Arena()
    with following(arena):
        shared = Anchored(make(*args, **kwargs))
    return _publish(shared, arena)


def _publish(shared: Anchored, arena: _core.Arena | None = None) -> ray.ObjectRef:
    """Store an object; with an arena it is let go first, so that what lies there can be, too."""
    if isinstance(shared.obj, ray.ObjectRef):
        raise TypeError("this is an ObjectRef already: put what it refers to, or pass it on")
    kind = type(shared.obj).__name__
    with telling_if_full(lambda: shared.nbytes, kind):
        placed = ray_inside.put(shared, lambda: shared.block.nbytes, reading(anchor))
        if placed is None:
            metrics.record("rzc_fallbacks", 1, "ray.put")
            metrics.record("rzc_published_bytes", shared.nbytes)
            return ray.put(Shared(shared.obj, shared.bases))
    if arena is not None:
        dropped, shared.obj = cycles.traces(shared.obj), None
        cycles.collect(dropped)
    warn_if_on_disk(placed.start, shared.nbytes, kind)
    shared.block.write(placed.start, placed.memory, arena)
    metrics.record("rzc_published_bytes", shared.nbytes)
    return placed.ref


def write(shared: Anchored, ref: ray.ObjectRef, nbytes: int) -> Parts | None:
    """Write the block of an object where another process has made room for it, and give its parts.

    The room is of so many bytes in all. None where it is not, or may not be written.
    """
    placed = ray_inside.room_in(ref, nbytes, reading(anchor))
    if placed is None:
        return None
    warn_if_on_disk(placed.start, shared.nbytes, type(shared.obj).__name__)
    shared.block.write(placed.start, placed.memory)
    return None if ray_inside.is_spilled(ref) else parts_of(ref)  # what is on disk was not written


def get(
    ref: Any,
    *,
    isolation: Isolation = "private",
    prefault: bool = True,
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
            the caller goes on, from the first tensor to the last. Small pages are merged into huge
            ones a second later, by one process of the node. False leaves all as it is.
        device: copy the tensors there instead of leaving them on the CPU.
        timeout: seconds to wait for the object, as for `ray.get`.

    Raises:
        BlockError: the stored block is damaged, truncated or another object's.
        DeviceError: this process cannot use that device.

    """
    if isolation not in ("private", "shared", "copy"):
        raise ValueError(f"isolation is 'private', 'shared' or 'copy', not {isolation!r}")
    refuse_client()
    check_device(device)
    with reading(Loading(isolation, prefault, device)):
        return _ray_get(ref, timeout)


def parts_of(ref: ray.ObjectRef, timeout: float | None = None) -> Parts:
    """Give what a reference holds in parts, its block where it lies in the store.

    Raises `NotABlockError` for a reference that does not come from `put`.
    """
    refuse_client()
    with reading(in_place):
        return _of_ours(ref, _ray_get(ref, timeout), Parts)


def describe(ref: ray.ObjectRef, *, verify: bool = False, timeout: float | None = None) -> Info:
    """Tell what a reference holds; raises as `inspect` does."""
    refuse_client()
    with reading(Inspecting(verify)):
        found = _ray_get(ref, timeout)
    return _of_ours(ref, _told(found), Info)


def _told(found: Any) -> Any:
    """Give what was told, out of what Ray writes around the objects of `enable`."""
    if not isinstance(found, list | dict):
        return found
    parts = found.values() if isinstance(found, dict) else found
    return next((told for told in map(_told, parts) if isinstance(told, Info)), found)


T = TypeVar("T")


def _of_ours(ref: Any, found: Any, kind: type[T]) -> T:
    """Refuse what the reader was not asked for, as `put` has not stored it."""
    if not isinstance(found, kind):
        held = type(found).__name__
        raise NotABlockError(f"{ref} holds a {held}, not what ray_zerocopy.put stores")
    return found


@contextlib.contextmanager
def telling_if_full(nbytes: Callable[[], int], what: str) -> Iterator[None]:
    """Say how many bytes there is no room for, and how to make it."""
    try:
        yield
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise StoreFullError(
            f"the object store has no room for {nbytes():,} bytes of {what}: start Ray with a "
            f"larger store, as in ray.init(object_store_memory={_roomy(nbytes())}), or drop "
            "references"
        ) from error


def warn_if_on_disk(start: Any, nbytes: int, what: str) -> None:
    """Warn with `OnDiskWarning` where Ray had no room in shared memory for a block."""
    try:
        source = _core.source_of(np.frombuffer(start, np.uint8).ctypes.data)
    except ResourceError:  # no /proc: nobody tells
        return
    if source is not None and not ray_inside.is_store(source[0]):
        warnings.warn(
            f"the object store has no room for {nbytes:,} bytes of {what}: they lie on disk, in "
            f"{source[0]}, and are read from there; start Ray with a larger store, as in "
            f"ray.init(object_store_memory={_roomy(nbytes)}), or drop references",
            OnDiskWarning,
            stacklevel=4,
        )


def check_device(device: torch.device | str | None) -> None:
    """Raise `DeviceError` where this process cannot have tensors on a device."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise DeviceError(
            f"this process cannot use device={str(device)!r} ({str(error).splitlines()[0]}): give "
            f"its task or actor a GPU (num_gpus=1), or load without device="
        ) from error


def _ray_get(ref: Any, timeout: float | None) -> Any:
    """`ray.get`, with our errors and what is not installed as themselves, not wrapped in Ray's."""
    try:
        return ray.get(ref, timeout=timeout)
    except ray.exceptions.RaySystemError as error:
        cause = ray_inside.cause_of(error)
        if isinstance(cause, RayZeroCopyError | ModuleNotFoundError):
            raise cause from error
        raise


def refuse_client() -> None:
    """Raise `ClientError` in a Ray Client."""
    if ray_inside.is_client():
        raise ClientError(
            "this is a Ray Client, with no object store on its side: call ray_zerocopy inside a "
            "task or actor, or connect with ray.init(address='auto') on a node of the cluster"
        )


def _roomy(nbytes: int) -> int:
    """Give a store size with room for this and as much again, in whole MiB."""
    return -(-2 * nbytes // 2**20) * 2**20
