"""A model that updates itself to the current version of its name.

catalog ═ a promise per name ═▶ Follower ─ a new version ─▶ a thread loads it ─▶ live()

`live()` is an attribute read. Models that a caller already holds stay valid, with all their pages.

Each live loads one version at a time, always the newest it knows: it skips versions that come
faster than it loads. Threads hold references only while they load, and end before the process
leaves the cluster.
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
from dataclasses import dataclass, replace
from typing import Any

import ray

from ray_zerocopy import metrics
from ray_zerocopy.calls.replacement import StandsForModel
from ray_zerocopy.errors import CatalogError
from ray_zerocopy.pickled import named
from ray_zerocopy.registry import client
from ray_zerocopy.registry.promises import BEAT_S, Told
from ray_zerocopy.registry.publication import find, load_version
from ray_zerocopy.registry.records import Version
from ray_zerocopy.store.ray_inside import before_leaving, cluster, reference_at

logger = logging.getLogger(__name__)

_LEAVING_S = 2.0  # to finish loads when the process leaves
_AGAIN_S = (0.2, 1.0)


class Live(StandsForModel):
    """The current version of a published model: call it to get the model, each time you use it.

    `live()` is an attribute read and never blocks: a thread loads the next version. The model
    changes between two calls, never during one. If a request needs several calls of the same
    weights, get the model once: `model = live()`.

    It pickles as its name and loads at its first call, so you can pass it to tasks, actors and
    Serve. Threads and coroutines may share one. It belongs to the cluster where it loaded first:
    after this process has left that cluster, it raises `CatalogError`.
    """

    def __init__(self, name: str, how: dict[str, Any]) -> None:
        self.name = name
        self.seen = 0
        """The number of its version, or of the one it is about to load; 0 asks for the current."""
        self._how = how
        self._cluster: str | None = None
        self._first_load = threading.Lock()
        self._lock = threading.Lock()
        self._next: Version | None = None
        self._loading: threading.Thread | None = None
        self._loaded: tuple[Version, Any] | None = None

    def __call__(self) -> Any:
        """Return the model."""
        return (self._loaded or self._first())[1]

    def read(self, **how: Any) -> Live:
        """Follow the same name with other options of `get`."""
        return Live(self.name, {**self._how, **how})

    @property
    def version(self) -> Version:
        """The version that `live()` returns now, without its reference."""
        return (self._loaded or self._first())[0]

    def __reduce__(self) -> Any:
        return live, (self.name, self._how)

    def __repr__(self) -> str:
        number = f", version {self._loaded[0].number}" if self._loaded else ""
        return f"<live {self.name!r}{number}>"

    def _first(self) -> tuple[Version, Any]:
        with self._first_load:
            if self._cluster not in (None, cluster()):
                raise CatalogError(
                    f"{self!r} belongs to a cluster that this process has left: follow it again"
                )
            loaded = self._loaded
            if loaded is None:
                version = find(self.name)
                loaded = replace(version, ref=None), load_version(version, **self._how)
                self._cluster, self._loaded, self.seen = cluster(), loaded, version.number
        _FOLLOWER.follow(self)
        return loaded

    def offer(self, version: Version) -> None:
        """Load a new version and switch to it, unless a newer one is offered first."""
        with self._lock:
            self.seen, self._next = version.number, version
            if self._loading is None:
                try:
                    self._loading = _in_thread("swap", self._catch_up)
                except RuntimeError:  # thread limit: the follower asks again
                    self.seen, self._next = 0, None
                    raise

    def leave(self, ends_s: float) -> None:
        """Drop the model and all references, because the process leaves the cluster."""
        self._next = None
        if (loading := self._loading) is not None:
            loading.join(max(0.0, ends_s - time.monotonic()))
        self._loaded = None

    def _catch_up(self) -> None:
        while (version := self._take()) is not None:
            try:
                self._swap(version)
            except Exception as error:  # after any error, the old version stays
                number, version = version.number, None  # hold no reference while asleep
                if self._next is None:  # else the next one is current; this one may be retired
                    logger.warning("%r stays: version %d does not load: %s", self, number, error)
                    self._tell_again(number)

    def _take(self) -> Version | None:
        """Return the version to load next; None ends the thread."""
        with self._lock:
            version, self._next = self._next, None
            if version is None:
                self._loading = None
            return version

    def _swap(self, version: Version) -> None:
        """Switch to another version."""
        start = time.perf_counter()
        assert self._loaded is not None
        old, model = self._loaded
        if old.digest != version.digest:
            model = load_version(version, **self._how)
        self._loaded = replace(version, ref=None), model
        metrics.record("rzc_swap_seconds", time.perf_counter() - start, self.name)

    def _tell_again(self, number: int) -> None:
        """Ask for a version that did not load again, after a pause."""
        time.sleep(random.uniform(*_AGAIN_S))
        with self._lock:
            if self.seen == number:
                self.seen = 0
        _FOLLOWER.wake()


@named
def live(name: str, how: dict[str, Any]) -> Live:
    """Unpickle a live; it loads at its first call."""
    return Live(name, how)


def follow(name: str, **how: Any) -> Live:
    """Load a published model that updates itself: `live()` returns the current version's model.

    `how` is as for `get`.

    Raises:
        RayZeroCopyError: as from `load`.

    Example:
        >>> live = rzc.follow("bert")
        >>> output = live()(batch)      # after a publish: the new weights, without a restart

    """
    followed = Live(name, how)
    followed()
    return followed


@dataclass
class _Waiting:
    """A follower waits for the next version of a name."""

    turn: int
    promise: Future[Told | None]


class Follower:
    """Waits for the versions of all names that this process follows, in one thread."""

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._lives: weakref.WeakSet[Live] = weakref.WeakSet()
        self._woken = threading.Event()
        self._asked: Future[dict[str, Told]] | None = None
        self._asked_for: set[str] = set()
        self._waiting: dict[str, _Waiting] = {}  # by name
        self._absent: set[str] = set()  # names without a current version, at the last answer
        self._due_s = 0.0
        self._thread: threading.Thread | None = None
        self._leaves = False

    def follow(self, followed: Live) -> None:
        """Offer each new version to this live, as long as it exists."""
        with self._lock:
            self._lives.add(followed)
            self._absent.discard(followed.name)
            if self._thread is None:
                before_leaving(self.leave)
                self._due_s = 0.0
                self._thread = _in_thread("follow", self._run)
        self.wake()

    def wake(self) -> None:
        """Check again: an answer arrived, or the set of followed names or seen versions changed."""
        self._woken.set()

    def leave(self) -> None:
        """End all threads, because the process leaves the cluster."""
        with self._lock:
            thread, lives, self._leaves = self._thread, list(self._lives), True
        self.wake()
        ends_s = time.monotonic() + _LEAVING_S
        if thread is not None:
            thread.join(_LEAVING_S)
        for followed in lives:
            followed.leave(ends_s)
        with self._lock:
            self._lives.clear()
            self._leaves = False

    def _run(self) -> None:
        while (seen := self._seen()) is not None:
            try:
                self._ask(seen)
                self._woken.wait(max(0.0, self._due_s - time.monotonic()))
                self._hear()
            except Exception as error:  # after any error, ask again
                logger.debug("asking the catalog again: %s", error)
                self._forget()
                self._woken.wait(random.uniform(*_AGAIN_S))

    def _seen(self) -> dict[str, int] | None:
        """Return the seen version per name, 0 if its lives differ; None ends the thread."""
        self._woken.clear()
        with self._lock:
            seen: dict[str, int] = {}
            for followed in self._lives:
                number = seen.setdefault(followed.name, followed.seen)
                seen[followed.name] = number if number == followed.seen else 0
            if self._leaves or not seen or not ray.is_initialized():
                self._forget()
                self._thread = None
                return None
            return seen

    def _forget(self) -> None:
        """Drop all references, and ask again."""
        self._asked, self._due_s = None, 0.0
        self._waiting.clear()
        self._absent = set()

    def _ask(self, seen: dict[str, int]) -> None:
        """Ask the catalog for unknown names at once, and for all at least every half minute."""
        known = {name for name, number in seen.items() if number and name in self._waiting}
        known |= self._absent & seen.keys()
        late = time.monotonic() >= self._due_s
        if late or (self._asked is None and known != seen.keys()):
            self._asked = self._future(client.catalog().follow.remote(self._id, list(seen)))
            self._asked_for = set(seen)
            self._due_s = time.monotonic() + random.uniform(BEAT_S / 2, BEAT_S)

    def _future(self, ref: ray.ObjectRef) -> Future[Any]:
        """Return a future of an object that wakes the thread."""
        future: Future[Any] = ref.future()
        future.add_done_callback(lambda _: self.wake())
        return future

    def _hear(self) -> None:
        """Process the answers that have arrived, and offer their versions."""
        if self._asked is not None and self._asked.done():
            told, self._asked = self._asked.result(), None
            self._absent = self._asked_for - told.keys()
            for name, each in told.items():
                self._offer(name, each)
        for name, waiting in list(self._waiting.items()):
            if waiting.promise.done():
                del self._waiting[name]
                if (kept := waiting.promise.result()) is not None:
                    self._offer(name, kept)

    def _offer(self, name: str, told: Told) -> None:
        """Offer a version and wait for the next, unless a later one is known already."""
        turn, version, place, (promise,) = told
        waiting = self._waiting.get(name)
        if waiting is None or waiting.turn < turn:
            self._waiting[name] = _Waiting(turn, self._future(promise))
        elif waiting.turn > turn:
            return
        with self._lock:
            lives = [each for each in self._lives if each.name == name]
        for followed in lives:
            if version.number != followed.seen and not self._leaves:
                ref = None if place is None else reference_at(place)
                followed.offer(replace(version, ref=ref))


def _in_thread(what: str, function: Callable[..., None], *args: Any) -> threading.Thread:
    name = f"ray_zerocopy.{what}"
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    thread.start()
    return thread


_FOLLOWER = Follower()
