"""What a process keeps of what it has loaded: a few objects by reference, and not for long.

call ── use(ref) ──▶ kept? ──▶ the object, at once
                      └ no ──▶ load, once however many ask
idle for 5 s, or one too many ──▶ dropped, and the store has its pages back
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from ray_zerocopy.store.cycles import collect, traces

_IDLE_S = 5.0
_COUNT = 8


@dataclass
class _Entry:
    loading: threading.Lock = field(default_factory=threading.Lock)
    loaded: list[Any] = field(default_factory=list)  # the object, once it is there
    traces: list[Callable[[], object]] = field(default_factory=list)
    users: int = 0
    used_s: float = 0.0


class Cache:
    """Loaded objects by reference: at most `count` of them, each for `idle_s` after its last use.

    No reference is kept, only its id, so the owner of an object knows of no borrower here. What
    does hold the object's pages is the loaded object; it goes `idle_s` seconds after its last use,
    by a thread that runs only while something is kept. Where cycles hold on to what was dropped,
    the thread collects them: nobody else would in a process that has nothing to do.

    Threads may use one cache, and one object, at the same time. While one of them loads, only those
    who want the same object wait.
    """

    def __init__(
        self, load: Callable[[Any], Any] = ray.get, count: int = _COUNT, idle_s: float = _IDLE_S
    ) -> None:
        self._load = load
        self._count = count
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the last was used last
        self._sweeping = False
        self._dropped: list[Callable[[], object]] = []  # traces of what went since the last sweep

    def __len__(self) -> int:
        return len(self._entries)

    @contextlib.contextmanager
    def use(self, ref: Any) -> Iterator[Any]:
        """Lend the object that `ref` refers to, loading it unless it is kept.

        A `Version` is known by its `binary()`, as a reference is.

        It is not idle before the end of the `with`. An error in loading reaches every user who
        waited for it, after a try of its own.
        """
        entry = self._take(ref.binary())
        try:
            with entry.loading:
                if not entry.loaded:
                    entry.loaded.append(self._load(ref))
                    entry.traces = traces(entry.loaded[0])
            yield entry.loaded[0]
        finally:
            with self._lock:
                entry.users -= 1
                entry.used_s = time.monotonic()

    def _take(self, key: bytes) -> _Entry:
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry()
            self._entries[key] = entry
            entry.users += 1
            while len(self._entries) > self._count:
                _, evicted = self._entries.popitem(last=False)
                self._dropped += evicted.traces
            if not self._sweeping:
                name = "ray_zerocopy.cache"
                sweeping = threading.Thread(target=self._sweep, name=name, daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads: the next use tries again
                    sweeping.start()
                    self._sweeping = True
        return entry

    def _sweep(self) -> None:
        """Drop what is idle until nothing is left."""
        kept = True
        while kept:
            time.sleep(self._idle_s / 8)
            dropped, kept = self._drop_idle()
            collect(dropped)

    def _drop_idle(self) -> tuple[list[Callable[[], object]], bool]:
        """Give the traces of what went since the last time, and whether anything is kept."""
        last_use_s = time.monotonic() - self._idle_s
        with self._lock:
            for key, entry in list(self._entries.items()):
                if entry.users == 0 and entry.used_s <= last_use_s:
                    del self._entries[key]
                    self._dropped += entry.traces
            dropped, self._dropped = self._dropped, []
            self._sweeping = bool(self._entries)
            return dropped, self._sweeping
