"""The actor that knows all published versions, and decides which version of a name is current.

    publish ──▶ staging ─ made, and asked for ─▶ live ── retired, or more than `keep` ──▶ retired
                   │                              ▲ │
                   ▼                              │ ▼ its block is gone
                abandoned                      rebuilt (generation + 1)

| actor | transition |
|---|---|
| a publisher, by `publish` | stages a version; once its block exists, it is live and current |
| the publisher, or the catalog | abandons it; the catalog if the publisher is silent for 15 s |
| any process, by `promote` and `retire` | makes another version current; retires a version |
| the catalog (`healing`) | rebuilds it after the owner died, or a block is lost or damaged |

The catalog writes every change to the manifest before it tells others. It does not write staged
versions: after a crash, the publisher, which repeats its request every two seconds, tells the next
catalog. Followers wait in `promises`.
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
from ray_zerocopy.registry.records import Kept, Plan, Record, Use, Version
from ray_zerocopy.store.ray_inside import address_of

NAMESPACE = "ray_zerocopy"
ACTOR = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.001},  # the cluster ends with that node
    "max_restarts": -1,
    "max_concurrency": 100_000,  # one waiting call per followed name
}
START_S = 300.0  # to start two processes on a busy node
LEASE_S = 15.0
_AGAIN_S = 0.2
_WRITTEN_A_SECOND = 1e8  # bytes, by a publisher on a busy machine


@dataclass(frozen=True)
class Wanted:
    """A publisher's request for a new current version of a name."""

    name: str
    token: str
    """Identifies the request; repeats have the same token."""
    plan: Plan
    keep: int
    digest: str | None
    """Digest of an object that is already stored or written; None if it must be made."""
    draft: Draft | None = None
    """An object that its publisher writes into room made by the owner."""
    written: tuple[ray.ObjectRef, ...] = ()
    """The room, once written."""


@dataclass
class _Staged:
    wanted: Wanted
    making: asyncio.Task[Made]
    since_s: float
    asked_s: float
    uses: tuple[Use, ...]
    """The bases of a draft, from when it was staged: they may be retired before it is live."""

    @property
    def lease_s(self) -> float:
        """How long its publisher may be silent; longer while it writes many bytes."""
        return _lease_s(self.wanted.draft.nbytes if self.wanted.draft else 0)


def _lease_s(nbytes: int) -> float:
    """Return how long a publisher may be silent while it writes or moves so many bytes."""
    return LEASE_S + nbytes / _WRITTEN_A_SECOND


class _RestageError(Exception):
    """A staged block is no longer valid: its owner died, or the version it equals has changed."""


class Catalog:
    """The actor that knows what is published; it neither holds nor owns blocks."""

    def __init__(self) -> None:
        self._manifest = Manifest(self._written)
        self._staged: dict[str, _Staged] = {}  # by token
        self._owner = ray.remote(Owner).options(name="owner", **ACTOR).remote()
        self._healing = Healing(self._manifest, self._owner, self._staged.keys)
        me = ray.get_runtime_context().current_actor
        self._promises = Promises(self._current, me)
        self._files: dict[str, str] = {}  # tokens by file that is being replaced
        self._up: asyncio.Task[None] | None = None
        self._leases: set[asyncio.Task[None]] = set()

    async def _ready(self) -> None:
        """Read the manifest, and ask the owner for its blocks, before anything else."""
        if self._up is None or (self._up.done() and self._up.exception() is not None):
            self._up = asyncio.ensure_future(self._start())
        await asyncio.shield(self._up)

    async def _start(self) -> None:
        await self._manifest.load()
        for name, record in self._manifest.records.items():
            _count(name, record)
        await self._healing.recover(LEASE_S)

    def _written(self, name: str, before: Record, after: Record) -> None:
        """Tell others of a written change."""
        self._healing.changed(name, before, after)
        if before.number != after.number:
            self._promises.keep(name)
        _count(name, after)

    # --- publishing ---------------------------------------------------------------------------

    async def publish(
        self, wanted: Wanted, copied: list[ray.ObjectRef], wait_s: float
    ) -> Version | Made | None:
        """Publish; returns the version, or None while its block is being made.

        The publisher repeats the call until it gets a version. Repeats are the same publication,
        also for a restarted catalog, and show that the publisher is alive. An object that equals
        the current version is not stored: this returns the current version. `copied` refers to a
        stored object. For a draft that is not written yet, this returns the room for it.

        Raises as `Owner.make`, and `CatalogError` if the record cannot be written.
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
            self._place(wanted.token)  # its publisher may be gone, too
            await asyncio.sleep(min(wait_s, _AGAIN_S))
            return None
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error

    def _stage(self, wanted: Wanted, copied: list[ray.ObjectRef], record: Record) -> _Staged:
        making = asyncio.ensure_future(self._made(wanted, copied, record))
        now_s = time.monotonic()
        bases = wanted.draft.bases if wanted.draft else ()
        uses = self._manifest.uses([ref.binary() for ref, *_ in bases])
        staged = self._staged[wanted.token] = _Staged(wanted, making, now_s, now_s, uses)
        lease = asyncio.ensure_future(self._abandon_when_deserted(wanted.name, wanted.token))
        self._leases.add(lease)  # asyncio itself keeps only a weak reference
        lease.add_done_callback(self._leases.discard)
        return staged

    async def _made(self, wanted: Wanted, copied: list[ray.ObjectRef], record: Record) -> Made:
        name, token, plan, digest = wanted.name, wanted.token, wanted.plan, wanted.digest
        if wanted.draft is not None:  # written or not: the owner may have dropped the room
            room: Made = await self._owner.reserve.remote(token, name, plan, wanted.draft)
            return room
        if digest is None:
            bases = self._healing.blocks(plan)
            made: Made = await self._owner.make.remote(token, name, plan, None, bases)
            return made
        if record.current is not None and record.current.digest == digest:
            return Made(record.current.nbytes, digest, None)
        copy: Made = await self._owner.copy.remote(token, name, plan, digest, copied)
        return copy

    async def _commit(self, staged: _Staged, made: Made) -> Version:
        """Make a finished version live and current, by one write."""
        name, token, plan = staged.wanted.name, staged.wanted.token, staged.wanted.plan
        await self._supersede(name, plan, made.digest)
        version = Version(
            name, 0, None, made.nbytes, made.digest, plan.source, plan.heals, "live", time.time()
        )
        places = (address_of(made.ref),) if made.ref else ()
        uses = staged.uses or self._manifest.uses(made.bases)
        kept = Kept(version, plan, token, token, places, uses)

        def change(record: Record) -> Record:
            if record.published_by(token) is not None:
                return record
            record = record.superseded(plan.files, made.digest)
            if (current := record.current) is not None and current.digest == made.digest:
                heals = plan.heals and not current.heals
                return record.healing(current.number, plan) if heals else record
            if made.ref is None or self._staged.get(token) is not staged:  # or abandoned meanwhile
                raise _RestageError
            self._healing.have(token, made)
            return record.committed(kept, staged.wanted.keep, self._manifest.held(name))

        record = await self._manifest.change(name, change)
        self._staged.pop(token, None)
        asyncio.get_running_loop().call_later(_lease_s(made.nbytes), self._place, token)
        number = record.published_by(token)
        if number is None:
            self._healing.drop([token])
            return self._version(name, record.recent[-1])
        return self._version(name, number)

    async def _supersede(self, name: str, plan: Plan, digest: str) -> None:
        """Stop versions of other names from healing from the files that now hold this one."""
        for other in list(self._manifest.records) if plan.files else ():
            if other != name:
                await self._manifest.change(
                    other, lambda record: record.superseded(plan.files, digest)
                )

    async def abandon(self, name: str, token: str) -> bool:
        """Stop a staged version and drop its block; returns False if it is already published."""
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
                with contextlib.suppress(CatalogError):  # the loop tries again
                    await self.abandon(name, token)
            await asyncio.sleep(LEASE_S / 4)

    # One publication at a time may save to a snapshot file: its publisher moves the file there when
    # the version is live.

    def _has_file(self, wanted: Wanted) -> bool:
        files = wanted.plan.files
        return not files or self._files.setdefault(files[-1], wanted.token) == wanted.token

    async def placed(self, token: str) -> None:
        """Let other publications use the file: it now matches the record."""
        self._place(token)

    def _place(self, token: str) -> None:
        self._files = {file: other for file, other in self._files.items() if other != token}

    # --- reading ------------------------------------------------------------------------------

    async def find(self, name: str, number: int | None, wait_s: float) -> Version:
        """Return a version; without a number, the current one.

        If its block is lost, rebuild it; after `wait_s`, return the version without a reference.
        Raises `LostVersionError` if the block cannot be rebuilt.
        """
        await self._ready()
        found = self._existing(name, number)
        version = self._version(name, found)
        if version.state != "live" or version.ref is not None:
            return version
        making = self._healing.again((name, found), "lost")
        await asyncio.wait([making], timeout=wait_s)
        now = self._existing(name, number)  # another version may be current
        if now == found and making.done() and not making.cancelled():
            making.result()
        return self._version(name, now)

    async def previous(self, name: str, node: str) -> Version | None:
        """Return the current version if its block was made on this node, and is not lost."""
        await self._ready()
        version = self._current(name)
        if version is None or version.ref is None:
            return None
        made_there = self._manifest.record(name).kept[version.number].plan.node == node
        return version if made_there else None

    async def broken(self, version: Version, node: str, wait_s: float) -> bool | None:
        """Whether a version that a process could not load is lost; if so, rebuild it.

        False if its block is intact: the cause is in that process. None if the check takes longer.
        """
        await self._ready()
        kept = self._manifest.record(version.name).live.get(version.number)
        if kept is None or kept.version.generation != version.generation:
            return True
        checking = self._healing.check(kept, node)
        await asyncio.wait([checking], timeout=wait_s)
        return checking.result() if checking.done() else None

    async def versions(self, name: str) -> list[Version]:
        """Return all known versions of a name by number, then its staged ones."""
        await self._ready()
        known = sorted(self._manifest.record(name).kept)
        staged = [each for each in self._staged.values() if each.wanted.name == name]
        return [self._version(name, number) for number in known] + [
            Version(name, 0, None, 0, "", each.wanted.plan.source, False, "staging", each.since_s)
            for each in staged
        ]

    async def names(self) -> list[str]:
        """Return the names that have a current version."""
        await self._ready()
        return self._names()

    async def follow(self, follower: str, names: list[str]) -> dict[str, Told]:
        """Return the current versions of the names that a process follows, and their promises."""
        await self._ready()
        return self._promises.follow(follower, names)

    async def turn(self, turn: int) -> Told | None:
        """Wait until a name has a new current version; the catalog calls this itself."""
        return await self._promises.turn(turn)

    async def state(self) -> dict[str, Any]:
        """Return the whole state in plain values: names, their versions, followers, rebuilds."""
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

    async def known(self, name: str, number: int | None) -> None:
        """Raise `UnknownVersionError` if there is no such name or version."""
        await self._ready()
        self._existing(name, number)

    async def retire(self, name: str, number: int | None) -> None:
        """Retire a version that is not current, or all of them; a repeated call does nothing."""
        await self._ready()

        def change(record: Record) -> Record:
            if record.number is None:
                return record
            if number is None:
                return record.retired(record.recent, self._manifest.held(name))
            if number == record.number:
                others = sorted(set(record.recent) - {number})
                promote = f"promote one of {others} first, or " if others else ""
                raise CatalogError(
                    f"version {number} of {name!r} is the current one: {promote}retire the name"
                )
            held = self._manifest.held(name)
            return record.retired([number], held) if number in record.recent else record

        await self._manifest.change(name, change)

    async def forget(self, name: str) -> None:
        """Delete the record of a retired name that nobody uses again."""
        await self._ready()
        await self._manifest.forget(name)

    # --- the rest -----------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return sorted(name for name, record in self._manifest.records.items() if record.recent)

    def _existing(self, name: str, number: int | None) -> int:
        record = self._manifest.record(name)
        if record.number is None:
            raise UnknownVersionError(f"nothing is published as {name!r}; names: {self._names()}")
        number = record.number if number is None else number
        if number not in record.kept:
            raise UnknownVersionError(
                f"{name!r} has no version {number}; it has {sorted(record.kept)}"
            )
        return number

    def _version(self, name: str, number: int) -> Version:
        record = self._manifest.record(name)
        ref = self._healing.block(record.kept[number])
        variants = self._manifest.variants(name, number)
        return replace(record.version(number), ref=ref, variants=variants)

    def _current(self, name: str) -> Version | None:
        number = self._manifest.record(name).number
        return None if number is None else self._version(name, number)


def _count(name: str, record: Record) -> None:
    states = Counter(kept.version.state for kept in record.kept.values())
    for state in ("live", "retired"):
        metrics.record("rzc_versions", states[state], name, state)


def start(address: str) -> None:
    """Start the catalog of a cluster, if there is none, in its own job, which then ends.

    An actor and its tasks import from the working_dir and path of the job that started it, so this
    job has none.
    """
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    catalog = ray.remote(Catalog).options(name="catalog", **ACTOR)
    ray.get(catalog.remote().names.remote(), timeout=START_S)
