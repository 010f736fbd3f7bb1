"""A model that changes by itself: what a name stands for now, in a process that uses it.

catalog ═ one long poll a process ═▶ Follower ─ another version ─▶ a thread loads it ─▶ live()

`live()` is a look at an attribute. Who has called it keeps what it gave, the old version with all
its pages, for as long as they like.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from ray_zerocopy import metrics
from ray_zerocopy.calls.replacement import StandsForModel
from ray_zerocopy.errors import RayZeroCopyError
from ray_zerocopy.registry.catalog import Version
from ray_zerocopy.registry.publication import catalog, find, load_version
from ray_zerocopy.store.cycles import collect, traces

logger = logging.getLogger(__name__)

_POLL_S = 30.0
_SETTLE_S = 1.0  # for calls that are still in the old version


class Live(StandsForModel):
    """The current version of a published model: call it for the model, each time you use it.

    `live()` costs a look at an attribute. The model it gives changes between two calls, never
    during one, and never blocks: the next version is loaded on a thread. Take it once a request,
    `model = live()`, where a request needs several calls of the same weights.

    It pickles as its name and loads at its first call, so it goes into tasks, actors and Serve.
    Threads and coroutines may share one.
    """

    def __init__(self, name: str, how: dict[str, Any]) -> None:
        self.name = name
        self._how = how
        self._loading = threading.Lock()
        self._loaded: tuple[Version, Any] | None = None

    def __call__(self) -> Any:
        """Give the model."""
        return (self._loaded or self._first())[1]

    def read(self, **how: Any) -> Live:
        """Follow the same name, loaded in another way."""
        return Live(self.name, {**self._how, **how})

    @property
    def version(self) -> Version:
        """The version that `live()` gives now."""
        return (self._loaded or self._first())[0]

    def __reduce__(self) -> Any:
        return Live, (self.name, self._how)

    def __repr__(self) -> str:
        number = f", version {self._loaded[0].number}" if self._loaded else ""
        return f"<live {self.name!r}{number}>"

    def _first(self) -> tuple[Version, Any]:
        with self._loading:
            if self._loaded is None:
                version = find(self.name)
                self._loaded = version, load_version(version, **self._how)
            loaded = self._loaded
        _FOLLOWER.follow(self)
        return loaded

    def swap(self, version: Version) -> None:
        """Load another version, then give that; called by the `Follower`, on a thread."""
        start = time.perf_counter()
        with self._loading:
            assert self._loaded is not None
            old, model = self._loaded
            if old.digest != version.digest:
                model = load_version(version, **self._how)
            replaced = traces(self._loaded[1]) if model is not self._loaded[1] else []
            self._loaded = version, model
        metrics.record("rzc_swap_seconds", time.perf_counter() - start, self.name)
        del model
        time.sleep(_SETTLE_S)
        collect(replaced)


def follow(name: str, **how: Any) -> Live:
    """Load a published model that stays the current one: `live()` gives the model.

    `how` is as for `get`. Raises as `load` does.

    Example:
        >>> live = rzc.follow("bert")
        >>> output = live()(batch)      # after a publish, the new weights, without a restart

    """
    live = Live(name, how)
    live()
    return live


class Follower:
    """Waits at the catalog for all that this process follows, in one call."""

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._lives: weakref.WeakSet[Live] = weakref.WeakSet()
        self._seen: dict[str, tuple[int, int]] = {}
        self._woken = threading.Event()
        self._answer: Future[dict[str, Version]] | None = None
        self._running = False

    def follow(self, live: Live) -> None:
        """Swap this one's versions from now on, for as long as anybody has it."""
        with self._lock:
            self._lives.add(live)
            version = live.version
            self._seen.setdefault(live.name, (version.number, version.generation))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="ray_zerocopy.follow", daemon=True).start()
        self._woken.set()

    def _run(self) -> None:
        while seen := self._followed():
            try:
                changed = self._wait(seen)
            except (ray.exceptions.RayError, RayZeroCopyError, ValueError) as error:
                logger.debug("asking the catalog again: %s", error)
                time.sleep(random.uniform(0.2, 1.0))
                continue
            for name, version in changed.items():
                with self._lock:
                    self._seen[name] = version.number, version.generation
                    lives = [live for live in self._lives if live.name == name]
                for live in lives:
                    _in_thread(self._swap, live, version)

    def _followed(self) -> dict[str, tuple[int, int]]:
        """Give what is followed; nothing ends the thread."""
        self._woken.clear()
        with self._lock:
            names = {live.name for live in self._lives}
            self._seen = {name: mark for name, mark in self._seen.items() if name in names}
            self._running = bool(self._seen) and ray.is_initialized()
            if not self._running:
                self._seen = {}
            return dict(self._seen)

    def _wait(self, seen: dict[str, tuple[int, int]]) -> dict[str, Version]:
        """Wait at the catalog, until something changes or another name is followed."""
        poll = catalog().changes.remote(self._id, seen, random.uniform(_POLL_S / 2, _POLL_S))
        answer = self._answer = poll.future()
        answer.add_done_callback(self._wake)
        self._woken.wait(2 * _POLL_S)
        return answer.result() if answer.done() else {}

    def _wake(self, answer: Future[Any]) -> None:
        """End the wait for this answer; the catalog ends older ones itself, and nobody waits."""
        if answer is self._answer:
            self._woken.set()

    def _swap(self, live: Live, version: Version) -> None:
        try:
            live.swap(version)
        except Exception as error:  # whatever it is, the old version serves on
            logger.warning("%r stays, version %d does not load: %s", live, version.number, error)
            time.sleep(random.uniform(0.5, 2.0))
            with self._lock:
                if self._seen.get(live.name) == (version.number, version.generation):
                    self._seen[live.name] = (0, 0)  # told again
            self._woken.set()


def _in_thread(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, name="ray_zerocopy.swap", daemon=True).start()


_FOLLOWER = Follower()
