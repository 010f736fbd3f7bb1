"""Followers wait here: one call a process, which ends when a name stands for another version."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable

from ray_zerocopy import metrics
from ray_zerocopy.registry.records import Version

_MISSED_S = 15.0  # after which a process that does not call any more follows nothing


class Polls:
    """Who waits for which names; `current` gives what a name stands for, or None."""

    def __init__(self, current: Callable[[str], Version | None]) -> None:
        self._current = current
        self._calls: dict[str, asyncio.Future[None]] = {}  # by follower
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)  # by name
        self._following: dict[str, list[str]] = {}  # names by follower
        self._missed: dict[str, asyncio.TimerHandle] = {}  # by follower

    @property
    def processes(self) -> int:
        """How many processes follow anything."""
        return len(self._following)

    def followers(self) -> Counter[str]:
        """Count the processes that follow each name."""
        return Counter(name for names in self._following.values() for name in names)

    async def wait(self, follower: str, seen: dict[str, int], wait_s: float) -> dict[str, Version]:
        """Wait until a name stands for another number than was seen; give what those stand for.

        A follower's new call ends its last one.
        """
        loop = asyncio.get_running_loop()
        if last := self._calls.pop(follower, None):
            last.cancel()
        if missed := self._missed.pop(follower, None):
            missed.cancel()
        self._note(follower, list(seen))
        call = self._calls[follower] = loop.create_future()
        for name in seen:
            self._waiting[name].add(call)
        if not self._changed(seen):
            await asyncio.wait([call], timeout=wait_s)
        for name in seen:
            self._waiting[name].discard(call)
        if self._calls.get(follower) is call:
            del self._calls[follower]
            self._missed[follower] = loop.call_later(_MISSED_S, self._note, follower, [])
        return self._changed(seen)

    def wake(self, name: str) -> None:
        """Answer those who wait for a name."""
        for call in self._waiting[name]:
            if not call.done():
                call.set_result(None)

    def _changed(self, seen: dict[str, int]) -> dict[str, Version]:
        current = {name: self._current(name) for name in seen}
        return {
            name: version
            for name, version in current.items()
            if version is not None and version.number != seen[name]
        }

    def _note(self, follower: str, names: list[str]) -> None:
        """Note what a process follows: nothing, where it has not called for a while."""
        before = self._following.pop(follower, [])
        if names:
            self._following[follower] = names
        else:
            self._missed.pop(follower, None)
        if before != names:
            followers = self.followers()
            for name in {*before, *names}:
                metrics.record("rzc_followers", followers[name], name)
