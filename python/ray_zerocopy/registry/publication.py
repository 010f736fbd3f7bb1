"""The caller's side of the catalog: to publish a model under a name, and to load it by that.

publish ─ stage ─▶ a task makes the block ─ built? ─▶ commit: live and current
load ─ find ─▶ version ─▶ get(version.ref) ─ cannot be loaded ─▶ find another generation
"""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import ray

from ray_zerocopy import metrics, requirements
from ray_zerocopy.errors import (
    BlockError,
    CatalogError,
    LostVersionError,
    RayZeroCopyError,
    UnknownVersionError,
)
from ray_zerocopy.registry.catalog import NAMESPACE, START_S, Version
from ray_zerocopy.registry.manifest import Manifest
from ray_zerocopy.registry.owner import Source, plan, restored
from ray_zerocopy.store import references
from ray_zerocopy.store.snapshot import save

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._/-]{1,128}")
_WAIT_S = 2.0  # a question that takes longer is asked again
_ANSWER_S = 60.0  # for a catalog that is busy, or starting again
_SLICE_S = 5.0  # of a load, after which the catalog is asked whether there is another generation
_GENERATIONS = 3


def publish(
    name: str,
    obj: Any = None,
    *,
    make: Callable[[], Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    snapshot: str | os.PathLike[str] | None = None,
    keep: int = 2,
    timeout: float = 3600.0,
) -> Version:
    """Keep a model in the cluster under a name, as its current version, whoever may die.

    Give the object itself, or `make`, a callable without arguments that gives it, or the `path` of
    a snapshot: these the cluster can make again when every copy is lost. An object that nobody can
    make again is kept as long as a copy lives, unless `snapshot` says where to save it; `heals`
    tells. The new version is current by one step, when it is whole: until then, and if this fails
    or this process dies, the name stands for what it did.

    What equals the current version to the byte is not stored again: that one is given, and heals
    from now on if either of them does.

    Args:
        name: letters, digits and `._/-`, 128 at most.
        obj: what `put` takes.
        make: runs in a worker outside of this job and its working_dir, so what it imports must be
            installed there; what it holds itself is pickled, up to 1 MiB.
        path: of what `save` wrote, or its URL; every node should be able to read it.
        snapshot: such a path, where the object is saved first, so that it heals from there.
        keep: how many versions stay, this one included, so that going back is instant. Older ones
            are retired: their memory is free when nobody uses them.
        timeout: seconds for all of it.

    Raises:
        PublishError: a part of the object, or `make`, does not pickle or cannot be imported.
        StoreFullError: no store has room for the block.
        CatalogError: the catalog does not answer, or `make` failed.
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
    if keep < 1:
        raise ValueError(f"keep is 1 or more, not {keep}")
    node = ray.get_runtime_context().get_node_id()
    copied: list[ray.ObjectRef] = []
    if snapshot is not None:
        save(obj, snapshot)
    elif obj is not None:
        copied = [obj if isinstance(obj, ray.ObjectRef) else references.put(obj)]
    source: Source = "object" if obj is not None else "make" if make is not None else "path"
    if (read := snapshot or path) is not None:
        make = functools.partial(restored, _absolute(read))
    how = plan(source, make, node)
    _start()
    deadline_s = time.monotonic() + timeout
    while time.monotonic() < deadline_s:
        number = _ask("stage", name, how, copied, keep)
        try:
            while (built := _ask("built", name, number, _WAIT_S)) is False:
                if time.monotonic() > deadline_s:
                    raise CatalogError(f"{name!r} could not be published in {timeout:g} s")
            version: Version | None = _ask("commit", name, number) if built else None
        except BaseException:
            _tell("abandon", name, number)
            raise
        if version is not None:
            if version.number != number:
                logger.info("%s: version %d has the same bytes", name, version.number)
            return version
    raise CatalogError(f"{name!r} could not be published in {timeout:g} s")


def _absolute(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def load(name: str, *, version: int | None = None, timeout: float = 600.0, **how: Any) -> Any:
    """Load a published model, in any task, actor, driver or job of the cluster.

    Where its block is lost, this waits until the cluster has made it again.

    Args:
        name: as published.
        version: a number that is still live; by default the current one.
        timeout: seconds for all of it.
        how: `isolation`, `prefault` and `device`, as for `get`.

    Raises:
        UnknownVersionError: nothing live has that name and number.
        LostVersionError: the block is gone and could not be made again, in time or at all.
        CatalogError: the catalog does not answer.

    """
    found = find(name, version)
    return load_version(found, timeout=timeout, **how)


def load_version(found: Version, *, timeout: float = 600.0, **how: Any) -> Any:
    """Load just this version, in whatever generation there is."""
    token = metrics.LOADING.set(found.name)
    try:
        return _load_version(found, timeout, how)
    finally:
        metrics.LOADING.reset(token)


def _load_version(found: Version, timeout: float, how: dict[str, Any]) -> Any:
    name, number, broken = found.name, found.number, None
    deadline_s = time.monotonic() + timeout
    error: Exception | None = None
    for _ in range(_GENERATIONS):
        while time.monotonic() < deadline_s:
            if found.ref is not None and found.generation != broken:
                try:
                    return references.get(found.ref, timeout=_SLICE_S, **how)
                except ray.exceptions.GetTimeoutError:
                    pass
                except (*_LOSSES, BlockError) as lost:
                    error, broken = lost, found.generation
                    break
            found = find(name, number, broken)
        else:
            break
        found = find(name, number, broken)
    raise LostVersionError(
        f"version {number} of {name!r} could not be loaded in {timeout:g} s, nor made again "
        f"(generation {found.generation}): {error}"
    ) from error


# What Ray raises where an object is lost for good; others, of what a model itself does, are not.
_LOSSES = (
    ray.exceptions.ObjectLostError,
    ray.exceptions.RayTaskError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
)


def find(name: str, number: int | None = None, broken: int | None = None) -> Version:
    """Give a live version, to be loaded by its reference; the current one without a number.

    It may be without one for now, while its block is made; `broken` is a generation of it that
    cannot be loaded, in whose place another is made.
    """
    _check(name)
    _running(name)
    version: Version = _ask("find", name, number, broken, _WAIT_S)
    if version.state != "live":
        raise UnknownVersionError(f"version {version.number} of {name!r} is {version.state}")
    return version


def versions(name: str) -> list[Version]:
    """Give the versions of a name, staged and lately retired ones among them, by number."""
    _check(name)
    return _ask("versions", name) if is_running() else []


def published() -> list[str]:
    """Give the names that have a current version, in order."""
    return _ask("names") if is_running() else []


def state() -> dict[str, Any]:
    """Tell of everything in plain values: names, their versions, followers, rebuilds."""
    nothing: dict[str, Any] = {"names": {}, "processes": 0, "rebuilds": {}}
    return _ask("state") if is_running() else nothing


def promote(name: str, number: int) -> Version:
    """Make a live version the current one: forward, or back; raises `UnknownVersionError`."""
    _running(name)
    version: Version = _ask("promote", name, number)
    return version


def retire(name: str, number: int | None = None) -> None:
    """Retire a version, or all of a name; their memory is free when nobody uses them any more.

    Raises `UnknownVersionError` for what does not exist, and `CatalogError` for a current version.
    """
    _running(name)
    _ask("retire", name, number)


# --- how the catalog is asked -------------------------------------------------------------------


def is_running() -> bool:
    """Whether anything was ever published in this cluster; its catalog is then there to ask."""
    references.refuse_client()
    try:
        catalog()
    except ValueError:
        if not Manifest().names():
            return False
        _start()
    return True


def catalog() -> Any:
    """Give the handle of the catalog; raises `ValueError` where there is none."""
    return ray.get_actor("catalog", NAMESPACE)


def _running(name: str) -> None:
    if not is_running():
        raise UnknownVersionError(f"nothing is published as {name!r}, nor anything else here")


def _start() -> None:
    """Start the catalog where there is none; it takes a few seconds, once in a cluster's life."""
    references.refuse_client()
    try:
        catalog()
    except ValueError:
        address = ray.get_runtime_context().gcs_address
        code = f"from ray_zerocopy.registry import catalog; catalog.start({address!r})"
        # Beside no script and in no folder whose modules a worker would find.
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=2 * START_S,
            check=False,
            cwd=os.path.sep,
        )
        if done.returncode:
            raise CatalogError(f"the catalog does not start: {done.stderr[-2000:]}") from None


def _ask(method: str, *args: Any) -> Any:
    """Call the catalog; one that is starting again is asked again."""
    deadline_s = time.monotonic() + _ANSWER_S
    while True:
        try:
            return ray.get(getattr(catalog(), method).remote(*args), timeout=_ANSWER_S)
        except RayZeroCopyError as error:
            raise getattr(error, "cause", error) from None
        except ray.exceptions.GetTimeoutError:
            raise CatalogError(f"the catalog took more than {_ANSWER_S:g} s to {method}") from None
        except (ray.exceptions.RayActorError, ValueError) as error:
            if time.monotonic() > deadline_s:
                raise CatalogError(f"the catalog is not there to {method}: {error}") from error
            time.sleep(random.uniform(0.1, 0.3))


def _tell(method: str, *args: Any) -> None:
    """Call the catalog without waiting for it."""
    try:
        getattr(catalog(), method).remote(*args)
    except (ray.exceptions.RayError, ValueError) as error:
        logger.warning("the catalog could not be told to %s: %s", method, error)


def _check(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"a name is 1 to 128 letters, digits and ._/-, not {name!r}")
