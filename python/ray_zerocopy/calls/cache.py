"""A process's small cache of loaded objects.

call ── use(ref) ──▶ cached? ──▶ the object, at once
                        └ no ──▶ load, once for all threads that ask
idle for 5 s, or one too many ──▶ drop it, and release its pages to the store
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
    loaded: list[Any] = field(default_factory=list)  # the object, once loaded
    traces: list[Callable[[], object]] = field(default_factory=list)
    users: int = 0
    used_s: float = 0.0


class Cache:
    """Loaded objects by reference: at most `count`, each until `idle_s` seconds after its last use.

    The cache keeps only ids, not references, so an object's owner sees no borrower here. The loaded
    object holds its pages. A thread, which runs only while the cache is not empty, drops idle
    objects and collects cycles that hold dropped ones: an idle process would never do so.

    The cache is thread-safe. While one thread loads an object, only threads that want the same
    object wait.
    """

    def __init__(
        self, load: Callable[[Any], Any] = ray.get, count: int = _COUNT, idle_s: float = _IDLE_S
    ) -> None:
        self._load = load
        self._count = count
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # most recently used last
        self._sweeping = False
        self._dropped: list[Callable[[], object]] = []  # traces of those since the last sweep

    def __len__(self) -> int:
        return len(self._entries)

    @contextlib.contextmanager
    def use(self, ref: Any) -> Iterator[Any]:
        """Lend the object of `ref`, a reference or a `Version`; load it unless it is cached.

        It is not idle before the end of the `with`. After a load fails, each waiting thread tries
        again, and gets the error of its own try.
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
                with contextlib.suppress(RuntimeError):  # thread limit: the next use tries again
                    sweeping.start()
                    self._sweeping = True
        return entry

    def _sweep(self) -> None:
        """Drop idle objects until the cache is empty."""
        kept = True
        while kept:
            time.sleep(self._idle_s / 8)
            dropped, kept = self._drop_idle()
            collect(dropped)

    def _drop_idle(self) -> tuple[list[Callable[[], object]], bool]:
        """Return the traces of objects dropped since the last call, and whether any is left."""
        last_use_s = time.monotonic() - self._idle_s
        with self._lock:
            for key, entry in list(self._entries.items()):
                if entry.users == 0 and entry.used_s <= last_use_s:
                    del self._entries[key]
                    self._dropped += entry.traces
            dropped, self._dropped = self._dropped, []
            self._sweeping = bool(self._entries)
            return dropped, self._sweeping
