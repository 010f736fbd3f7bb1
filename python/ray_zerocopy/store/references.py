"""Put an object into Ray's store once, and get it in any process over the same bytes.

model ─ split ─▶ skeleton + storages ─ gather ─▶ block ═ ray_inside.put ═▶ object store
model ◀─ join ── skeleton + tensors ◀── open ─── block ◀═ ray.get ═══════╝
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

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
    as_written,
    in_place,
    reading,
    within,
)
from ray_zerocopy.store.loader import following

if TYPE_CHECKING:
    from ray_zerocopy.registry.records import Version

    Base: TypeAlias = ray.ObjectRef | str | Version


def put(obj: object, *, base: Base | Sequence[Base] | None = None) -> ray.ObjectRef:
    """Store an object once, its tensors as one block, and return an ordinary `ray.ObjectRef`.

    `obj` is any picklable object with tensors anywhere in it: a module, a pipeline, a dict or list
    of models. `ray.get`, `rzc.get` and tasks that take the reference as an argument load an equal
    object. Its tensors are views of the block, mapped copy-on-write, never copied.

    `put` copies each byte once, from the tensors into shared memory, and does not change the
    object. Do not write to its tensors meanwhile. As with pickle, gradients and tensor hooks are
    not stored. The block lives as long as the reference, or anything loaded from it.

    Args:
        obj: the object to store.
        base: what is stored already, such as the backbone of a model with another head: a reference
            from `put`, the name of a published model or a `Version`, or a list of them. `put` does
            not store tensors whose bytes are in a base. It compares bytes, so a base may come from
            another process or checkpoint. The new object keeps its bases in the store.

    Raises:
        BaseLostError: a base is gone.
        NotABlockError: a base does not come from `put`.
        UnknownVersionError: no live version has the name or number of a base.
        PublishError: a part of `obj` does not pickle; the message gives the path to it.
        StoreFullError: the store has no room; the message gives the bytes it takes.
        ClientError: this process is a Ray Client, which has no local object store.

    Example:
        >>> ref = rzc.put(model)
        >>> outputs = ray.get([predict.remote(ref, batch) for batch in batches])

    """
    refuse_client()
    return _publish(Anchored(obj, bases_of(base)))


def bases_of(base: Base | Sequence[Base] | None) -> list[ray.ObjectRef]:
    """Return the references of bases, without versions that are being rebuilt.

    Raises `TypeError` for anything else than a base, and what `published` raises.
    """
    found = (each if isinstance(each, ray.ObjectRef) else published(each) for each in listed(base))
    return [ref for ref in found if ref is not None]


def listed(base: Any) -> list[Any]:
    """Return one base, several, or None as a list."""
    return [] if base is None else list(base) if isinstance(base, list | tuple) else [base]


def published(base: Any) -> ray.ObjectRef | None:
    """Return the block of a name or `Version`; the package replaces this with the registry's."""
    raise NotImplementedError(base)


def bases_in(ref: ray.ObjectRef) -> list[ray.ObjectRef]:
    """Return the bases of a stored object; none if it does not come from `put`."""
    try:
        return [base for base, *_ in parts_of(ref, reader=lambda parts: parts).bases]
    except (NotABlockError, ray.exceptions.RayTaskError):
        return []


def build(
    make: Callable[..., object], *args: Any, base: Base | Sequence[Base] = (), **kwargs: Any
) -> ray.ObjectRef:
    """Store the result of `make(*args, **kwargs)` as `put` would, without a second copy in memory.

    `make` is a loader such as `AutoModel.from_pretrained`, or a function that calls loaders.
    `build` frees the tensors and arrays of the result as it writes them to the block, large tensors
    page by page. Results of casts and merges go to shared memory from the start, also in threads
    that the loader starts. Memory-mapped tensors are read from their files.

    If the loader keeps its model, in a cache or a global, that copy stays valid and keeps its
    memory. If `make` raises, nothing is left. Linux only.

    Args:
        make: the loader.
        args: its arguments.
        base: as for `put`. It is not passed to `make`.
        kwargs: its keyword arguments.

    Raises:
        Exception: any error of `make`.
        TypeError: `base` is given, and `make` has a parameter of that name.
        PublishError, StoreFullError, ClientError, and the errors about bases: as from `put`.

    Example:
        >>> ref = rzc.build(AutoModelForCausalLM.from_pretrained, path, dtype=torch.bfloat16)

    """
    refuse_client()
    if base != () and "base" in _parameters(make):
        raise TypeError(
            f"base belongs to build, and {make!r} takes a base, too: wrap the call, as in "
            "build(lambda: make(..., base=...), base=...)"
        )
    bases = bases_of(base)
    arena = _core.Arena()
    with following(arena):
        shared = Anchored(make(*args, **kwargs), bases)
    return _publish(shared, arena)


def _parameters(make: Callable[..., object]) -> Collection[str]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # of some functions in C
        return ()


def _publish(shared: Anchored, arena: _core.Arena | None = None) -> ray.ObjectRef:
    """Store an object; with an arena, drop it first, so that writing can free its pages."""
    if isinstance(shared.obj, ray.ObjectRef):
        raise TypeError("this is an ObjectRef already: pass it on, or put the object itself")
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
    """Write the block of an object into room that another process made, and return its parts.

    Returns None if the room is not `nbytes` in all, or may not be written.
    """
    placed = ray_inside.room_in(ref, nbytes, reading(anchor))
    if placed is None:
        return None
    warn_if_on_disk(placed.start, shared.nbytes, type(shared.obj).__name__)
    shared.block.write(placed.start, placed.memory)
    if ray_inside.is_spilled(ref):  # the disk lacks our write
        return None
    return parts_of(ref, reader=as_written)


def get(
    ref: Any,
    *,
    isolation: Isolation = "private",
    prefault: bool = True,
    device: torch.device | str | None = None,
    timeout: float | None = None,
) -> Any:
    """Load a stored object, like `ray.get`, and choose how.

    Args:
        ref: the reference, or a list of them as for `ray.get`.
        isolation: `"private"`, as with `ray.get`: copy-on-write pages of the store. `"shared"`:
            plain views; a write changes the weights of every process on the node. `"copy"`:
            private memory of the model's size.
        prefault: fill the page table in the background, from the first tensor to the last, so that
            the first forward has no page faults. A second later, one process of the node merges
            small pages into huge ones. False does neither.
        device: copy the tensors to this device; default: keep them on the CPU.
        timeout: seconds to wait for the object, as for `ray.get`.

    Raises:
        BlockError: the stored block is damaged, truncated or another object's.
        DeviceError: this process cannot use that device.

    """
    if isolation not in ("private", "shared", "copy"):
        raise ValueError(f"isolation must be 'private', 'shared' or 'copy', not {isolation!r}")
    refuse_client()
    check_device(device)
    with reading(Loading(isolation, prefault, device)):
        return _ray_get(ref, timeout)


def parts_of(
    ref: ray.ObjectRef, timeout: float | None = None, *, reader: Callable[[Parts], Parts] = in_place
) -> Parts:
    """Return the parts of a stored object, with its block in place in the store.

    A variant is copied into one block; with `as_written` as the reader, its own block is returned.
    Raises `NotABlockError` if the reference does not come from `put`.
    """
    refuse_client()
    with reading(reader):
        return _of_ours(ref, _ray_get(ref, timeout), Parts)


def describe(ref: ray.ObjectRef, *, verify: bool = False, timeout: float | None = None) -> Info:
    """Describe a stored object; raises as `inspect` does."""
    refuse_client()
    with reading(Inspecting(verify)):
        found = _ray_get(ref, timeout)
    return _of_ours(ref, _told(found), Info)


def _told(found: Any) -> Any:
    """Find the `Info` inside the containers that Ray writes around objects of `enable`."""
    if not isinstance(found, list | dict):
        return found
    parts = found.values() if isinstance(found, dict) else found
    return next((told for told in map(_told, parts) if isinstance(told, Info)), found)


T = TypeVar("T")


def _of_ours(ref: Any, found: Any, kind: type[T]) -> T:
    """Return a reader's result; raise `NotABlockError` if no reader ran: `put` did not store it."""
    if not isinstance(found, kind):
        held = type(found).__name__
        raise NotABlockError(f"{ref} holds a {held}, not what ray_zerocopy.put stores")
    return found


@contextlib.contextmanager
def telling_if_full(nbytes: Callable[[], int], what: str) -> Iterator[None]:
    """Turn Ray's errors about a full store into `StoreFullError`, with the bytes and a fix."""
    try:
        yield
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise StoreFullError(
            f"the object store has no room for {nbytes():,} bytes of {what}: start Ray with a "
            f"larger store, such as ray.init(object_store_memory={_roomy(nbytes())}), or drop "
            "references"
        ) from error


def warn_if_on_disk(start: Any, nbytes: int, what: str) -> None:
    """Warn with `OnDiskWarning` if Ray had no room in shared memory for a block."""
    try:
        source = _core.source_of(np.frombuffer(start, np.uint8).ctypes.data)
    except ResourceError:  # no /proc, so no way to know
        return
    if source is not None and not ray_inside.is_store(source[0]):
        warnings.warn(
            f"the object store has no room for {nbytes:,} bytes of {what}: Ray keeps them on disk, "
            f"in {source[0]}, and loads read that file; start Ray with a larger store, such as "
            f"ray.init(object_store_memory={_roomy(nbytes)}), or drop references",
            OnDiskWarning,
            stacklevel=4,
        )


def check_device(device: torch.device | str | None) -> None:
    """Raise `DeviceError` if this process cannot use a device."""
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
    """`ray.get`, but raise errors of unpickling that users can act on unwrapped from Ray's."""
    try:
        with within(timeout):
            return ray.get(ref, timeout=timeout)
    except ray.exceptions.RaySystemError as error:
        cause = ray_inside.cause_of(error)
        if isinstance(cause, _TOLD):
            raise cause from error
        raise


_TOLD = (RayZeroCopyError, ModuleNotFoundError, ray.exceptions.GetTimeoutError)


def refuse_client() -> None:
    """Raise `ClientError` in a Ray Client."""
    if ray_inside.is_client():
        raise ClientError(
            "this is a Ray Client, which has no local object store: call ray_zerocopy inside a "
            "task or actor, or connect with ray.init(address='auto') on a node of the cluster"
        )


def _roomy(nbytes: int) -> int:
    """Return a store size of twice this, in whole MiB."""
    return -(-2 * nbytes // 2**20) * 2**20
