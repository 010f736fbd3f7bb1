"""The records of all names, in the key-value store of Ray's GCS: they outlive our processes.

One key per name. If the GCS keeps its state in Redis, the records outlive the head node, too.

    build the new record ─▶ write it ─▶ keep it here ─▶ tell others
                                └ failed: read the stored record, and keep that

Only `change` changes a record, one change at a time per name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection

from ray_zerocopy.errors import CatalogError
from ray_zerocopy.registry.records import Key, Record, Use, decode, encode
from ray_zerocopy.store.ray_inside import KeyValues

logger = logging.getLogger(__name__)

NAMESPACE = b"ray_zerocopy"


def read(name: str) -> Record:
    """Return the stored record of a name; empty if there is none."""
    return _read(KeyValues(NAMESPACE), name)


def names() -> list[str]:
    """Return all names with a record."""
    return [key.decode() for key in KeyValues(NAMESPACE).every_key()]


class Manifest:
    """The catalog's copy of the records; calls `tell` after each written change."""

    def __init__(self, tell: Callable[[str, Record, Record], None]) -> None:
        self.records: dict[str, Record] = {}
        self._variants: Counter[Key] = Counter()
        self._tell = tell
        self._kept = KeyValues(NAMESPACE)
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._unsure: set[str] = set()

    async def load(self) -> None:
        """Read all records, once, before anything else."""
        for name in await asyncio.to_thread(names):
            self._set(name, await asyncio.to_thread(_read, self._kept, name))

    def record(self, name: str) -> Record:
        """Return the record of a name; empty if there is none."""
        return self.records.get(name, Record())

    def variants(self, name: str, number: int) -> int:
        """Count the live versions, of all names, that have tensors in the block of a version."""
        return self._variants[name, number]

    def held(self, name: str) -> set[int]:
        """Return the versions of a name that variants hold."""
        return {number for other, number in self._variants if other == name}

    def uses(self, blocks: Collection[bytes]) -> tuple[Use, ...]:
        """Return the versions with these blocks, by the ids of the blocks."""
        if not blocks:  # as for nearly all versions
            return ()
        known: dict[bytes, Use] = {}
        for name, record in self.records.items():
            for number, kept in record.live.items():
                known |= {block: (name, number, block) for block, *_ in kept.places}
                known |= {use[2]: use for use in kept.uses}
        return tuple(known[block] for block in blocks if block in known)

    def _set(self, name: str, record: Record) -> None:
        self._variants.subtract(_uses(self.record(name)))
        self._variants.update(_uses(record))
        self._variants = +self._variants  # without zeros
        self.records[name] = record

    async def settled(self, name: str) -> Record:
        """Return the stored record of a name, after any running change of it."""
        return await self.change(name, lambda record: record)

    async def change(self, name: str, change: Callable[[Record], Record]) -> Record:
        """Change the record of a name, and return the new record.

        `change` returns another record, or the same one if there is nothing to do. If it raises,
        nothing changes. A failed write changes nothing either: if its outcome is unknown, the
        stored record is read before the next change of that name.

        Raises `CatalogError` if the GCS does not store the record.
        """
        async with self._changing[name]:
            await self._settle(name)
            before = self.record(name)
            after = change(before)
            if after is not before:
                await self._write(name, before, after)
            return self.record(name)

    async def forget(self, name: str) -> None:
        """Delete the record of a name that has no live version, and is never used again.

        Raises `CatalogError` if the GCS does not delete it.
        """
        async with self._changing[name]:
            await self._settle(name)
            before = self.record(name)
            if before.recent or self.held(name):
                return
            try:
                await asyncio.to_thread(self._kept.delete, name.encode())
            except Exception as error:
                raise CatalogError(f"the record of {name!r} was not deleted: {error}") from error
            self._have(name, before, Record())
            del self.records[name]
        if not self._changing[name].locked():
            del self._changing[name]

    async def _write(self, name: str, before: Record, after: Record) -> None:
        self._unsure.add(name)
        try:
            await asyncio.to_thread(self._kept.put, name.encode(), encode(after))
        except Exception as error:
            await self._settle(name)
            if self.record(name) != after:
                raise CatalogError(
                    f"the record of {name!r} was not written, so nothing has changed: {error}"
                ) from error
            return
        self._unsure.discard(name)
        self._have(name, before, after)

    async def _settle(self, name: str) -> None:
        """After a failed write with unknown outcome, read the stored record."""
        if name not in self._unsure:
            return
        try:
            written = await asyncio.to_thread(_read, self._kept, name)
        except Exception as error:
            raise CatalogError(f"the record of {name!r} cannot be read: {error}") from error
        self._unsure.discard(name)
        before = self.record(name)
        if before != written:
            self._have(name, before, written)

    def _have(self, name: str, before: Record, after: Record) -> None:
        self._set(name, after)
        self._tell(name, before, after)


def _uses(record: Record) -> list[Key]:
    return [use[:2] for kept in record.live.values() for use in kept.uses]


def _read(kept: KeyValues, name: str) -> Record:
    written = kept.get(name.encode())
    return Record() if written is None else decode(written)
