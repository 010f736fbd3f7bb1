"""Publish a model under a name, and load it by name.

publish ─ an object, or a plan ─▶ catalog: room, made? ─▶ written ─▶ live and current
load ─ find ─▶ version ─▶ get(version.ref) ─ fails ─▶ is the block lost, or is the cause here?
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
    SaveError,
    SnapshotWarning,
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
_LARGE_NBYTES = 2**26  # writing this takes seconds on a busy machine
_SHARED_NBYTES = 2**27  # for less, a look at the current version costs more than it saves
_WAIT_S = 2.0  # ask again after this
_SLICE_S = 5.0  # of a load; then ask the catalog whether the block was rebuilt
_SENT_A_SECOND = 5e8  # bytes, between nodes; Ray begins anew after each slice
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
    base: str | Version | Sequence[str | Version] | None = (),
) -> Version:
    """Publish a model under a name, as its current version; the cluster keeps it.

    Pass the object itself, or `make`, a function without arguments that returns it, or the `path`
    of a snapshot. The cluster can rebuild from `make` or `path` if every copy is lost. An object
    lives as long as a copy of it, unless `snapshot` gives a path to save it. `heals` says whether
    the version can be rebuilt. The new version becomes current in one step, when it is complete.
    Until then, and if this fails or this process dies, the previous version stays current.

    Publishing an identical model (weights and structure) returns the current version. If either
    can be rebuilt, the version is marked as healing.

    Args:
        name: letters, digits and `._/-`, 128 at most.
        obj: an object for `put`.
        make: runs in a worker outside of any job and its working_dir, so its imports must be
            installed on the nodes. It is pickled, with a limit of 1 MiB.
        path: path or URL of a file that `save` wrote; every node should be able to read it.
        snapshot: such a path; saves the object there. A version that was published from this path
            before no longer heals: give each version its own path if both should.
        keep: number of versions to keep, including this one, for instant rollback. Older versions
            are retired: their memory is free when no process uses them.
        timeout: seconds for the whole call, and for each rebuild.
        base: names or versions of which the model is a variant, as for `put`: tensors whose bytes a
            base has are not stored again. The bases' blocks stay as long as the variant, even if
            retired. If the variant is rebuilt, its bases are rebuilt first; without them, it is
            stored whole. By default, an object of 128 MiB or more shares with the current version
            of its name if that saves a quarter of its bytes, both are from this node, and `keep` is
            2 or more. None shares nothing.

    Raises:
        PublishError: a part of the object, or `make`, does not pickle or cannot be imported; or
            the object has no tensors or arrays, or tensors without values (on the meta device).
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
        raise TypeError("publish takes exactly one of an object, make and path")
    if snapshot is not None and obj is None:
        raise TypeError("snapshot is for an object: make and path heal without it")
    if base and isinstance(obj, ray.ObjectRef):
        raise TypeError("base is not for a reference: what it refers to is stored already")
    bases = references.listed(base)
    if any(isinstance(each, ray.ObjectRef) for each in bases):
        raise TypeError("base must be published: a reference ends with the process that put it")
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, not {keep}")
    ends_s, token = time.monotonic() + timeout, uuid.uuid4().hex
    client.start(timeout)
    node = ray.get_runtime_context().get_node_id()
    wanted = Wanted(name, token, Plan("object", node, seconds=timeout), keep, None)
    found = [_found(each) for each in bases]
    keys = tuple((each.name, each.number) for each in found)
    if make is not None:
        plan = Plan("make", node, make=_pickled(make), seconds=timeout, bases=keys)
        return _publish(replace(wanted, plan=plan), ends_s)
    if path is not None:
        plan = Plan("path", node, files=(snapshots.absolute(path),), seconds=timeout, bases=keys)
        return _publish(replace(wanted, plan=plan), ends_s)
    if snapshot is not None:
        target = snapshots.absolute(snapshot)
        if os.path.isdir(target):
            raise SaveError(f"{target} is a folder: give the path of a file")
        files = f"{target}.{token}", target
        plan = Plan("object", node, files=files, seconds=timeout, bases=keys)
        snapshots.save(obj, plan.files[0])
        return _publish(replace(wanted, plan=plan), ends_s)
    what = f"the object of {name!r}"
    if not isinstance(obj, ray.ObjectRef):
        previous = partial(_previous, name, node) if base == () and keep > 1 else None
        with contextlib.suppress(_NoRoomError):
            refs = [each.ref for each in found if each.ref is not None]
            shared = Anchored(obj, refs, previous)
            return _write(wanted, shared, what, ends_s)
        wanted = replace(wanted, token=uuid.uuid4().hex)
    copied = obj if isinstance(obj, ray.ObjectRef) else references.put(obj)
    parts = references.parts_of(copied)
    complete(parts, what, None if obj is copied else obj)
    return _publish(replace(wanted, digest=parts.digest()), ends_s, [copied])


def publish_copy(name: str, ref: ray.ObjectRef) -> Version:
    """Publish the object of a reference, with tensors or without, for a deployment of Serve."""
    client.start()
    plan = Plan("object", ray.get_runtime_context().get_node_id(), seconds=_COPY_S)
    digest = references.parts_of(ref).digest()
    wanted = Wanted(name, uuid.uuid4().hex, plan, 1, digest)
    return _publish(wanted, time.monotonic() + _COPY_S, [ref])


class _NoRoomError(Exception):
    """No process can make room for this object, so it must be copied."""


def _previous(name: str, node: str, nbytes: int) -> ray.ObjectRef | None:
    """Return the current version's block for the next version to share, or None.

    Only if both are made on one node: then a lost node loses no more than without sharing.
    """
    if nbytes < _SHARED_NBYTES:
        return None
    try:
        version = client.ask("previous", name, node, seconds=_WAIT_S)
    except RayZeroCopyError:
        return None
    return None if version is None else version.ref


def _write(wanted: Wanted, shared: Anchored, what: str, ends_s: float) -> Version:
    """Publish an object by writing it once, into room that the owner makes."""
    parts = Parts.of(shared)
    complete(parts, what, shared.obj)
    nbytes = shared.block.nbytes
    if parts.bases:  # Ray sends smaller objects in messages, which we cannot write to
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
    """Ask the catalog until the version is published; then move its snapshot into place."""
    version: Version | None = None
    files = wanted.plan.files
    try:
        if shared is not None and (room := _room(wanted, ends_s)) is not None:
            wanted = _written(wanted, shared, room)
        while version is None:
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                seconds = wanted.plan.seconds
                raise CatalogError(
                    f"{wanted.name!r} was not published in {seconds:.3g} s: use a larger timeout"
                )
            answer = client.ask("publish", wanted, list(copied), min(left_s, _WAIT_S))
            if isinstance(answer, Made) and shared is not None:
                wanted = _written(wanted, shared, answer)
            else:
                version = answer
    except BaseException:
        _give_up(wanted)
        raise
    try:
        if len(files) > 1:
            snapshots.move(*files)
    except SaveError as error:  # it is live already, and heals from where the file lies
        warnings.warn(
            f"version {version.number} of {wanted.name!r} is published, and its snapshot stays in "
            f"{files[0]}: {error}",
            SnapshotWarning,
            stacklevel=4,
        )
    finally:
        if files:
            client.tell("placed", wanted.token)
    return version


def _room(wanted: Wanted, ends_s: float) -> Made | None:
    """Ask the owner for room; returns None if it does not answer: then the catalog asks it.

    The catalog must know of a large object before the write, or it would drop the room as that of
    a dead publisher. It hears of a small one soon enough after the write.
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
    """Write an object into its room, and return the request that says so."""
    assert room.ref is not None
    parts = references.write(shared, room.ref, room.nbytes)
    if parts is None:
        raise _NoRoomError
    digest = parts.digest()
    return replace(wanted, digest=digest, written=(room.ref,))


def _give_up(wanted: Wanted) -> None:
    """Stop the publication; remove its saved file, unless the version was published after all."""
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
            f"make pickles to {len(pickled):,} bytes, {_MAKE_NBYTES:,} at most: it should load the "
            f"model, not hold it; or publish the object itself, or a path"
        )
    return pickled


# --- load -----------------------------------------------------------------------------------------


def load(name: str, *, version: int | None = None, timeout: float = 600.0, **how: Any) -> Any:
    """Load a published model, in any task, actor, driver or job of the cluster.

    If its block is lost, this waits until the cluster has rebuilt it.

    Args:
        name: as published.
        version: number of a live version; default: the current one at the time of the load.
        timeout: seconds for the whole call.
        how: `isolation`, `prefault` and `device`, as for `get`.

    Raises:
        UnknownVersionError: no live version has that name and number.
        LostVersionError: the block is gone and could not be rebuilt, in time or at all.
        ResourceError: this process is at a limit; the block is intact.
        VersionError: a newer ray_zerocopy published it.
        CatalogError: the catalog does not answer.

    """
    return _load(name, version, None, timeout, how)


def load_version(found: Version, *, timeout: float = 600.0, **how: Any) -> Any:
    """Load exactly this version, in any generation."""
    return _load(found.name, found.number, found, timeout, how)


def _load(
    name: str, number: int | None, found: Version | None, timeout: float, how: dict[str, Any]
) -> Any:
    ends_s = time.monotonic() + timeout
    trouble = "the catalog was not asked"
    losses = 0
    mark, slice_s = None, 0.0
    while (left_s := ends_s - time.monotonic()) > 0:
        found, version = None, found or find(name, number, min(left_s, _WAIT_S))
        if version.ref is None:
            trouble = "its block is lost, and not rebuilt yet"
            continue
        if mark != version.mark:
            mark, slice_s = version.mark, max(_SLICE_S, version.nbytes / _SENT_A_SECOND)
        given_s = left_s if left_s < 3 * slice_s else slice_s  # the last one takes all that is left
        loading = metrics.LOADING.set(name)
        try:
            return references.get(version.ref, timeout=given_s, **how)
        except ray.exceptions.GetTimeoutError:
            trouble = "its block has not arrived"
            slice_s *= 4
        except (*LOSSES, BlockError) as error:
            trouble = str(error)  # a kept error would hold this frame and its references
            losses += 1
            if not _is_lost(version, ends_s) and isinstance(error, BlockError):
                raise  # the block is intact elsewhere
            if losses == _GENERATIONS:
                break
        finally:
            metrics.LOADING.reset(loading)
    which = "the current version" if number is None else f"version {number}"
    took = f"{timeout:.3g} s" if losses < _GENERATIONS else f"{losses} attempts"
    raise LostVersionError(f"{which} of {name!r} was not loaded in {took}: {trouble}")


def _is_lost(version: Version, ends_s: float) -> bool:
    """Ask the catalog whether a version that does not load here is lost; waits for the answer."""
    node = ray.get_runtime_context().get_node_id()
    version = replace(version, ref=None)
    while (left_s := ends_s - time.monotonic()) > 0:
        answer = client.ask("broken", version, node, min(left_s, _WAIT_S))
        if answer is not None:
            return bool(answer)
    return True


def find(name: str, number: int | None = None, wait_s: float = _WAIT_S) -> Version:
    """Return a live version with its reference; without a number, the current one.

    If its block is being rebuilt, this waits up to `wait_s`; then the version has no reference.
    """
    _check(name)
    client.running(name)
    version: Version = client.ask("find", name, number, wait_s)
    if version.state != "live":
        raise UnknownVersionError(f"version {version.number} of {name!r} is {version.state}")
    return version


def find_rebuilt(name: str, number: int | None, timeout: float) -> Version:
    """Return a live version with its reference; waits while its block is being rebuilt.

    Raises `LostVersionError` if that takes longer than `timeout` seconds.
    """
    ends_s = time.monotonic() + timeout
    while (version := find(name, number)).ref is None:
        if time.monotonic() > ends_s:
            raise LostVersionError(
                f"version {version.number} of {name!r} has been rebuilding for {timeout:g} s: "
                f"try again, or publish it again"
            )
    return version


def block_of(base: object) -> ray.ObjectRef | None:
    """Return the block of a name or version; None while it is being rebuilt."""
    return _found(base).ref


def _found(base: object) -> Version:
    if isinstance(base, Version):
        return find(base.name, base.number)
    if isinstance(base, str):
        return find(base)
    raise TypeError(
        f"base must be an ObjectRef from put, the name of a published model, a Version, or a list "
        f"of them, not {base!r}"
    )


# --- the other verbs ------------------------------------------------------------------------------


def versions(name: str) -> list[Version]:
    """Return the versions of a name by number, recently retired ones included, then staged ones."""
    _check(name)
    return client.ask("versions", name) if client.is_running() else []


def published() -> list[str]:
    """Return the names that have a current version, sorted."""
    return client.ask("names") if client.is_running() else []


def state() -> dict[str, Any]:
    """Return the whole state in plain values: names, their versions, followers, rebuilds."""
    nothing: dict[str, Any] = {"names": {}, "processes": 0, "rebuilds": {}}
    return client.ask("state") if client.is_running() else nothing


def promote(name: str, number: int) -> Version:
    """Make a live version the current one, forward or back.

    Raises:
        UnknownVersionError: no live version has that name and number.

    """
    client.running(name)
    version: Version = client.ask("promote", name, number)
    return version


def forget(name: str) -> None:
    """Delete what the cluster knows of a retired name that nobody uses again."""
    client.ask("forget", name)


def retire(name: str, number: int | None = None) -> None:
    """Retire a version, or all of a name; their memory is free when no process uses them.

    Raises:
        UnknownVersionError: the name or version does not exist.
        CatalogError: the version is the current one.

    """
    client.running(name)
    client.ask("known", name, number)
    client.ask("retire", name, number)  # repeated if the catalog dies before it answers


def _check(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"a name must be 1 to 128 letters, digits and ._/-, not {name!r}")
