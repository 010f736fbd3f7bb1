"""To publish a model under a name, and to load it by that.

publish ─ an object, or a plan ─▶ catalog: room, made? ─▶ written ─▶ live and current
load ─ find ─▶ version ─▶ get(version.ref) ─ cannot be loaded ─▶ lost, or another trouble?
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import cloudpickle

from ray_zerocopy import metrics, requirements
from ray_zerocopy.errors import (
    BlockError,
    CatalogError,
    LostVersionError,
    PublishError,
    RayZeroCopyError,
    UnknownVersionError,
)
from ray_zerocopy.registry import client
from ray_zerocopy.registry.catalog import Wanted
from ray_zerocopy.registry.owner import LOSSES, Draft, Made, complete
from ray_zerocopy.registry.records import Plan, Version
from ray_zerocopy.store import ray_inside, references
from ray_zerocopy.store import snapshot as snapshots
from ray_zerocopy.store.envelope import Anchored, Parts
from ray_zerocopy.store.ray_inside import INLINE_NBYTES

_NAME = re.compile(r"[A-Za-z0-9._/-]{1,128}")
_MAKE_NBYTES = 2**20
_LARGE_NBYTES = 2**26  # takes seconds to write, where the machine has other things to do
_WAIT_S = 2.0  # a question that takes longer is asked again
_SLICE_S = 5.0  # of a load, after which the catalog is asked whether there is another generation
_COPY_S = 3600.0
_GENERATIONS = 3


# --- publish --------------------------------------------------------------------------------------


def publish(
    name: str,
    obj: Any = None,
    *,
    make: Callable[[], Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    snapshot: str | os.PathLike[str] | None = None,
    keep: int = 2,
    timeout: float = 3600.0,
    base: str | Version | Sequence[str | Version] = (),
) -> Version:
    """Keep a model in the cluster under a name, as its current version, whoever may die.

    Give the object itself, or `make`, a callable without arguments that gives it, or the `path` of
    a snapshot: these the cluster can make again when every copy is lost. An object that nobody can
    make again is kept as long as a copy lives, unless `snapshot` says where to save it; `heals`
    tells. The new version becomes current in one step, when it is whole. Until then, and if this
    fails or this process dies, the previous version stays current.

    Publishing what equals the current version, in weights and structure, returns that. If either
    can be made again, it is marked as healing.

    Args:
        name: letters, digits and `._/-`, 128 at most.
        obj: what `put` takes.
        make: runs in a worker outside of any job and its working_dir, so what it imports must be
            installed there; what it holds itself is pickled, up to 1 MiB.
        path: of what `save` wrote, or its URL; every node should be able to read it.
        snapshot: such a path, where the object is saved when it is published. A version that was
            published from there before heals no more: give each its own path if both should.
        keep: how many versions stay, this one included, so that going back is instant. Older ones
            are retired: their memory is free when nobody uses them.
        timeout: seconds for all of it, and for each time it is made again.
        base: names or versions of which `obj` is a variant, as for `put`: what has the same bytes
            there is not stored again. Their blocks stay, even retired, while the variant does.

    Raises:
        PublishError: a part of the object, or `make`, does not pickle or cannot be imported; or
            there is nothing to share, as in None, or only a part, as with tensors on the meta
            device.
        StoreFullError: no store has room for the block.
        SaveError: the snapshot cannot be written.
        CatalogError: the catalog does not answer in time, or `make` failed.
        VersionError: this is Ray 2.45 or older.

    Example:
        >>> rzc.publish("bert", make=lambda: AutoModel.from_pretrained(checkpoint))
        >>> model = rzc.load("bert")        # in any job

    """
    requirements.check(requirements.PUBLISHING, requirements.VERSIONS, "publishing")
    _check(name)
    if sum(given is not None for given in (obj, make, path)) != 1:
        raise TypeError("publish takes one of an object, make and path")
    if snapshot is not None and obj is None:
        raise TypeError("snapshot is for an object: make and path heal without")
    if base and (obj is None or isinstance(obj, ray.ObjectRef) or snapshot is not None):
        raise TypeError("base is for an object that is published without snapshot")
    if keep < 1:
        raise ValueError(f"keep is 1 or more, not {keep}")
    ends_s, token = time.monotonic() + timeout, uuid.uuid4().hex
    client.start(timeout)
    node = ray.get_runtime_context().get_node_id()
    wanted = Wanted(name, token, Plan("object", node, seconds=timeout), keep, None)
    if make is not None:
        plan = Plan("make", node, make=_pickled(make), seconds=timeout)
        return _publish(replace(wanted, plan=plan), ends_s)
    if path is not None:
        plan = Plan("path", node, files=(snapshots.absolute(path),), seconds=timeout)
        return _publish(replace(wanted, plan=plan), ends_s)
    if snapshot is not None:
        target = snapshots.absolute(snapshot)
        plan = Plan("object", node, files=(f"{target}.{token}", target), seconds=timeout)
        snapshots.save(obj, plan.files[0])
        return _publish(replace(wanted, plan=plan), ends_s)
    what = f"what is published as {name!r}"
    if not isinstance(obj, ray.ObjectRef):
        with contextlib.suppress(_NoRoomError):
            return _write(wanted, obj, what, ends_s, _blocks_of(base))
        wanted = replace(wanted, token=uuid.uuid4().hex)
    copied = obj if isinstance(obj, ray.ObjectRef) else references.put(obj)
    parts = references.parts_of(copied)
    complete(parts, what, None if obj is copied else obj)
    return _publish(replace(wanted, digest=parts.digest()), ends_s, [copied])


def publish_copy(name: str, ref: ray.ObjectRef) -> Version:
    """Publish what a reference refers to, with tensors or without, as what Serve deploys."""
    client.start()
    plan = Plan("object", ray.get_runtime_context().get_node_id(), seconds=_COPY_S)
    digest = references.parts_of(ref).digest()
    wanted = Wanted(name, uuid.uuid4().hex, plan, 1, digest)
    return _publish(wanted, time.monotonic() + _COPY_S, [ref])


class _NoRoomError(Exception):
    """Nobody can make room for this object, so it is to be copied."""


def _blocks_of(base: str | Version | Sequence[str | Version]) -> list[ray.ObjectRef]:
    """Give the blocks of versions; of one that is being made again there is none."""
    bases = [base] if isinstance(base, str | Version) else base
    found = (find(b) if isinstance(b, str) else find(b.name, b.number) for b in bases)
    refs = (version.ref for version in found)
    return [ref for ref in refs if ref is not None]


def _write(
    wanted: Wanted, obj: Any, what: str, ends_s: float, bases: Sequence[ray.ObjectRef]
) -> Version:
    """Publish an object by writing it once, where the owner makes room for it."""
    shared = Anchored(obj, bases)
    parts = Parts.of(shared)
    complete(parts, what, obj)
    nbytes = shared.block.nbytes
    if parts.bases:  # a smaller object comes along with its reference, where nobody can write
        nbytes = max(nbytes, INLINE_NBYTES)
    if ray_inside.way != "room" or nbytes < INLINE_NBYTES:
        raise _NoRoomError
    variant = parts.numbers, parts.bases
    draft = Draft(parts.skeleton, parts.buffers, parts.table, nbytes, *variant)
    wanted = replace(wanted, draft=draft)
    return _publish(wanted, ends_s, shared=shared)


def _publish(
    wanted: Wanted,
    ends_s: float,
    copied: Sequence[ray.ObjectRef] = (),
    shared: Anchored | None = None,
) -> Version:
    """Ask until it is published; a snapshot that was saved on the way is then where it belongs."""
    version: Version | None = None
    files = wanted.plan.files
    try:
        if shared is not None and (room := _room(wanted, ends_s)) is not None:
            wanted = _written(wanted, shared, room)
        while version is None:
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                seconds = wanted.plan.seconds
                raise CatalogError(f"{wanted.name!r} was not published in {seconds:.3g} s")
            answer = client.ask("publish", wanted, list(copied), min(left_s, _WAIT_S))
            if isinstance(answer, Made) and shared is not None:
                wanted = _written(wanted, shared, answer)
            else:
                version = answer
    except BaseException:
        _give_up(wanted)
        raise
    if len(files) > 1:
        snapshots.move(*files)
    if files:
        client.tell("placed", wanted.token)
    return version


def _room(wanted: Wanted, ends_s: float) -> Made | None:
    """Ask the owner for room; None where it does not answer: then the catalog asks it.

    The catalog hears of what is written soon when it is. What takes long it has to know before, or
    it would drop that, as of a publisher that died.
    """
    assert wanted.draft is not None
    if wanted.draft.nbytes >= _LARGE_NBYTES:
        client.tell("publish", wanted, [], 0.0)
    how = wanted.token, wanted.name, wanted.plan, wanted.draft
    try:
        room: Made = ray.get(
            client.owner().reserve.remote(*how), timeout=max(0.0, ends_s - time.monotonic())
        )
    except (ray.exceptions.RayError, ValueError, RayZeroCopyError):
        return None
    return room


def _written(wanted: Wanted, shared: Anchored, room: Made) -> Wanted:
    """Write an object where there is room for it, and say so."""
    assert room.ref is not None
    parts = references.write(shared, room.ref, room.nbytes)
    if parts is None:
        raise _NoRoomError
    digest = parts.digest()
    return replace(wanted, digest=digest, written=(room.ref,), incarnation=room.incarnation)


def _give_up(wanted: Wanted) -> None:
    """Have it not made any further; what was saved goes, unless it may be published after all."""
    if len(wanted.plan.files) < 2:
        client.tell("abandon", wanted.name, wanted.token)
        return
    with contextlib.suppress(CatalogError):
        if client.ask("abandon", wanted.name, wanted.token, seconds=_WAIT_S):
            snapshots.remove(wanted.plan.files[0])


def _pickled(make: Callable[[], Any]) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(make)
    except Exception as error:
        raise PublishError(f"make does not pickle, so no worker can call it: {error}") from error
    if len(pickled) > _MAKE_NBYTES:
        raise PublishError(
            f"make pickles to {len(pickled):,} bytes, {_MAKE_NBYTES:,} at most: it should say how "
            f"to load the model, not hold it; publish the object itself, or a path"
        )
    return pickled


# --- load -----------------------------------------------------------------------------------------


def load(name: str, *, version: int | None = None, timeout: float = 600.0, **how: Any) -> Any:
    """Load a published model, in any task, actor, driver or job of the cluster.

    Where its block is lost, this waits until the cluster has made it again.

    Args:
        name: as published.
        version: a number that is still live; by default the current one, whichever that is when
            it is loaded.
        timeout: seconds for all of it.
        how: `isolation`, `prefault` and `device`, as for `get`.

    Raises:
        UnknownVersionError: nothing live has that name and number.
        LostVersionError: the block is gone and could not be made again, in time or at all.
        ResourceError: this process is at a limit; its block stands.
        VersionError: a newer ray_zerocopy has published it.
        CatalogError: the catalog does not answer.

    """
    return _load(name, version, None, timeout, how)


def load_version(found: Version, *, timeout: float = 600.0, **how: Any) -> Any:
    """Load just this version, in whatever generation there is."""
    return _load(found.name, found.number, found, timeout, how)


def _load(
    name: str, number: int | None, found: Version | None, timeout: float, how: dict[str, Any]
) -> Any:
    ends_s = time.monotonic() + timeout
    trouble = "the catalog was not asked"
    losses = 0
    while (left_s := ends_s - time.monotonic()) > 0:
        found, version = None, found or find(name, number, min(left_s, _WAIT_S))
        if version.ref is None:
            trouble = "its block is lost, and not made again yet"
            continue
        loading = metrics.LOADING.set(name)
        try:
            return references.get(version.ref, timeout=min(left_s, _SLICE_S), **how)
        except ray.exceptions.GetTimeoutError:
            trouble = "its block has not arrived"
        except (*LOSSES, BlockError) as error:
            trouble = str(error)  # the error itself would hold this frame, and its references
            losses += 1
            if not _is_lost(version, ends_s) and isinstance(error, BlockError):
                raise  # it is whole elsewhere
            if losses == _GENERATIONS:
                break
        finally:
            metrics.LOADING.reset(loading)
    which = "the current version" if number is None else f"version {number}"
    took = f"{timeout:.3g} s" if losses < _GENERATIONS else f"{losses} attempts"
    raise LostVersionError(f"{which} of {name!r} was not loaded in {took}: {trouble}")


def _is_lost(version: Version, ends_s: float) -> bool:
    """Ask whether a version that could not be loaded here is lost, and wait for the answer."""
    node = ray.get_runtime_context().get_node_id()
    version = replace(version, ref=None)
    while (left_s := ends_s - time.monotonic()) > 0:
        answer = client.ask("broken", version, node, min(left_s, _WAIT_S))
        if answer is not None:
            return bool(answer)
    return True


def find(name: str, number: int | None = None, wait_s: float = _WAIT_S) -> Version:
    """Give a live version, to be loaded by its reference; the current one without a number.

    It is without one while its block is made again, for which this waits so long.
    """
    _check(name)
    client.running(name)
    version: Version = client.ask("find", name, number, wait_s)
    if version.state != "live":
        raise UnknownVersionError(f"version {version.number} of {name!r} is {version.state}")
    return version


# --- the other verbs ------------------------------------------------------------------------------


def versions(name: str) -> list[Version]:
    """Give the versions of a name by number, lately retired ones among them; then staged ones."""
    _check(name)
    return client.ask("versions", name) if client.is_running() else []


def published() -> list[str]:
    """Give the names that have a current version, in order."""
    return client.ask("names") if client.is_running() else []


def state() -> dict[str, Any]:
    """Tell of everything in plain values: names, their versions, followers, rebuilds."""
    nothing: dict[str, Any] = {"names": {}, "processes": 0, "rebuilds": {}}
    return client.ask("state") if client.is_running() else nothing


def promote(name: str, number: int) -> Version:
    """Make a live version the current one: forward, or back; raises `UnknownVersionError`."""
    client.running(name)
    version: Version = client.ask("promote", name, number)
    return version


def retire(name: str, number: int | None = None) -> None:
    """Retire a version, or all of a name; their memory is free when nobody uses them any more.

    Raises `UnknownVersionError` for what does not exist, and `CatalogError` for a current version.
    """
    client.running(name)
    client.ask("retire", name, number)


def _check(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"a name is 1 to 128 letters, digits and ._/-, not {name!r}")
