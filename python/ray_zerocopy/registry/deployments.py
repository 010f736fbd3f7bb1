"""Versions that live as long as a deployment of Serve has them, under names of their own.

keep ─▶ published as "serve/<id>" ─ its handle is bound and pickled ─ hold ─▶ Keeper
Keeper ─ looks at what Serve's controller has of its deployments ─▶ retires what is in none

| a kept version | goes |
|---|---|
| a deployment has it, or had it in the last look | never |
| no deployment has it any more | at the next look but one |
| it was pickled to be deployed, and is in no deployment | two minutes later |

A replica that has loaded a version, or borrowed it, keeps its memory itself.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid

import ray

from ray_zerocopy.errors import CatalogError, RayZeroCopyError
from ray_zerocopy.registry.catalog import ACTOR, NAMESPACE
from ray_zerocopy.registry.client import catalog
from ray_zerocopy.registry.publication import find, publish_copy, published, retire
from ray_zerocopy.registry.records import Version
from ray_zerocopy.store.ray_inside import serve_deployments

logger = logging.getLogger(__name__)

_PREFIX = "serve/"
_LOOK_S = 3.0
_UNDEPLOYED_S = 120.0
_ANSWER_S = 60.0


def keep(ref: ray.ObjectRef) -> Version:
    """Publish what a reference refers to, for the deployments that it will be bound to."""
    version = publish_copy(f"{_PREFIX}{uuid.uuid4().hex}", ref)
    hold(version)
    return version


def hold(version: Version) -> bool:
    """Have a version kept for two minutes, and then for as long as a deployment has it.

    False if it is gone, as no deployment had it.
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
        except ray.exceptions.RayActorError as error:  # it starts again
            if time.monotonic() > deadline_s:
                raise CatalogError(f"the keeper of {version.name!r} does not start") from error
            time.sleep(0.2)


def _start_keeper(_: object) -> None:
    """Start it, in the catalog: what an actor can import depends on the job that started it."""
    options = {**ACTOR, "name": "keeper", "max_concurrency": 8}  # each of them a thread
    ray.remote(Keeper).options(**options).remote()


def borrowed(version: Version) -> Version:
    """Give a kept version with a reference: while that is held, it loads, retired or not."""
    kept = version.name.startswith(_PREFIX)
    return find(version.name, version.number) if kept else version


class Keeper:
    """Retires kept versions that no deployment has.

    What it knows it has asked of the catalog and of Serve: it may be killed at any time.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._until_s: dict[str, float] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def hold(self, name: str) -> bool:
        """Keep a version for two minutes, whoever has it; whether it is there."""
        with self._changing:
            if there := name in self._find():
                self._until_s[name] = time.monotonic() + _UNDEPLOYED_S
            return there

    def _find(self) -> set[str]:
        """Give the kept versions; those that it sees for the first time have two minutes."""
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
                    if not known:  # what was there before it was started
                        self._find()
                        known = True
                    if self._until_s:
                        self._look()
            except (ray.exceptions.RayError, RayZeroCopyError, LookupError) as error:
                logger.warning("kept versions stay for now: %s", error)

    def _look(self) -> None:
        deployments = serve_deployments()
        for name, until_s in list(self._until_s.items()):
            now_s = time.monotonic()
            if any(name.encode() in deployment for deployment in deployments):
                self._until_s[name] = now_s + _LOOK_S / 2
            elif now_s > until_s:
                retire(name)
                del self._until_s[name]
