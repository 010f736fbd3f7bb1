"""Track the blocks of live versions, and rebuild lost ones.

    the owner died ──────────────────────▶ current versions, and those that do not heal ┐
    a process cannot load it ─ check ────▶ that version ────────────────────────────────┤
    a process asks for it, with no block ▶ that version ────────────────────────────────┤
                                                                                        ▼
                                    make by its plan, or copy from a process that has it mapped

Rebuilds run in parallel, each within its version's time limit. If there are many, a few start at a
time, and a slow one does not delay the others. After a rebuild, the record is read again: versions
that were retired or have a block meanwhile do not change.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import ray

from ray_zerocopy import metrics
from ray_zerocopy.errors import LostVersionError
from ray_zerocopy.registry.manifest import Manifest
from ray_zerocopy.registry.owner import AnotherModelError, Made, cause_of
from ray_zerocopy.registry.records import Kept, Key, Plan, Record, Source
from ray_zerocopy.store.ray_inside import address_of, reference_at

logger = logging.getLogger(__name__)

_WATCH_S = 30.0
_AGAIN_S = 0.2
_AT_ONCE = 4  # processes that import torch and read weights at the same time
_STARTED_S = 10.0  # then the next rebuild may start


class Healing:
    """Knows which blocks of live versions the owner holds; `staged` returns the staged tokens."""

    def __init__(self, manifest: Manifest, owner: Any, staged: Callable[[], Iterable[str]]) -> None:
        self._manifest = manifest
        self._owner = owner
        self._staged = staged
        self.incarnation = ""  # of the owner; empty if it may be dead
        self._blocks: dict[str, ray.ObjectRef] = {}
        self._making: dict[Key, asyncio.Task[None]] = {}
        self._checking: dict[tuple[str, str], asyncio.Task[bool]] = {}
        self._again_as: set[str] = set()  # rebuilt blocks that are not in a record yet
        self._starting = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.rebuilds: Counter[str] = Counter()

    # --- what the owner holds -----------------------------------------------------------------

    def block(self, kept: Kept) -> ray.ObjectRef | None:
        """Return the block of a version, or None."""
        return self._blocks.get(kept.block)

    def have(self, block: str, made: Made) -> None:
        """Record a block that the owner holds."""
        if made.ref is not None:
            self._blocks[block] = made.ref

    def drop(self, blocks: Iterable[str]) -> None:
        """Drop blocks, or stop making them; only after no stored record needs them."""
        gone = list(blocks)
        for block in gone:
            self._blocks.pop(block, None)
        if gone:
            self._owner.drop.remote(gone)

    def changed(self, name: str, before: Record, after: Record) -> None:
        """Drop the blocks that a written change of a record no longer needs."""
        for number in before.live.keys() - after.live.keys():
            if making := self._making.get((name, number)):
                making.cancel()
        self.drop(_blocks(before) - _blocks(after))

    async def recover(self, lease_s: float) -> None:
        """Find the blocks that the owner still holds, and rebuild the others.

        Blocks without a record stay for `lease_s`: publishers may repeat their requests to this
        new catalog and claim them.
        """
        held = await self._ask_owner()
        self._start(self._drop_unclaimed(held, lease_s))
        self._start(self._watch())

    async def _ask_owner(self) -> list[str]:
        """Replace the known blocks by those that the owner holds; return all its tokens."""
        self.incarnation, held = await self._ask("held")
        live = self._live_blocks()
        self._blocks = {block: ref for block, ref in held.items() if ref and block in live}
        self._restore()
        return list(held)

    async def _ask(self, method: str, *args: Any) -> Any:
        """Call the owner; repeat the call while it restarts."""
        while True:
            try:
                return await getattr(self._owner, method).remote(*args)
            except ray.exceptions.RayActorError:
                self.incarnation = ""
                await asyncio.sleep(_AGAIN_S)

    async def _drop_unclaimed(self, held: list[str], lease_s: float) -> None:
        await asyncio.sleep(lease_s)
        self.drop(set(held) - self._live_blocks() - set(self._staged()))

    async def _watch(self) -> None:
        """Notice if the owner dies, and drop blocks that dead publishers left there."""
        unclaimed: set[str] = set()
        while True:
            held: list[str] | None = await self._ask("watch", self.incarnation, _WATCH_S)
            if held is None:
                await self._ask_owner()
                continue
            now = set(held) - self._live_blocks() - set(self._staged()) - self._again_as
            self.drop(unclaimed & now)
            unclaimed = now

    def _live_blocks(self) -> set[str]:
        return set().union(*map(_blocks, self._manifest.records.values()))

    # --- rebuilds -----------------------------------------------------------------------------

    def again(self, key: Key, reason: str) -> asyncio.Task[None]:
        """Rebuild the block of a live version; callers share one task.

        The task raises `LostVersionError`; it is cancelled if the version is retired meanwhile.
        """
        making = self._making.get(key)
        if making is None:
            name, number = key
            kept = self._manifest.record(name).live[number]
            making = self._making[key] = self._start(self._again(key, kept, reason))
            making.add_done_callback(lambda _: self._making.pop(key))
        return making

    def _restore(self) -> None:
        """Rebuild current versions and those that do not heal; others only on request."""
        wanted = [
            (name, number)
            for name, record in self._manifest.records.items()
            for number, kept in record.live.items()
            if kept.block not in self._blocks and (number == record.number or not kept.plan.heals)
        ]
        records = self._manifest.records
        for key in sorted(wanted, key=lambda key: records[key[0]].kept[key[1]].plan.heals):
            self._start(self._in_turn(key))

    async def _in_turn(self, key: Key) -> None:
        async with self._starting:
            if not self._live([key]) or self._block_of(key) is not None:
                return
            making = self.again(key, "owner lost")
            await asyncio.wait([making], timeout=_STARTED_S)

    async def _again(self, key: Key, kept: Kept, reason: str) -> None:
        name, number = key
        block = uuid.uuid4().hex

        def is_as_it_was(record: Record) -> bool:
            return number in record.live and record.kept[number].block == kept.block

        self._again_as.add(block)
        try:
            made = await self._made(block, kept, is_as_it_was)
            self.have(block, made)
            place, uses = address_of(made.ref), self._manifest.uses(made.bases)
            after = await self._manifest.change(
                name,
                lambda record: (
                    record.rebuilt(number, block, place, made.nbytes, uses)
                    if is_as_it_was(record)
                    else record
                ),
            )
        except BaseException:
            self.drop([block])
            raise
        finally:
            self._again_as.discard(block)
        if block not in _blocks(after):
            self.drop([block])
            return
        self.rebuilds[reason] += 1
        metrics.record("rzc_rebuilds", 1, reason)

    async def _made(self, block: str, kept: Kept, is_as_it_was: Callable[[Record], bool]) -> Made:
        """Make a block by its plan, or else copy it from a process that has it mapped."""
        name, number, digest = kept.version.name, kept.version.number, kept.version.digest
        failed = None
        if kept.plan.heals:
            try:
                bases = await self._bases(kept.plan)
                made: Made = await self._ask("make", block, name, kept.plan, digest, bases)
                return made
            except ray.exceptions.RayError as error:
                failed = cause_of(error)
            if isinstance(failed, AnotherModelError):
                await self._manifest.change(
                    name,
                    lambda record: record.unhealing(number) if is_as_it_was(record) else record,
                )
        lost = [reference_at(place) for place in kept.places]
        nodes = [node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
        try:
            copied: Made | None = await self._ask("rescue", block, lost, digest, nodes)
        except ray.exceptions.RayError as error:
            raise LostVersionError(f"{_lost(kept)}: {cause_of(error)}") from error
        if copied is not None:
            return copied
        if failed is not None:
            raise LostVersionError(f"{_lost(kept)}, and not rebuilt: {failed}") from failed
        raise LostVersionError(
            f"{_lost(kept)}: {_CANNOT[kept.version.source]}, and no node has a copy; publish it "
            f"again, with a make that returns the same model each time, or its own snapshot path"
        )

    async def _bases(self, plan: Plan) -> list[ray.ObjectRef]:
        """Return the blocks of a plan's bases; lost ones are rebuilt first, if possible."""
        lost = [key for key in self._live(plan.bases) if self._block_of(key) is None]
        if lost:
            await asyncio.wait([self.again(key, "base lost") for key in lost])
        return self.blocks(plan)

    def blocks(self, plan: Plan) -> list[ray.ObjectRef]:
        """Return the blocks of a plan's bases, without those that are lost or retired."""
        found = (self._block_of(key) for key in self._live(plan.bases))
        return [block for block in found if block is not None]

    def _live(self, keys: Iterable[Key]) -> list[Key]:
        return [(name, n) for name, n in keys if n in self._manifest.record(name).live]

    def _block_of(self, key: Key) -> ray.ObjectRef | None:
        return self.block(self._manifest.record(key[0]).kept[key[1]])

    def check(self, kept: Kept, node: str) -> asyncio.Task[bool]:
        """Whether a block that a process on a node could not load is damaged there, or lost.

        A separate process checks, because a process at its limits is no sign of damage; callers
        share one check. A lost block is rebuilt.
        """
        asked = kept.block, node
        checking = self._checking.get(asked)
        if checking is None:
            checking = self._checking[asked] = self._start(self._check(kept, node))
            checking.add_done_callback(lambda _: self._checking.pop(asked))
        return checking

    async def _check(self, kept: Kept, node: str) -> bool:
        ref = self._blocks.get(kept.block)
        if ref is None:
            return True
        try:
            wrong = await self._ask("check", [ref], node)
        except ray.exceptions.RayError as error:
            wrong = str(error)
        if wrong is None:
            return False
        logger.warning("%s: %s", _lost(kept), wrong)
        name, number = kept.version.name, kept.version.number
        self._blocks.pop(kept.block, None)
        if kept.block in _blocks(self._manifest.record(name)):
            self.again((name, number), "unreadable")
        return True

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # asyncio itself keeps only a weak reference
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s", error)  # awaiting callers get it, too


_CANNOT: dict[Source, str] = {
    "object": "it was published as an object, so the cluster cannot rebuild it",
    "make": "its make now returns another model",
    "path": "its file now holds another model",
}


def _blocks(record: Record) -> set[str]:
    return {kept.block for kept in record.live.values()}


def _lost(kept: Kept) -> str:
    return f"version {kept.version.number} of {kept.version.name!r} is lost"
