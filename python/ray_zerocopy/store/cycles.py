"""What was loaded and dropped, but is held by a cycle: collected within seconds, and nothing else.

    load ─▶ its modules, by weak references ─┬─ gone ─────────────▶ forgotten
                                             ├─ held from outside ▶ looked at when 4 times as old
                                             └─ held from within ─▶ collected

A model in a cycle keeps its block in the store until a full collection, which a worker that has
nothing to do never makes.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
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

# A load is looked at after a second; if somebody holds it, again when it is so many times as old.
_LOOKS_S = 1.0
_TIMES_AS_OLD = 4

# The next load looks at as many before it: tasks in a row fill a store in less than a second.
_LATEST = 2

# Of a container, so many parts are looked at for objects to watch.
_PARTS = 64
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset)

# What leads everywhere, or holds nothing of Python's.
_ELSEWHERE = (type, types.ModuleType, types.FunctionType, torch.Tensor, np.ndarray)

_COLLECTING = threading.RLock()  # a collection that starts during another one does nothing


def traces(loaded: object) -> list[Weak]:
    """Give what shows whether any of an object that is to be dropped is still there."""
    roots = _weak(_inside(loaded))
    modules = [root for ref in roots if isinstance(root := ref(), torch.nn.Module)]
    return [*roots, *(weakref.ref(part) for module in modules for part in module.modules())]


def collect(dropped: Iterable[Weak]) -> None:
    """Collect what was dropped and is held by cycles, by its traces.

    Only what can be reached from there is judged, in milliseconds; a full collection takes 200 to
    500 where torch and transformers are imported, and stops all threads.
    """
    with _COLLECTING:
        if parts := _reachable(dropped):
            _core.collect(parts)


def _reachable(weak: Iterable[Weak]) -> list[object]:
    """Give the objects that can be reached from some, and that the collector knows of."""
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
    """Have an object that was just loaded collected when cycles alone hold it.

    `modules` are those that the load has made. The caller holds the object by one name.
    """
    if isinstance(loaded, _CONTAINERS):
        roots = [(ref, _count(ref) - 1) for ref in _weak(_inside(loaded))]
    else:
        within = sys.getrefcount(loaded) - _HELD_MEANWHILE
        roots = [(ref, within) for ref in _weak([loaded])]
    if roots or modules:
        _WATCH.add(_Loaded(roots, modules))


def look() -> None:
    """Collect what was loaded just before and is held by cycles alone."""
    _WATCH.look(_LATEST)


def _inside(loaded: object) -> Iterator[object]:
    """Give an object, or those in a container and in containers inside, to some depth."""
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
    """Refer to those of some objects that can be in a cycle and be referred to."""
    weak: list[Weak] = []
    for part in parts:
        if gc.is_tracked(part) and not isinstance(part, _ELSEWHERE):
            with contextlib.suppress(TypeError):
                weak.append(weakref.ref(part))
    return weak


def _count(ref: Weak) -> int:
    """Count references to an object; the same for the same ones, whatever else that counts."""
    part = ref()
    return sys.getrefcount(part) if part is not None else 0


class _Nothing:
    """An object without references from within."""


def _held_meanwhile() -> int:
    """Tell how much more is counted of an object in `watch` than when nobody holds it."""

    def counted(loaded: object) -> int:
        return sys.getrefcount(loaded)

    loaded = _Nothing()
    meanwhile, ref, holder = counted(loaded), weakref.ref(loaded), [loaded]
    del loaded
    return meanwhile - (_count(ref) - len(holder))


_HELD_MEANWHILE = _held_meanwhile()


class _Loaded:
    """What one load has made, by weak references."""

    def __init__(self, roots: list[tuple[Weak, int]], modules: _core.Modules) -> None:
        self.roots = roots  # each with its references from within
        self.modules = modules
        self.made_s = time.monotonic()
        self.due_s = self.made_s + _LOOKS_S
        self.in_vain: list[int] | None = None  # references when it was collected, and stayed

    def is_gone(self) -> bool:
        return all(root() is None for root, _ in self.roots) and self.modules.are_gone()

    def is_dropped(self) -> bool:
        """Tell whether nothing from outside refers to it, as far as counts show, and once only."""
        counts = [_count(root) for root, _ in self.roots]
        if any(count > within for count, (_, within) in zip(counts, self.roots, strict=True)):
            return False
        known, self.in_vain = self.in_vain, counts
        return counts != known

    def is_due(self, now_s: float) -> bool:
        """Tell whether it is time to look, whatever counts show, and once only."""
        if now_s < self.due_s:
            return False
        self.due_s = self.made_s + _TIMES_AS_OLD * (now_s - self.made_s)
        return True


class _Watch:
    """Looks at what was loaded, on a thread that runs while something of it is there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: list[_Loaded] = []
        self._thread: threading.Thread | None = None

    def add(self, loaded: _Loaded) -> None:
        with self._lock:
            self._loaded.append(loaded)
            if self._thread is None or not self._thread.is_alive():  # as after a fork
                self._thread = threading.Thread(target=self._run, name="rzc.cycles", daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads: the next one tries
                    self._thread.start()

    def look(self, latest: int = 0) -> None:
        """Collect what is held by cycles alone, of the latest loads or of all."""
        if not self._loaded:
            return
        with self._lock:
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
            with self._lock:
                self._loaded = [loaded for loaded in self._loaded if not loaded.is_gone()]
                empty_s = 0.0 if self._loaded else empty_s + _LOOKS_S
                if empty_s >= 10 * _LOOKS_S:
                    self._thread = None


_WATCH = _Watch()
