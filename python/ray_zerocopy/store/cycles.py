"""Collect dropped models that a cycle keeps alive, within seconds, and nothing else.

    load ─▶ weak references to its modules ─┬─ gone ─────────────▶ forget
                                            ├─ held from outside ▶ check again when 4 times as old
                                            └─ held from within ─▶ collect

A model in a cycle keeps its block in the store until a full collection. An idle worker never runs
one.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
import sys
import threading
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from ray_zerocopy import _core

Weak = Callable[[], object]

# Check a load after one second; if something holds it, again when it is so many times as old.
_LOOKS_S = 1.0
_TIMES_AS_OLD = 4

# Each load checks so many loads before it: tasks in a row can fill a store within a second.
_LATEST = 2

# Search at most so many parts of a container for objects to watch.
_PARTS = 64
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset)

# Types whose objects lead everywhere, or hold no Python objects.
_ELSEWHERE = (type, types.ModuleType, types.FunctionType, torch.Tensor, np.ndarray)

_COLLECTING = threading.RLock()  # Python ignores a collection that starts during another one


def traces(loaded: object) -> list[Weak]:
    """Return weak references that show whether any part of a dropped object is still alive."""
    roots = _weak(_inside(loaded))
    modules = [root for ref in roots if isinstance(root := ref(), torch.nn.Module)]
    return [*roots, *(weakref.ref(part) for module in modules for part in module.modules())]


def collect(dropped: Iterable[Weak]) -> None:
    """Collect dropped objects that only cycles hold, given their traces.

    It examines only objects reachable from there, in milliseconds. A full collection takes 200 to
    500 ms with torch and transformers imported, and stops all threads.
    """
    with _COLLECTING:
        if parts := _reachable(dropped):
            _core.collect(parts)


def _reachable(weak: Iterable[Weak]) -> list[object]:
    """Return all objects reachable from these that the collector tracks."""
    level = {id(part): part for ref in weak if (part := ref()) is not None}
    found: dict[int, object] = {}
    while level:
        found |= level
        functions = (part for part in level.values() if isinstance(part, types.FunctionType))
        namespaces = {id(vars(builtins)), *(id(function.__globals__) for function in functions)}
        level = {
            id(part): part
            for part in gc.get_referents(*level.values())
            if gc.is_tracked(part)
            and id(part) not in found
            and id(part) not in namespaces
            and not issubclass(type(part), (type, types.ModuleType))
        }
    return list(found.values())


def watch(loaded: object, modules: _core.Modules) -> None:
    """Collect a just loaded object as soon as only cycles hold it.

    `modules` are the modules that the load made. The caller holds the object by exactly one name.
    """
    if isinstance(loaded, _CONTAINERS):
        roots = [(ref, _count(ref) - 1) for ref in _weak(_inside(loaded))]
    else:
        within = sys.getrefcount(loaded) - _HELD_MEANWHILE
        roots = [(ref, within) for ref in _weak([loaded])]
    if roots or modules:
        _WATCH.add(_Loaded(roots, modules))


def look() -> None:
    """Collect those of the latest loads that only cycles hold."""
    _WATCH.look(_LATEST)


def _inside(loaded: object) -> Iterator[object]:
    """Yield an object, or the first objects in a container and the containers inside it."""
    level, left = [loaded], _PARTS
    while level and left > 0:
        inner: list[object] = []
        for part in level[:left]:
            if not isinstance(part, _CONTAINERS):
                yield part
            else:
                inner += part.values() if isinstance(part, dict) else part
        level, left = inner, left - len(level)


def _weak(parts: Iterable[object]) -> list[Weak]:
    """Return weak references to those objects that can be in a cycle and allow them."""
    weak: list[Weak] = []
    for part in parts:
        if gc.is_tracked(part) and not isinstance(part, _ELSEWHERE):
            with contextlib.suppress(TypeError):
                weak.append(weakref.ref(part))
    return weak


def _count(ref: Weak) -> int:
    """Return an object's refcount plus a constant: the references of this function itself."""
    part = ref()
    return sys.getrefcount(part) if part is not None else 0


class _Nothing:
    """An object without references from within."""


def _held_meanwhile() -> int:
    """Return how much higher the refcount in `watch` is than `_count` of an unheld object."""

    def counted(loaded: object) -> int:
        return sys.getrefcount(loaded)

    loaded = _Nothing()
    meanwhile, ref, holder = counted(loaded), weakref.ref(loaded), [loaded]
    del loaded
    return meanwhile - (_count(ref) - len(holder))


_HELD_MEANWHILE = _held_meanwhile()


class _Loaded:
    """Weak references to the objects of one load."""

    def __init__(self, roots: list[tuple[Weak, int]], modules: _core.Modules) -> None:
        self.roots = roots  # each with its number of references from within
        self.modules = modules
        self.made_s = time.monotonic()
        self.due_s = self.made_s + _LOOKS_S
        self.in_vain: list[int] | None = None  # refcounts at a collection that it survived

    def is_gone(self) -> bool:
        return all(root() is None for root, _ in self.roots) and self.modules.are_gone()

    def is_dropped(self) -> bool:
        """Whether, by refcounts, nothing outside refers to it; True only once for equal counts."""
        counts = [_count(root) for root, _ in self.roots]
        if any(count > within for count, (_, within) in zip(counts, self.roots, strict=True)):
            return False
        known, self.in_vain = self.in_vain, counts
        return counts != known

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to collect it whatever the counts are; True only once per interval."""
        if now_s < self.due_s:
            return False
        self.due_s = self.made_s + _TIMES_AS_OLD * (now_s - self.made_s)
        return True


class _Watch:
    """Check loaded objects, on a thread that runs while any of them is alive."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._loaded: list[_Loaded] = []
        self._thread: threading.Thread | None = None

    def add(self, loaded: _Loaded) -> None:
        with self.lock:
            self._loaded.append(loaded)
            if self._thread is None or not self._thread.is_alive():  # as after a fork
                self._thread = threading.Thread(target=self._run, name="rzc.cycles", daemon=True)
                with contextlib.suppress(RuntimeError):  # thread limit: the next load tries again
                    self._thread.start()

    def look(self, latest: int = 0) -> None:
        """Collect those of the latest loads, or of all, that only cycles hold."""
        if not self._loaded:
            return
        with self.lock:
            looked_at = self._loaded[-latest:]
        now_s = time.monotonic()
        collect(
            part
            for loaded in looked_at
            if not loaded.is_gone()
            and (loaded.is_dropped() or (not latest and loaded.is_due(now_s)))
            for part in (*loaded.modules.refs(), *(root for root, _ in loaded.roots))
        )

    def _run(self) -> None:
        empty_s = 0.0
        while empty_s < 10 * _LOOKS_S:
            time.sleep(_LOOKS_S)
            self.look()
            with self.lock:
                self._loaded = [loaded for loaded in self._loaded if not loaded.is_gone()]
                empty_s = 0.0 if self._loaded else empty_s + _LOOKS_S
                if empty_s >= 10 * _LOOKS_S:
                    self._thread = None


_WATCH = _Watch()


def _in_child() -> None:
    """Replace the locks in a forked child: threads of the parent may hold them."""
    global _COLLECTING
    _COLLECTING, _WATCH.lock = threading.RLock(), threading.Lock()


os.register_at_fork(after_in_child=_in_child)
