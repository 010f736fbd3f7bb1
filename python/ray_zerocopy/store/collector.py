"""Python's cyclic collector, kept out of a walk over a model."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

# Python 3.12 starts with 375 objects frozen, for nobody; who freezes does it to tens of thousands.
_FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the cyclic collector out of a walk over thousands of objects that all live.

    A full collection takes 200 ms in a process with torch and transformers. What is made in here
    goes straight to the oldest generation, where it would end up: a young collection of a model, at
    the next allocation, takes as long as half of its load. Garbage of others that is not older than
    the last young collection is collected before. To collect the middle generation, too, takes
    1.2 to 1.9 ms where all of a worker's imports have just gone through it: as long as the load.
    """
    if not gc.isenabled():
        yield
        return
    thaws = not _others_froze()  # what someone froze is to stay frozen
    if thaws:
        gc.collect(0)
        _MOVED.add(len(gc.get_objects(generation=1)))
    with _QUIET:
        yield
        if thaws:
            gc.freeze()
            gc.unfreeze()


def _others_froze() -> bool:
    """Whether someone has frozen objects. Yes is for good: Python counts them one by one, in ms."""
    global _FROZEN
    _FROZEN = _FROZEN or gc.get_freeze_count() >= _FROZEN_BY_PYTHON
    return _FROZEN


_FROZEN = False


class _Moved:
    """Counts what others had that loads moved to the oldest generation, and has that collected.

    `gc.freeze` starts Python's own counts anew: in a process that loads again and again Python
    would never collect the oldest generation, whatever became garbage there. The bound is about
    Python's own, a quarter of what lives in a process with torch. (Python 3.11 to 3.13)
    """

    _MOST = 100_000

    def __init__(self) -> None:
        self._count = 0

    def add(self, count: int) -> None:
        self._count += count
        if self._count > self._MOST:
            self._count = 0
            gc.collect()


_MOVED = _Moved()


class _Quiet:
    """While any thread is in here, no collection starts by itself.

    The threshold says so, not `gc.disable`: another thread may call that meanwhile, and mean it.
    """

    _NEVER = 2**31 - 3  # allocations; nobody else asks for just this many

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = gc.get_threshold()
                gc.set_threshold(self._NEVER, *self._before[1:])
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and gc.get_threshold()[0] == self._NEVER:
                gc.set_threshold(*self._before)


_QUIET = _Quiet()
