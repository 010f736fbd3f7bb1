"""What is published, and which version of a name is current: one actor that decides.

    publish ──▶ staging ── commit ──▶ live ── retire, or more than `keep` ──▶ retired
                   │                   ▲ │
                   ▼                   │ ▼ the block is gone
                abandoned            made again (generation + 1), by its plan or from a copy

| who moves it | when |
|---|---|
| a publisher, by `stage` | it names a version's plan, and has a number for it |
| the owner | the block is there, whole, and its digest known |
| the publisher, by `commit` | the version is live and current, by one write of the manifest |
| the catalog | a publisher has not asked for 15 s: it is dead, and what it staged is dropped |
| the catalog | the owner died, or a loader says that it cannot load a generation: made again |

Every change is in the manifest before anyone hears of it. What is staged is not, but for its
number: a catalog that dies forgets it, and the publisher stages anew. Followers wait at `changes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray

from ray_zerocopy import metrics
from ray_zerocopy.calls.replacement import StandsForModel
from ray_zerocopy.errors import (
    CatalogError,
    LostVersionError,
    RayZeroCopyError,
    StoreFullError,
    UnknownVersionError,
)
from ray_zerocopy.registry.manifest import Manifest
from ray_zerocopy.registry.owner import Key, Made, Owner, Plan, Source
from ray_zerocopy.store.ray_inside import Address, address_of, reference_at

NAMESPACE = "ray_zerocopy"
ACTOR = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.001},  # without that node there is no cluster
    "max_restarts": -1,
    "max_concurrency": 100_000,  # every follower of the cluster waits in one call
}
LEASE_S = 15.0
START_S = 300.0  # of two processes, for a node that has other things to do
_WATCH_S = 30.0
_GENERATIONS = 3  # of a version, whose copies may be in use somewhere
_REMEMBERED = 16  # retired versions that a name still lists


@dataclass(frozen=True)
class Version(StandsForModel):
    """A published block: a name, a number, and where it came from."""

    name: str
    number: int
    ref: ray.ObjectRef | None
    """An ordinary reference; None while the block is being made, and once it is retired."""
    nbytes: int
    """Bytes in the block."""
    digest: str
    """SHA-256 of skeleton, table and block."""
    source: Source
    """`"object"`, `"make"` or `"path"`: what was published."""
    heals: bool
    """Whether the block can be made again when every copy is lost."""
    state: Literal["staging", "live", "retired"]
    published_at: float
    """Seconds since the epoch."""
    current: bool = False
    """Whether it is what its name stands for."""
    generation: int = 0
    """How often its block was made again."""

    def binary(self) -> bytes:
        """Give what tells it from others in a `Cache`, whatever its generation."""
        return f"{self.name}@{self.number}".encode()

    @property
    def handle(self) -> Version:
        """The version without its reference, which any pickle may take along: found by its name."""
        return replace(self, ref=None, current=False, generation=0)


@dataclass
class Entry:
    """A name, as the manifest has it."""

    last: int = 0
    """The highest number ever given: none is given twice."""
    recent: list[int] = field(default_factory=list)
    """The live versions, by when they were last current; the last one is."""
    versions: dict[int, Version] = field(default_factory=dict)
    plans: dict[int, Plan] = field(default_factory=dict)
    addresses: dict[int, list[Address]] = field(default_factory=dict)
    """Where the blocks are, of the last generations: a view in use may be of one before this."""

    @property
    def current(self) -> int | None:
        """The number that the name stands for."""
        return self.recent[-1] if self.recent else None

    def digests(self, number: int) -> tuple[str | None, str | None]:
        """Give the digest of a version, if it has one by now, and of the current one."""
        digests = {number: version.digest for number, version in self.versions.items()}
        return digests.get(number), digests.get(self.current or 0)


@dataclass
class _Staged:
    version: Version
    plan: Plan
    keep: int
    making: asyncio.Task[Made]
    asked_s: float


class Catalog:
    """The actor that knows what is published; it holds no block, and owns none."""

    def __init__(self) -> None:
        self._manifest = Manifest()
        self._entries: dict[str, Entry] = {
            name: self._manifest.read(name) for name in self._manifest.names()
        }
        self._staged: dict[Key, _Staged] = {}
        self._making: dict[Key, asyncio.Task[Version]] = {}
        self._waiting: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._polls: dict[str, asyncio.Future[None]] = {}
        self._following: dict[str, list[str]] = {}
        self._rebuilds: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._up: asyncio.Task[None] | None = None
        for name in self._entries:
            self._count(name)
        owner = ray.remote(Owner).options(name="owner", **ACTOR)
        self._owner = owner.remote()

    # --- publishing ---------------------------------------------------------------------------

    async def stage(self, name: str, plan: Plan, copied: list[ray.ObjectRef], keep: int) -> int:
        """Give a new version its number, and start to make it."""
        await self._ready()
        entry = self._entries.setdefault(name, Entry())
        number = entry.last = entry.last + 1
        self._write(name)
        key = (name, number)
        making = self._start(self._built(key, plan, copied))
        version = Version(
            name, number, None, 0, "", plan.source, plan.heals, "staging", time.time()
        )
        self._staged[key] = _Staged(version, plan, keep, making, time.monotonic())
        self._start(self._abandon_when_deserted(key))
        return number

    async def _built(self, key: Key, plan: Plan, copied: list[ray.ObjectRef]) -> Made:
        while True:
            try:
                made: Made = await self._owner.build.remote(key, plan, copied)
                return made
            except ray.exceptions.RayActorError:  # it starts again, and has nothing
                await asyncio.sleep(0.2)
            except ray.exceptions.RayTaskError as error:
                raise _ours(error) from error

    async def _abandon_when_deserted(self, key: Key) -> None:
        while (staged := self._staged.get(key)) is not None:
            if time.monotonic() - staged.asked_s > LEASE_S:
                await self.abandon(*key)
            await asyncio.sleep(LEASE_S / 4)

    async def abandon(self, name: str, number: int) -> None:
        """Drop what was staged."""
        staged = self._staged.pop((name, number), None)
        if staged is None:
            return
        with contextlib.suppress(Exception):  # it is told to whoever waits for it in `built`
            await staged.making
        self._owner.drop.remote([(name, number)])

    async def built(self, name: str, number: int, wait_s: float) -> bool | None:
        """Wait for a staged version: whether it is there yet; None if nobody knows of it.

        To ask is also to say that the publisher lives.
        """
        await self._ready()
        if number in self._entries.get(name, Entry()).versions:
            return True
        staged = self._staged.get((name, number))
        if staged is None:
            return None
        staged.asked_s = time.monotonic()
        done, _ = await asyncio.wait([staged.making], timeout=wait_s)
        if not done:
            return False
        staged.making.result()  # raises what went wrong
        return True

    async def commit(self, name: str, number: int) -> Version | None:
        """Make a staged version live and current, by one step; None if nobody knows of it.

        Gives the current version instead where that is the same to the byte.
        """
        await self._ready()
        entry = self._entries[name]
        if number in entry.versions:  # a catalog that died after it had written
            return self._version(entry, number)
        staged = self._staged.get((name, number))
        if staged is None or not staged.making.done():
            return None
        made = staged.making.result()
        del self._staged[name, number]
        current = entry.versions.get(entry.current or 0)
        if current is not None and current.digest == made.digest:
            self._owner.drop.remote([(name, number)])
            if staged.plan.heals and not current.heals:
                entry.plans[current.number] = staged.plan
                entry.versions[current.number] = replace(current, heals=True)
                self._write(name)
            return self._version(entry, current.number)
        if made.ref is None:
            return None  # the version that it equalled is current no more
        entry.versions[number] = replace(
            staged.version, ref=made.ref, nbytes=made.nbytes, digest=made.digest, state="live"
        )
        entry.plans[number] = staged.plan
        entry.recent.append(number)
        self._forget(entry, entry.recent[: -staged.keep])
        self._write(name)
        return self._version(entry, number)

    # --- reading ------------------------------------------------------------------------------

    async def find(
        self, name: str, number: int | None, broken: int | None, wait_s: float
    ) -> Version:
        """Give a version; with its reference, unless that takes longer than `wait_s`.

        `broken` is a generation of it that could not be loaded: another one is made.
        """
        await self._ready()
        entry, number = self._existing(name, number)
        version = entry.versions[number]
        if version.state != "live":
            return self._version(entry, number)
        if version.ref is None or version.generation == broken:
            making = self._make_again((name, number), "lost" if broken is None else "unreadable")
            done, _ = await asyncio.wait([making], timeout=wait_s)
            if done:
                making.result()
        return self._version(entry, number)

    async def versions(self, name: str) -> list[Version]:
        """Give all versions of a name that are known, by number."""
        await self._ready()
        entry = self._entries.get(name, Entry())
        staged = [kept.version for (named, _), kept in self._staged.items() if named == name]
        known = [self._version(entry, number) for number in entry.versions]
        return sorted([*known, *staged], key=lambda version: version.number)

    async def names(self) -> list[str]:
        """Give the names that have a current version."""
        await self._ready()
        return sorted(name for name, entry in self._entries.items() if entry.recent)

    async def changes(
        self, follower: str, seen: dict[str, tuple[int, int]], wait_s: float
    ) -> dict[str, Version]:
        """Wait until a name's current version is another than `seen`, as (number, generation).

        A follower's new call ends its last one.
        """
        await self._ready()
        if (last := self._polls.pop(follower, None)) and not last.done():
            last.set_result(None)
        self._follows(follower, list(seen))
        if changed := self._changed(seen):
            return changed
        waiter = self._polls[follower] = asyncio.get_running_loop().create_future()
        for name in seen:
            self._waiting[name].add(waiter)
        await asyncio.wait([waiter], timeout=wait_s)
        for name in seen:
            self._waiting[name].discard(waiter)
        if self._polls.get(follower) is waiter:
            del self._polls[follower]
            self._start(self._miss(follower))
        return self._changed(seen)

    async def _miss(self, follower: str) -> None:
        """Count a follower out that does not come back."""
        await asyncio.sleep(LEASE_S)
        if follower not in self._polls:
            self._follows(follower, [])

    def _follows(self, follower: str, names: list[str]) -> None:
        before = self._following.pop(follower, [])
        if names:
            self._following[follower] = names
        for name in {*before, *names} if before != names else ():
            followers = sum(name in followed for followed in self._following.values())
            metrics.record("rzc_followers", followers, name)

    def _changed(self, seen: dict[str, tuple[int, int]]) -> dict[str, Version]:
        changed = {}
        for name, mark in seen.items():
            entry = self._entries.get(name)
            if entry is not None and entry.current is not None:
                version = entry.versions[entry.current]
                if (version.number, version.generation) != mark:
                    changed[name] = self._version(entry, version.number)
        return changed

    async def state(self) -> dict[str, Any]:
        """Tell of everything in plain values: names, their versions, followers, rebuilds."""
        await self._ready()
        followers = Counter(name for names in self._following.values() for name in names)
        names = {
            name: {
                "current": entry.current,
                "followers": followers[name],
                "versions": [
                    {k: v for k, v in vars(version).items() if k != "ref"}
                    for version in await self.versions(name)
                ],
            }
            for name, entry in self._entries.items()
        }
        processes = len(self._following)
        return {"names": names, "processes": processes, "rebuilds": dict(self._rebuilds)}

    # --- moving -------------------------------------------------------------------------------

    async def promote(self, name: str, number: int) -> Version:
        """Make a live version the current one."""
        await self._ready()
        entry, number = self._existing(name, number)
        if number not in entry.recent:
            raise UnknownVersionError(
                f"version {number} of {name!r} is {entry.versions[number].state}, and only live "
                f"ones can be promoted: {sorted(entry.recent)}; publish it again"
            )
        entry.recent.remove(number)
        entry.recent.append(number)
        self._write(name)
        return self._version(entry, number)

    async def retire(self, name: str, number: int | None) -> None:
        """Retire a version that is not current, or all of them."""
        await self._ready()
        if number is None:
            entry, _ = self._existing(name, None)
            self._forget(entry, list(entry.recent))
        else:
            entry, number = self._existing(name, number)
            if number == entry.current:
                others = sorted(set(entry.recent) - {number})
                promote = f"promote one of {others} before, or " if others else ""
                raise CatalogError(
                    f"version {number} of {name!r} is the current one: {promote}retire the name"
                )
            self._forget(entry, [number] if number in entry.recent else [])
        self._write(name)

    def _forget(self, entry: Entry, numbers: list[int]) -> None:
        """Retire versions: their references go, here and with the owner."""
        for number in numbers:
            entry.recent.remove(number)
            entry.plans.pop(number)
            entry.addresses.pop(number, None)
            retired = replace(entry.versions[number], ref=None, state="retired")
            entry.versions[number] = retired
            self._owner.drop.remote([(retired.name, number)])
        retired_numbers = sorted(set(entry.versions) - set(entry.recent))
        for number in retired_numbers[:-_REMEMBERED]:
            del entry.versions[number]

    # --- losses -------------------------------------------------------------------------------

    def _ready(self) -> asyncio.Task[None]:
        """Find what the owner still holds; once, before anything else."""
        if self._up is None:
            self._up = self._start(self._recover())
        return self._up

    async def _recover(self) -> None:
        while True:
            try:
                self._incarnation, held = await self._owner.held.remote()
                break
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.2)
        live = {(n, number) for n, entry in self._entries.items() for number in entry.recent}
        self._owner.drop.remote([key for key in held if key not in live])
        for name, number in live:
            entry = self._entries[name]
            ref = held.get((name, number))
            entry.versions[number] = replace(entry.versions[number], ref=ref)
        self._start(self._watch())
        self._start(self._restore())

    async def _watch(self) -> None:
        """Notice that the owner died: wait at it, and have its blocks made again."""
        while True:
            try:
                if await self._owner.watch.remote(self._incarnation, _WATCH_S):
                    continue
                self._incarnation, _ = await self._owner.held.remote()
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.2)
                continue
            for entry in self._entries.values():
                for number in entry.recent:
                    entry.versions[number] = replace(entry.versions[number], ref=None)
            await self._restore()

    async def _restore(self) -> None:
        """Make again what is current, and what only a copy can give; the rest when it is asked."""
        wanted = [
            (name, number)
            for name, entry in self._entries.items()
            for number in entry.recent
            if entry.versions[number].ref is None
            and (number == entry.current or not entry.plans[number].heals)
        ]
        for key in sorted(wanted, key=lambda key: self._entries[key[0]].plans[key[1]].heals):
            with contextlib.suppress(RayZeroCopyError, ray.exceptions.RayError):
                await self._make_again(key, "owner lost")

    def _make_again(self, key: Key, reason: str) -> asyncio.Task[Version]:
        """Make the block of a version again, once however many ask."""
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = self._start(self._generation(key, reason))
            making.add_done_callback(lambda _: self._making.pop(key))  # its result has a reference
        return making

    async def _generation(self, key: Key, reason: str) -> Version:
        name, number = key
        entry = self._entries[name]
        plan, version = entry.plans[number], entry.versions[number]
        made: Made | None = None
        if plan.heals:
            made = await self._built(key, plan, [])
        else:
            nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
            lost = [reference_at(address) for address in entry.addresses[number]]
            made = await self._owner.rescue.remote(key, lost, nodes)
        if made is None:
            raise LostVersionError(
                f"version {number} of {name!r} is lost: it was published as an object, which "
                f"nobody can make again, and no node has a copy; publish it anew, with make= or "
                f"snapshot= so that it heals"
            )
        if number in entry.recent:
            self._rebuilds[reason] += 1
            metrics.record("rzc_rebuilds", 1, reason)
            generation = version.generation + 1
            entry.versions[number] = replace(version, ref=made.ref, generation=generation)
            self._write(name)
        return self._version(entry, number)

    # --- the rest -----------------------------------------------------------------------------

    def _existing(self, name: str, number: int | None) -> tuple[Entry, int]:
        entry = self._entries.get(name)
        if entry is None or entry.current is None:
            names = sorted(name for name, entry in self._entries.items() if entry.recent)
            raise UnknownVersionError(f"nothing is published as {name!r}; there is {names}")
        number = entry.current if number is None else number
        if number not in entry.versions:
            raise UnknownVersionError(
                f"{name!r} has no version {number}; it has {sorted(entry.versions)}"
            )
        return entry, number

    def _version(self, entry: Entry, number: int) -> Version:
        return replace(entry.versions[number], current=number == entry.current)

    def _write(self, name: str) -> None:
        """Write a name's record, then wake who waits for it."""
        entry = self._entries[name]
        for number in entry.recent:
            if ref := entry.versions[number].ref:
                before = [a for a in entry.addresses.get(number, []) if a[0] != ref.binary()]
                entry.addresses[number] = [*before, address_of(ref)][-_GENERATIONS:]
        bare = {number: replace(version, ref=None) for number, version in entry.versions.items()}
        self._manifest.write(name, replace(entry, versions=bare))
        self._count(name)
        for waiter in self._waiting[name]:
            if not waiter.done():
                waiter.set_result(None)

    def _count(self, name: str) -> None:
        states = Counter(version.state for version in self._entries[name].versions.values())
        for state in ("live", "retired"):
            metrics.record("rzc_versions", states[state], name, state)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # asyncio itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task


def _ours(error: ray.exceptions.RayTaskError) -> Exception:
    """Give what a task raised as our own error, with what the user can do."""
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, RayZeroCopyError):
        return cause
    if isinstance(cause, ray.exceptions.ObjectStoreFullError | ray.exceptions.OutOfDiskError):
        return StoreFullError(
            f"there is no room for the block: start Ray with a larger store "
            f"(object_store_memory), or retire versions: {cause}"
        )
    if isinstance(cause, ray.exceptions.OwnerDiedError):
        return CatalogError(f"who publishes the object is gone: {cause}")
    return CatalogError(f"the block could not be made: {type(cause).__name__}: {cause}")


def start(address: str) -> None:
    """Start the catalog of a cluster, unless it is there: as a job of its own, which then ends.

    What an actor and its tasks can import depends on the job that started it: whose working_dir and
    path would go with it.
    """
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    catalog = ray.remote(Catalog).options(name="catalog", **ACTOR)
    ray.get(catalog.remote().names.remote(), timeout=START_S)
