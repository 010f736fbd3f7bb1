"""Keep Python's cyclic collector out of a walk over a model."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

# Python 3.12 itself starts with 375 frozen objects; code that freezes does it to tens of thousands.
_FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the cyclic collector out of a walk over thousands of live objects.

    A full collection takes 200 ms in a process with torch and transformers. Objects made here go
    straight to the oldest generation, where they would end up: a young collection of a model, at
    the next allocation, takes half as long as its load. Collect generation 0 first, so that young
    garbage is not promoted with the model. Generation 1 would take 1.2 to 1.9 ms more just after a
    worker's imports: as long as the load.
    """
    if not gc.isenabled():
        yield
        return
    thaws = not _others_froze()  # keep frozen what other code froze
    if thaws:
        gc.collect(0)
        _MOVED.add(len(gc.get_objects(generation=1)))
    with _QUIET:
        yield
        if thaws:
            gc.freeze()
            gc.unfreeze()


def _others_froze() -> bool:
    """Whether other code has frozen objects. Cached if so: Python takes milliseconds to count."""
    global _FROZEN
    _FROZEN = _FROZEN or gc.get_freeze_count() >= _FROZEN_BY_PYTHON
    return _FROZEN


_FROZEN = False


class _Moved:
    """Count objects of other code that loads promote, and collect the oldest generation for them.

    `gc.freeze` resets Python's own counts: in a process that loads again and again, Python would
    never collect the oldest generation. The bound is about Python's own: a quarter of the live
    objects in a process with torch. (Python 3.11 to 3.13)
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
    """While any thread is inside, no automatic collection starts.

    It sets the threshold, because another thread may call `gc.disable` for its own reasons.
    """

    _NEVER = 2**31 - 3  # allocations; a number that no other code uses

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
            self._inside = max(0, self._inside - 1)  # 0 if it was forked inside
            self._end_unless_inside()

    def in_child(self) -> None:
        """End it in a forked child, which lacks the threads that were inside."""
        self._lock, self._inside = threading.Lock(), 0
        self._end_unless_inside()

    def _end_unless_inside(self) -> None:
        if not self._inside and gc.get_threshold()[0] == self._NEVER:
            gc.set_threshold(*self._before)


_QUIET = _Quiet()
os.register_at_fork(after_in_child=_QUIET.in_child)
