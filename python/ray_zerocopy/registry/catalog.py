"""What is published, and which version of a name is current: one actor that decides.

    publish ──▶ staging ─ made, and asked for ─▶ live ── retired, or more than `keep` ──▶ retired
                   │                              ▲ │
                   ▼                              │ ▼ its block is gone
                abandoned                      made again (generation + 1)

| who moves it | when |
|---|---|
| a publisher, by `publish` | it is staged; when its block is there, it is live and current |
| the publisher, or the catalog | it is abandoned: by the one, or when it has not asked for 15 s |
| anyone, by `promote` and `retire` | another version is current; it is retired |
| the catalog (`healing`) | the owner died, or a block is found to be lost or damaged: made again |

Every change is written to the manifest before anyone hears of it (`manifest`). What is staged is
not: a catalog that dies forgets it, and the publisher, who tells again every two seconds what it
wants, tells the next one. Followers wait in `promises`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import ray

from ray_zerocopy import metrics
from ray_zerocopy.errors import CatalogError, UnknownVersionError
from ray_zerocopy.registry.healing import Healing
from ray_zerocopy.registry.manifest import Manifest
from ray_zerocopy.registry.owner import Draft, Made, Owner, cause_of
from ray_zerocopy.registry.promises import Promises, Told
from ray_zerocopy.registry.records import Kept, Plan, Record, Version
from ray_zerocopy.store.ray_inside import address_of

NAMESPACE = "ray_zerocopy"
ACTOR = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.001},  # without that node there is no cluster
    "max_restarts": -1,
    "max_concurrency": 100_000,  # each name that is followed waits in one call
}
START_S = 300.0  # of two processes, for a node that has other things to do
LEASE_S = 15.0
_AGAIN_S = 0.2
_WRITTEN_A_SECOND = 1e8  # bytes, of a publisher that has other things to do


@dataclass(frozen=True)
class Wanted:
    """What a publisher wants to be the current version of a name."""

    name: str
    token: str
    """Tells it from all others, however often it is told."""
    plan: Plan
    keep: int
    digest: str | None
    """Of an object that is stored or written already; None for what has to be made."""
    draft: Draft | None = None
    """An object that its publisher writes where there is room for it."""
    written: tuple[ray.ObjectRef, ...] = ()
    """Where it is written ..."""
    incarnation: str = ""
    """... by the owner's own answer."""


@dataclass
class _Staged:
    wanted: Wanted
    making: asyncio.Task[Made]
    since_s: float
    asked_s: float

    @property
    def lease_s(self) -> float:
        """How long its publisher may be silent: while it writes, for its bytes."""
        draft = self.wanted.draft
        return LEASE_S + (draft.nbytes / _WRITTEN_A_SECOND if draft else 0)


class _RestageError(Exception):
    """What was equal to the current version and not stored, or held by an owner, is so no more."""


class Catalog:
    """The actor that knows what is published; it holds no block, and owns none."""

    def __init__(self) -> None:
        self._manifest = Manifest(self._written)
        self._staged: dict[str, _Staged] = {}  # by token
        self._owner = ray.remote(Owner).options(name="owner", **ACTOR).remote()
        self._healing = Healing(self._manifest, self._owner, self._staged.keys)
        me = ray.get_runtime_context().current_actor
        self._promises = Promises(self._current, me)
        self._files: dict[str, str] = {}  # tokens by the file that is being replaced
        self._up: asyncio.Task[None] | None = None
        self._leases: set[asyncio.Task[None]] = set()

    async def _ready(self) -> None:
        """Know what is written and what the owner holds, before anything else."""
        if self._up is None or (self._up.done() and self._up.exception() is not None):
            self._up = asyncio.ensure_future(self._start())
        await asyncio.shield(self._up)

    async def _start(self) -> None:
        await self._manifest.load()
        for name, record in self._manifest.records.items():
            _count(name, record)
        await self._healing.recover(LEASE_S)

    def _written(self, name: str, before: Record, after: Record) -> None:
        """Tell others of a change that is written."""
        self._healing.changed(name, before, after)
        if before.number != after.number:
            self._promises.keep(name)
        _count(name, after)

    # --- publishing ---------------------------------------------------------------------------

    async def publish(
        self, wanted: Wanted, copied: list[ray.ObjectRef], wait_s: float
    ) -> Version | Made | None:
        """Have something published: give its version, or None while it is being made.

        To be called again until it gives one: it is the same publication, also to a catalog that
        has started meanwhile, and to ask is to say that the publisher lives. What equals the
        current version is not stored: that one is given. `copied` refers to an object. Of a draft
        this gives where to write it, unless it is written there.

        Raises what `Owner.make` does, and `CatalogError` where the record cannot be written.
        """
        await self._ready()
        record = self._manifest.record(wanted.name)
        if (number := record.published_by(wanted.token)) is not None:
            return self._version(wanted.name, number)
        if not self._has_file(wanted):
            await asyncio.sleep(min(wait_s, _AGAIN_S))
            return None
        staged = self._staged.get(wanted.token) or self._stage(wanted, copied, record)
        staged.asked_s = time.monotonic()
        await asyncio.wait([staged.making], timeout=wait_s)
        if not staged.making.done() or staged.making.cancelled():
            return None
        try:
            made = staged.making.result()
            if made.ref is not None and made.incarnation != self._healing.incarnation:
                raise _RestageError
            if (draft := wanted.draft) is not None:
                if wanted.written != (made.ref,):
                    return made
                made = Made(draft.nbytes, wanted.digest or "", made.ref)
            return await self._commit(staged, made)
        except (ray.exceptions.RayActorError, _RestageError):
            self._staged.pop(wanted.token, None)
            await asyncio.sleep(min(wait_s, _AGAIN_S))
            return None
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error

    def _stage(self, wanted: Wanted, copied: list[ray.ObjectRef], record: Record) -> _Staged:
        making = asyncio.ensure_future(self._made(wanted, copied, record))
        now_s = time.monotonic()
        staged = self._staged[wanted.token] = _Staged(wanted, making, now_s, now_s)
        lease = asyncio.ensure_future(self._abandon_when_deserted(wanted.name, wanted.token))
        self._leases.add(lease)  # asyncio itself keeps only a weak reference
        lease.add_done_callback(self._leases.discard)
        return staged

    async def _made(self, wanted: Wanted, copied: list[ray.ObjectRef], record: Record) -> Made:
        name, token, plan, digest = wanted.name, wanted.token, wanted.plan, wanted.digest
        if wanted.written and wanted.incarnation == self._healing.incarnation:
            return Made(0, "", wanted.written[0], wanted.incarnation)
        if wanted.draft is not None:
            room: Made = await self._owner.reserve.remote(token, name, plan, wanted.draft)
            return room
        if digest is None:
            made: Made = await self._owner.make.remote(token, name, plan, None)
            return made
        if record.current is not None and record.current.digest == digest:
            return Made(record.current.nbytes, digest, None)
        copy: Made = await self._owner.copy.remote(token, name, plan, digest, copied)
        return copy

    async def _commit(self, staged: _Staged, made: Made) -> Version:
        """Have what is made live and current, by one write."""
        name, token, plan = staged.wanted.name, staged.wanted.token, staged.wanted.plan
        await self._supersede(name, plan, made.digest)
        version = Version(
            name, 0, None, made.nbytes, made.digest, plan.source, plan.heals, "live", time.time()
        )
        places = (address_of(made.ref),) if made.ref else ()
        kept = Kept(version, plan, token, token, places)

        def change(record: Record) -> Record:
            if record.published_by(token) is not None:
                return record
            record = record.superseded(plan.files, made.digest)
            if (current := record.current) is not None and current.digest == made.digest:
                heals = plan.heals and not current.heals
                return record.healing(current.number, plan) if heals else record
            if made.ref is None:
                raise _RestageError
            return record.committed(kept, staged.wanted.keep)

        self._healing.have(token, made)
        record = await self._manifest.change(name, change)
        self._staged.pop(token, None)
        asyncio.get_running_loop().call_later(LEASE_S, self._place, token)
        number = record.published_by(token)
        if number is None:
            self._healing.drop([token])
            return self._version(name, record.recent[-1])
        return self._version(name, number)

    async def _supersede(self, name: str, plan: Plan, digest: str) -> None:
        """Have no version of another name healed from the files that this one is in."""
        for other in list(self._manifest.records) if plan.files else ():
            if other != name:
                await self._manifest.change(
                    other, lambda record: record.superseded(plan.files, digest)
                )

    async def abandon(self, name: str, token: str) -> bool:
        """Let go of what was staged: it is not made any further. False where it is published."""
        record = await self._manifest.settled(name)
        staged = self._staged.pop(token, None)
        self._place(token)
        if record.published_by(token) is not None:
            return False
        if staged is not None:
            staged.making.cancel()
        self._healing.drop([token])
        return True

    async def _abandon_when_deserted(self, name: str, token: str) -> None:
        while (staged := self._staged.get(token)) is not None:
            if time.monotonic() - staged.asked_s > staged.lease_s:
                with contextlib.suppress(CatalogError):  # tried again
                    await self.abandon(name, token)
            await asyncio.sleep(LEASE_S / 4)

    # Where a snapshot is saved, one publication at a time has the file: it is moved there when the
    # version is live.

    def _has_file(self, wanted: Wanted) -> bool:
        files = wanted.plan.files
        return not files or self._files.setdefault(files[-1], wanted.token) == wanted.token

    async def placed(self, token: str) -> None:
        """Let others have the file: it is as the record says."""
        self._place(token)

    def _place(self, token: str) -> None:
        self._files = {file: other for file, other in self._files.items() if other != token}

    # --- reading ------------------------------------------------------------------------------

    async def find(self, name: str, number: int | None, wait_s: float) -> Version:
        """Give a version, the current one without a number.

        Its block is made again where it is lost; without a reference where that takes longer than
        `wait_s`. Raises `LostVersionError` where it cannot be made again.
        """
        await self._ready()
        number = self._existing(name, number)
        version = self._version(name, number)
        if version.state == "live" and version.ref is None:
            making = self._healing.again((name, number), "lost")
            await asyncio.wait([making], timeout=wait_s)
            if making.done() and not making.cancelled():
                making.result()
        return self._version(name, number)

    async def broken(self, version: Version, node: str, wait_s: float) -> bool | None:
        """Whether a version that somebody could not load is lost, so that it is made again.

        False where its block is whole: the trouble is theirs. None if that takes longer.
        """
        await self._ready()
        kept = self._manifest.record(version.name).live.get(version.number)
        if kept is None or kept.version.generation != version.generation:
            return True
        checking = self._healing.check(kept, node)
        await asyncio.wait([checking], timeout=wait_s)
        return checking.result() if checking.done() else None

    async def versions(self, name: str) -> list[Version]:
        """Give all versions of a name that are known, by number, then those that are staged."""
        await self._ready()
        known = sorted(self._manifest.record(name).kept)
        staged = [each for each in self._staged.values() if each.wanted.name == name]
        return [self._version(name, number) for number in known] + [
            Version(name, 0, None, 0, "", each.wanted.plan.source, False, "staging", each.since_s)
            for each in staged
        ]

    async def names(self) -> list[str]:
        """Give the names that have a current version."""
        await self._ready()
        return self._names()

    async def follow(self, follower: str, names: list[str]) -> dict[str, Told]:
        """Tell a process what the names that it follows stand for, and what to wait for."""
        await self._ready()
        return self._promises.follow(follower, names)

    async def turn(self, turn: int) -> Told | None:
        """Wait until a name stands for another version: the catalog's own call to itself."""
        return await self._promises.turn(turn)

    async def state(self) -> dict[str, Any]:
        """Tell of everything in plain values: names, their versions, followers, rebuilds."""
        await self._ready()
        followers = self._promises.followers()
        names = {
            name: {
                "current": record.number,
                "followers": followers[name],
                "versions": [
                    {k: v for k, v in vars(version).items() if k != "ref"}
                    for version in await self.versions(name)
                ],
            }
            for name, record in list(self._manifest.records.items())
        }
        rebuilds = dict(self._healing.rebuilds)
        return {"names": names, "processes": self._promises.processes, "rebuilds": rebuilds}

    # --- moving -------------------------------------------------------------------------------

    async def promote(self, name: str, number: int) -> Version:
        """Make a live version the current one."""
        await self._ready()

        def change(record: Record) -> Record:
            self._existing(name, number)
            if number not in record.recent:
                raise UnknownVersionError(
                    f"version {number} of {name!r} is {record.kept[number].version.state}, and "
                    f"only live ones can be promoted: {sorted(record.recent)}; publish it again"
                )
            return record.promoted(number)

        await self._manifest.change(name, change)
        return self._version(name, number)

    async def retire(self, name: str, number: int | None) -> None:
        """Retire a version that is not current, or all of them."""
        await self._ready()

        def change(record: Record) -> Record:
            self._existing(name, number)
            if number is None:
                return record.retired(record.recent)
            if number == record.number:
                others = sorted(set(record.recent) - {number})
                promote = f"promote one of {others} before, or " if others else ""
                raise CatalogError(
                    f"version {number} of {name!r} is the current one: {promote}retire the name"
                )
            return record.retired([number]) if number in record.recent else record

        await self._manifest.change(name, change)

    # --- the rest -----------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return sorted(name for name, record in self._manifest.records.items() if record.recent)

    def _existing(self, name: str, number: int | None) -> int:
        record = self._manifest.record(name)
        if record.number is None:
            raise UnknownVersionError(f"nothing is published as {name!r}; there is {self._names()}")
        number = record.number if number is None else number
        if number not in record.kept:
            raise UnknownVersionError(
                f"{name!r} has no version {number}; it has {sorted(record.kept)}"
            )
        return number

    def _version(self, name: str, number: int) -> Version:
        record = self._manifest.record(name)
        ref = self._healing.block(record.kept[number])
        return replace(record.version(number), ref=ref)

    def _current(self, name: str) -> Version | None:
        number = self._manifest.record(name).number
        return None if number is None else self._version(name, number)


def _count(name: str, record: Record) -> None:
    states = Counter(kept.version.state for kept in record.kept.values())
    for state in ("live", "retired"):
        metrics.record("rzc_versions", states[state], name, state)


def start(address: str) -> None:
    """Start the catalog of a cluster, unless it is there: as a job of its own, which then ends.

    What an actor and its tasks can import depends on the job that started it: whose working_dir and
    path would go with it.
    """
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    catalog = ray.remote(Catalog).options(name="catalog", **ACTOR)
    ray.get(catalog.remote().names.remote(), timeout=START_S)
