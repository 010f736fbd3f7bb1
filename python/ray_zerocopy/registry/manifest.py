"""The records of all names, in the key-value store of Ray's GCS: they outlive our processes.

One key a name. Where the GCS itself keeps its state (Redis), they outlive the head node, too.

    build the new record ─▶ write it ─▶ have it here ─▶ tell others
                                └ failed: read what is there, and have that

`change` is the only way to another record, one at a time for each name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from ray_zerocopy.errors import CatalogError
from ray_zerocopy.registry.records import Record, decode, encode
from ray_zerocopy.store.ray_inside import KeyValues

logger = logging.getLogger(__name__)

NAMESPACE = b"ray_zerocopy"


def read(name: str) -> Record:
    """Give the record of a name as it was written, empty where there is none."""
    return _read(KeyValues(NAMESPACE), name)


def names() -> list[str]:
    """Give every name that was ever written."""
    return [key.decode() for key in KeyValues(NAMESPACE).every_key()]


class Manifest:
    """The records as the catalog has them; `tell` hears of each change that was written."""

    def __init__(self, tell: Callable[[str, Record, Record], None]) -> None:
        self.records: dict[str, Record] = {}
        self._tell = tell
        self._kept = KeyValues(NAMESPACE)
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._unsure: set[str] = set()

    async def load(self) -> None:
        """Read all records, once, before anything else."""
        for name in await asyncio.to_thread(names):
            self.records[name] = await asyncio.to_thread(_read, self._kept, name)

    def record(self, name: str) -> Record:
        """Give the record of a name, empty where there is none."""
        return self.records.get(name, Record())

    async def settled(self, name: str) -> Record:
        """Give the record of a name as it is written, when no change of it is under way."""
        return await self.change(name, lambda record: record)

    async def change(self, name: str, change: Callable[[Record], Record]) -> Record:
        """Change the record of a name, and give what it is then.

        `change` gives another record, or the same where there is nothing to do; what it raises ends
        the matter. A write that fails changes nothing: where it is not known whether it has, the
        record is read before anything else happens to the name.

        Raises `CatalogError` where the GCS does not keep it.
        """
        async with self._changing[name]:
            await self._settle(name)
            before = self.record(name)
            after = change(before)
            if after is not before:
                await self._write(name, before, after)
            return self.record(name)

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
        """Have what is written, where a write has failed and may yet have been done."""
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
        self.records[name] = after
        self._tell(name, before, after)


def _read(kept: KeyValues, name: str) -> Record:
    written = kept.get(name.encode())
    return Record() if written is None else decode(written)
