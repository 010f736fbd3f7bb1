"""Send a block to every node once; nodes that have it send it to the others.

    wave 1   A ─▶ B                       as many transfers at a time as nodes have the block, so
    wave 2   A ─▶ C    B ─▶ D             that their number doubles; a finished transfer starts the
    wave 3   A ─▶ E    B ─▶ F  …          next at once

Simultaneous cold gets form a star: all nodes pull from the one known location.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_zerocopy.errors import LostVersionError
from ray_zerocopy.registry.publication import find_rebuilt
from ray_zerocopy.store.ray_inside import INLINE_NBYTES, located
from ray_zerocopy.store.references import bases_in, refuse_client

# A transfer slower than this multiple of the median continues, but no longer counts as running.
_SLOW = 3.0
_PATIENCE_S = 2.0
_LOCATED_S = 60.0


def prefetch(
    ref_or_name: ray.ObjectRef | str,
    nodes: Collection[str] | None = None,
    *,
    timeout: float = 600.0,
) -> dict[str, float | None]:
    """Send a block to every node of the cluster, or to these, once each, and wait.

    The first load there then finds it. A node that joins later fetches it at its first load. The
    nodes get copies, which they may drop when their store is full. Of a variant, the blocks of its
    bases are sent, too.

    Args:
        ref_or_name: a reference from `put`, or the name of a published model (sends its current
            version).
        nodes: ids of nodes, as in `ray.nodes()`; default: all.
        timeout: seconds for one transfer; a slow node delays no other.

    Returns:
        Seconds by node: 0.0 if the node had the block already; None for a node that died, took too
        long, or has no room for it.

    Raises:
        ValueError: no live node has a given id.
        UnknownVersionError: nothing is published under that name.
        LostVersionError: no node has the block, or that of a base.

    """
    refuse_client()
    ref = _reference(ref_or_name, timeout)
    stores = _stores()
    wanted = stores if nodes is None else nodes
    if unknown := set(wanted) - set(stores):
        raise ValueError(f"no live node has the id {sorted(unknown)}; nodes: {sorted(stores)}")
    seconds = _send(ref, wanted, timeout, ref_or_name)
    have = [node for node, took in seconds.items() if took is not None]
    for base in _bases(ref, have, timeout):
        took = _send(base, have, timeout, f"a base of {ref_or_name}")
        seconds = {node: _sum(seconds[node], took.get(node)) for node in seconds}
    return seconds


def _stores() -> dict[str, float]:
    """Return the bytes of each live node's store."""
    return {
        node["NodeID"]: node["Resources"].get("object_store_memory", 0)
        for node in ray.nodes()
        if node["Alive"]
    }


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _bases(ref: ray.ObjectRef, have: list[str], timeout: float) -> list[ray.ObjectRef]:
    """Return the bases of an object that these nodes have; if not this one, by a task there."""
    if not have:
        return []
    if ray.get_runtime_context().get_node_id() in have or not located(ref, _LOCATED_S)[0]:
        return bases_in(ref)
    there = NodeAffinitySchedulingStrategy(have[0], soft=False)
    asked = _bases_there.options(scheduling_strategy=there).remote([ref])
    try:
        found: list[ray.ObjectRef] = ray.get(asked, timeout=timeout)
    except ray.exceptions.RayError:  # the node died: others load without a prefetch
        return []
    return found


def _send(
    ref: ray.ObjectRef, wanted: Collection[str], timeout: float, what: Any
) -> dict[str, float | None]:
    """Send one block."""
    stores = _stores()
    ray.wait([ref], timeout=timeout, fetch_local=False)  # until the object exists
    holders, nbytes = located(ref, _LOCATED_S)
    if not holders and nbytes <= INLINE_NBYTES:
        return dict.fromkeys(wanted, 0.0)  # Ray sends it with the reference
    if not holders:
        raise LostVersionError(f"no node has the block of {what}: put or publish it again")
    seconds: dict[str, float | None] = dict.fromkeys(wanted)
    seconds.update((node, 0.0) for node in wanted if node in holders)
    waiting = deque(
        node for node in wanted if node not in holders and stores.get(node, 0) >= nbytes
    )
    _Waves(ref, len(holders), seconds, timeout).send(waiting)
    return seconds


def _reference(ref_or_name: ray.ObjectRef | str, timeout: float) -> ray.ObjectRef:
    if not isinstance(ref_or_name, str):
        return ref_or_name
    ref: ray.ObjectRef = find_rebuilt(ref_or_name, None, timeout).ref
    return ref


class _Waves:
    def __init__(
        self, ref: ray.ObjectRef, holders: int, seconds: dict[str, float | None], timeout: float
    ) -> None:
        self._ref = ref
        self._holders = holders
        self._seconds = seconds
        self._timeout = timeout
        self._running: dict[ray.ObjectRef, tuple[str, float]] = {}  # node, and when it started

    def send(self, waiting: deque[str]) -> None:
        while waiting or self._running:
            while waiting and self._in_time() < self._holders:
                self._start(waiting.popleft())
            done, _ = ray.wait(list(self._running), timeout=_PATIENCE_S / 4)
            for answer in done:
                node, _ = self._running.pop(answer)
                self._seconds[node] = _seconds(answer)
                self._holders += self._seconds[node] is not None
            now_s = time.monotonic()
            late = (
                a for a, (_, start_s) in self._running.items() if now_s > start_s + self._most()
            )
            for answer in list(late):
                ray.cancel(answer, force=True)
                del self._running[answer]

    def _start(self, node: str) -> None:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        answer = _fetch.options(scheduling_strategy=strategy).remote([self._ref], self._timeout)
        self._running[answer] = node, time.monotonic()

    def _in_time(self) -> int:
        """Count the transfers that are not slow, so that a dying node does not delay others."""
        took = [seconds for seconds in self._seconds.values() if seconds]
        patience_s = max(_PATIENCE_S, _SLOW * statistics.median(took)) if took else self._timeout
        since_s = time.monotonic() - patience_s
        return sum(start_s > since_s for _, start_s in self._running.values())

    def _most(self) -> float:
        return self._timeout + _LOCATED_S  # for a worker to start


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _fetch(refs: list[ray.ObjectRef], timeout: float) -> float | None:
    """Make this node fetch an object without unpickling it; returns the seconds."""
    start = time.perf_counter()
    ready, _ = ray.wait(refs, timeout=timeout, fetch_local=True)
    return time.perf_counter() - start if ready else None


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _bases_there(refs: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
    return bases_in(refs[0])


def _seconds(answer: ray.ObjectRef) -> float | None:
    try:
        took: float | None = ray.get(answer)
    except ray.exceptions.RayError:
        return None
    return took
