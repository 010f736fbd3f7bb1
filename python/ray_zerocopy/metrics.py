"""Metrics on Ray's Prometheus endpoint, as `ray_rzc_…`.

record ─ a list ─▶ a thread, a second later ─▶ ray.util.metrics

A load only appends to a list: each of Ray's counters costs 10 µs, and the first also an import. A
thread sets gauges again every few seconds: Ray 2.60 forgets gauges that were not set for 20 s.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
from collections import Counter
from contextvars import ContextVar
from typing import Any, Literal

import ray

from ray_zerocopy import _core

_FLUSH_S = 1.0
_REPEAT_S = 5.0
_KEPT = 10_000  # records, while no thread can start
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)

# Kind, description, tags; the unit is in the name.
_METRICS: dict[str, tuple[Literal["counter", "gauge", "histogram"], str, tuple[str, ...]]] = {
    "rzc_published_bytes": ("counter", "Bytes put into the store as blocks", ()),
    "rzc_loads": (
        "counter",
        "Objects loaded, by name and kind of pages",
        ("name", "held"),
    ),
    "rzc_load_seconds": ("histogram", "Seconds that a load took", ("name", "held")),
    "rzc_mapped_bytes": ("counter", "Bytes of blocks mapped by loads", ("held",)),
    "rzc_fallbacks": ("counter", "Loads and puts on a slower path, by reason", ("reason",)),
    "rzc_automatic": (
        "counter",
        "Objects with 100 KiB of tensors or more that `enable` met, by how they were stored",
        ("stored",),
    ),
    "rzc_versions": ("gauge", "Versions of published models, by name and state", ("name", "state")),
    "rzc_followers": ("gauge", "Processes that follow a published model", ("name",)),
    "rzc_rebuilds": ("counter", "Blocks of published models rebuilt, by reason", ("reason",)),
    "rzc_swap_seconds": (
        "histogram",
        "Seconds from a follower's notice of a new version to its use",
        ("name",),
    ),
}

LOADING = ContextVar("ray_zerocopy_loading", default="")
"""The published name of the object that is being loaded."""

_Series = tuple[str, tuple[str, ...]]  # a metric and its tags

_lock = threading.Lock()
_recorded: list[tuple[str, float, tuple[str, ...]]] = []
_flushing = False
_standing: dict[_Series, float] = {}
_repeating = False
_made: dict[str, Any] = {}


def record(metric: str, value: float = 1.0, *tags: str) -> None:
    """Count, set or observe a metric; `tags` are in the order of `_METRICS`."""
    global _flushing
    _recorded.append((metric, value, tags))
    if not _flushing:
        with _lock:
            if _flushing:
                return
            _flushing = True
        try:
            _thread.start_new_thread(_flush_later, ())  # `threading` waits until it runs: 0.1 ms
        except RuntimeError:  # thread limit: the next record tries again
            _flushing = False
            del _recorded[:-_KEPT]


def loaded(block: _core.Block, isolation: str, seconds: float) -> None:
    """Record a load of a block; `isolation` is the one that the caller asked for."""
    name, held = LOADING.get(), block.held
    record("rzc_loads", 1, name, held)
    record("rzc_load_seconds", seconds, name, held)
    record("rzc_mapped_bytes", memoryview(block).nbytes, held)
    if block.fallback and held != isolation:
        record("rzc_fallbacks", 1, f"pages {held}")


def _flush_later() -> None:
    global _flushing
    time.sleep(_FLUSH_S)
    _flushing = False
    flush()


def flush() -> None:
    """Give the records to Ray; drop them if this process is not connected."""
    global _repeating
    with _lock:
        recorded, _recorded[:] = _recorded[:], []
        if not ray.is_initialized():
            return
        counted: Counter[_Series] = Counter()
        changed: dict[_Series, float] = {}
        for metric, value, tags in recorded:
            kind = _METRICS[metric][0]
            if kind == "counter":
                counted[metric, tags] += value  # type: ignore[assignment]
            elif kind == "gauge":
                changed[metric, tags] = value
            else:
                _metric(metric).observe(value, _named(metric, tags))
        for (metric, tags), value in counted.items():
            if value > 0:
                _metric(metric).inc(value, _named(metric, tags))
        _standing.update(changed)
        _set(changed)
        if _standing and not _repeating:
            repeating = threading.Thread(target=_repeat, name="ray_zerocopy.gauges", daemon=True)
            with contextlib.suppress(RuntimeError):  # thread limit: the next flush tries again
                repeating.start()
                _repeating = True


def _in_child() -> None:
    """Begin anew in a forked child, which lacks the parent's threads."""
    global _lock, _flushing, _repeating
    _lock, _flushing, _repeating = threading.Lock(), False, False
    _recorded.clear()


os.register_at_fork(after_in_child=_in_child)


def _repeat() -> None:
    while True:
        time.sleep(_REPEAT_S)
        with _lock:
            if ray.is_initialized():
                _set(dict(_standing))


def _set(gauges: dict[_Series, float]) -> None:
    for (metric, tags), value in gauges.items():
        _metric(metric).set(value, _named(metric, tags))
        if not value:  # let Ray forget it
            del _standing[metric, tags]


def _named(metric: str, tags: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(_METRICS[metric][2], tags, strict=True))


def _metric(name: str) -> Any:
    if name not in _made:
        from ray.util import metrics  # noqa: PLC0415 - not on the path of the first load

        kind, told, keys = _METRICS[name]
        if kind == "histogram":
            _made[name] = metrics.Histogram(name, told, list(_SECONDS), keys)
        else:
            make = metrics.Counter if kind == "counter" else metrics.Gauge
            _made[name] = make(name, told, keys)
    return _made[name]
