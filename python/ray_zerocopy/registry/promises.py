"""Long poll for followers: each name has one promise, an object that all its followers wait for.

    catalog ─ calls itself ═▶ promise ══ Ray ══▶ each follower: the version, and the next promise

The catalog computes a change once, and Ray's own threads answer the followers. An answer has the
address of a block, not a reference: a follower that hangs and then gets all missed versions would
keep their blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from ray_zerocopy import metrics
from ray_zerocopy.registry.records import Version
from ray_zerocopy.store.ray_inside import Address, address_of

BEAT_S = 30.0  # each follower calls at least this often
_MISSED_S = 1.5 * BEAT_S  # then the catalog drops it

# An answer to a follower: the turn, which grows with each change, also across catalog restarts; the
# current version and the address of its block; and the next promise.
Told = tuple[int, Version, Address | None, list[ray.ObjectRef]]


class Promises:
    """Knows which process follows which names; `current` returns a name's version, or None."""

    def __init__(self, current: Callable[[str], Version | None], me: Any) -> None:
        self._current = current
        self._me = me
        self._last = 0
        self._turns: dict[int, asyncio.Future[Told | None]] = {}
        self._promised: dict[str, tuple[int, ray.ObjectRef]] = {}  # turns and promises by name
        self._following: dict[str, list[str]] = {}  # names by follower
        self._missed: dict[str, asyncio.TimerHandle] = {}  # by follower

    @property
    def processes(self) -> int:
        """The number of processes that follow anything."""
        return len(self._following)

    def followers(self) -> Counter[str]:
        """Count the processes that follow each name."""
        return Counter(name for names in self._following.values() for name in names)

    def follow(self, follower: str, names: list[str]) -> dict[str, Told]:
        """Record which names a process follows, for `_MISSED_S`; return their current versions."""
        if missed := self._missed.pop(follower, None):
            missed.cancel()
        self._note(follower, names)
        loop = asyncio.get_running_loop()
        self._missed[follower] = loop.call_later(_MISSED_S, self._note, follower, [])
        told = {name: self._told(name) for name in names}
        return {name: each for name, each in told.items() if each is not None}

    def keep(self, name: str) -> None:
        """Keep a name's promise: tell all its followers the new version."""
        if name not in self._promised or self._current(name) is None:
            return
        turn, _ = self._promised.pop(name)
        self._turns[turn].set_result(self._told(name) if self.followers()[name] else None)

    async def turn(self, turn: int) -> Told | None:
        """Wait for a turn; returns None if no process follows that name any more."""
        told = await self._turns[turn]
        del self._turns[turn]
        return told

    def _told(self, name: str) -> Told | None:
        version = self._current(name)
        if version is None:
            return None
        if name not in self._promised:
            self._last = max(self._last + 1, time.time_ns())
            self._turns[self._last] = asyncio.get_running_loop().create_future()
            self._promised[name] = self._last, self._me.turn.remote(self._last)
        turn, promise = self._promised[name]
        place = None if version.ref is None else address_of(version.ref)
        return turn, replace(version, ref=None), place, [promise]

    def _note(self, follower: str, names: list[str]) -> None:
        """Record which names a process follows; none if it has not called for a while."""
        before = self._following.pop(follower, [])
        if names:
            self._following[follower] = names
        else:
            self._missed.pop(follower, None)
        if before != names:
            followers = self.followers()
            for name in {*before, *names}:
                metrics.record("rzc_followers", followers[name], name)
