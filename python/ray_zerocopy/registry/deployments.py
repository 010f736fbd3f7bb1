"""Versions that live as long as a deployment of Serve uses them, under generated names.

keep ─▶ published as "serve/<id>" ─ its handle is bound and pickled ─ hold ─▶ Keeper
Keeper ─ reads the deployments of Serve's controller ─▶ retires versions in none of them

| a kept version | is retired |
|---|---|
| a deployment uses it, or did at the last check | never |
| no deployment uses it any more | at the second check after |
| it was pickled for a deployment, but is in none | after two minutes |

A replica that has loaded or borrowed a version keeps its memory itself.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid

import ray

from ray_zerocopy.errors import CatalogError, RayZeroCopyError, UnknownVersionError
from ray_zerocopy.registry.catalog import ACTOR, NAMESPACE
from ray_zerocopy.registry.client import catalog
from ray_zerocopy.registry.publication import find, forget, publish_copy, published, retire
from ray_zerocopy.registry.records import Version
from ray_zerocopy.store.ray_inside import serve_deployments

logger = logging.getLogger(__name__)

_PREFIX = "serve/"
_LOOK_S = 3.0
_UNDEPLOYED_S = 120.0
_ANSWER_S = 60.0


def keep(ref: ray.ObjectRef) -> Version:
    """Publish the object of a reference, for later deployments."""
    version = publish_copy(f"{_PREFIX}{uuid.uuid4().hex}", ref)
    hold(version)
    return version


def hold(version: Version) -> bool:
    """Keep a version for two minutes, and then as long as a deployment uses it.

    Returns False if it is already retired, because no deployment used it.
    """
    deadline_s = time.monotonic() + _ANSWER_S
    while True:
        try:
            keeper = ray.get_actor("keeper", NAMESPACE)
        except ValueError:
            ray.get(catalog().__ray_call__.remote(_start_keeper), timeout=_ANSWER_S)
            continue
        try:
            held: bool = ray.get(keeper.hold.remote(version.name), timeout=_ANSWER_S)
            return held
        except ray.exceptions.RayActorError as error:  # it is restarting
            if time.monotonic() > deadline_s:
                raise CatalogError(f"the keeper of {version.name!r} does not start") from error
            time.sleep(0.2)


def _start_keeper(_: object) -> None:
    """Start the keeper from the catalog: an actor's imports depend on the job that started it."""
    options = {**ACTOR, "name": "keeper", "max_concurrency": 8}  # each of them a thread
    ray.remote(Keeper).options(**options).remote()


def borrowed(version: Version) -> Version:
    """Return a kept version with a reference: with it, the version loads even if retired."""
    kept = version.name.startswith(_PREFIX)
    return find(version.name, version.number) if kept else version


class Keeper:
    """Retires kept versions that no deployment uses.

    All its state is from the catalog and Serve, so it may be killed at any time.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._until_s: dict[str, float] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def hold(self, name: str) -> bool:
        """Keep a version for two minutes in any case; returns whether it exists."""
        with self._changing:
            if there := name in self._find():
                self._until_s[name] = time.monotonic() + _UNDEPLOYED_S
            return there

    def _find(self) -> set[str]:
        """Return the kept versions; new ones get two minutes."""
        there = {name for name in published() if name.startswith(_PREFIX)}
        new = dict.fromkeys(there, time.monotonic() + _UNDEPLOYED_S)
        self._until_s = {name: self._until_s.get(name, new[name]) for name in there}
        return there

    def _run(self) -> None:
        known = False
        while True:
            time.sleep(_LOOK_S)
            try:
                with self._changing:
                    if not known:  # versions from before it started
                        self._find()
                        known = True
                    if self._until_s:
                        self._look()
            except (ray.exceptions.RayError, RayZeroCopyError, LookupError) as error:
                logger.warning("kept versions stay until the next check: %s", error)

    def _look(self) -> None:
        deployments = serve_deployments()
        for name, until_s in list(self._until_s.items()):
            now_s = time.monotonic()
            if any(name.encode() in deployment for deployment in deployments):
                self._until_s[name] = now_s + 1.5 * _LOOK_S
            elif now_s > until_s:
                with contextlib.suppress(UnknownVersionError):  # retired by hand
                    retire(name)
                forget(name)
                del self._until_s[name]
