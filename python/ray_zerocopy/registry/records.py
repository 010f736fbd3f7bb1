"""The record of a name: its versions, and every change of them. Plain values, no references.

                 committed            promoted, rebuilt, superseded
    (staging) ─────────────▶ live ◀───────────────────────┘
                              │ retired, or more than `keep`
                              ▼
                           retired ─ the oldest are forgotten

Records are immutable: each method returns a new one. The catalog writes it, and then acts.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray

from ray_zerocopy.calls.replacement import StandsForModel
from ray_zerocopy.errors import VersionError
from ray_zerocopy.pickled import named
from ray_zerocopy.store.ray_inside import Address

Source = Literal["object", "make", "path"]
Key = tuple[str, int]  # of a version: its name and number
Use = tuple[str, int, bytes]  # of a base: its name and number, and the id of its block

SCHEMA = 1
_REMEMBERED = 16  # retired versions that a name still lists
_PLACES = 3  # generations that processes may still have mapped


@dataclass(frozen=True)
class Version(StandsForModel):
    """A published block: a name, a number, and where it came from."""

    name: str
    number: int
    """1, 2, 3 …; 0 while staging, because it gets its number when it becomes live."""
    ref: ray.ObjectRef | None
    """An ordinary reference; None while the block is being made, and after retirement."""
    nbytes: int
    """Size of the block in bytes."""
    digest: str
    """128 bits in hexadecimal: equal for equal weights and structure, in every process."""
    source: Source
    """The argument of `publish`: `"object"`, `"make"` or `"path"`."""
    heals: bool
    """Whether the block can be rebuilt if every copy is lost."""
    state: Literal["staging", "live", "retired"]
    published_at: float
    """Seconds since the epoch."""
    current: bool = False
    """Whether it is the current version of its name."""
    generation: int = 0
    """How often its block was rebuilt."""
    variants: int = 0
    """Number of live versions with tensors in its block, which stays as long as there are any."""

    def binary(self) -> bytes:
        """Return its key in a `Cache`, the same for all generations."""
        return f"{self.name}@{self.number}".encode()

    @property
    def handle(self) -> Version:
        """The version without its reference: any pickle may hold it, and loads find it by name."""
        return replace(self, ref=None, current=False, generation=0, variants=0)

    @property
    def mark(self) -> tuple[int, int]:
        """Differs whenever the name has another block."""
        return self.number, self.generation

    def __reduce__(self) -> Any:
        return version, (_fields(self),)


@named
def version(fields: dict[str, Any]) -> Version:
    """Unpickle a version; raises `VersionError` if a newer ray_zerocopy pickled it."""
    return Version(**_known(Version, fields))


@dataclass(frozen=True)
class Plan:
    """How to make and rebuild the block of a version."""

    source: Source
    node: str
    """The publisher's node; the block is made there if the node is alive."""
    make: bytes | None = None
    """The pickle of a function that returns the object."""
    files: tuple[str, ...] = ()
    """Snapshots; the first one with the version's digest is read."""
    seconds: float = 3600.0
    """The time limit."""
    bases: tuple[Key, ...] = ()
    """Versions whose tensors the block does not store again, as long as they have a block."""

    @property
    def heals(self) -> bool:
        """Whether the block can be rebuilt if every copy is lost."""
        return self.make is not None or bool(self.files)

    def __reduce__(self) -> Any:
        return plan, (_fields(self),)


@named
def plan(fields: dict[str, Any]) -> Plan:
    """Unpickle a plan; raises `VersionError` if a newer ray_zerocopy pickled it."""
    return Plan(**_known(Plan, fields))


@dataclass(frozen=True)
class Kept:
    """A version in its name's record."""

    version: Version
    plan: Plan
    token: str
    """Identifies the publication; a repeated request has the same token."""
    block: str
    """The owner's token for its block."""
    places: tuple[Address, ...]
    """Addresses of its last blocks: a process may still map an earlier one."""
    uses: tuple[Use, ...] = ()
    """The bases with some of its tensors."""

    def at(self, place: Address | None) -> Kept:
        """Return it with one more place, or unchanged for None."""
        places = self.places if place is None else (*self.places, place)
        return replace(self, places=places[-_PLACES:])


@dataclass(frozen=True)
class Record:
    """A name: its versions, and which of them is current."""

    last: int = 0
    """The highest number so far; no number is used twice."""
    recent: tuple[int, ...] = ()
    """The live versions, ordered by when they were last current; the last one is current."""
    kept: Mapping[int, Kept] = field(default_factory=dict)
    """Live and recently retired versions, by number."""

    # --- questions ----------------------------------------------------------------------------

    @property
    def number(self) -> int | None:
        """The number of the current version."""
        return self.recent[-1] if self.recent else None

    @property
    def current(self) -> Version | None:
        """The current version."""
        return self.version(self.recent[-1]) if self.recent else None

    @property
    def live(self) -> dict[int, Kept]:
        """The live versions, by number."""
        return {number: self.kept[number] for number in self.recent}

    def version(self, number: int) -> Version:
        """Return a version, with `current` set."""
        return replace(self.kept[number].version, current=number == self.number)

    def published_by(self, token: str) -> int | None:
        """Return the number of the version that was published with this token, or None."""
        return next((n for n, kept in self.kept.items() if kept.token == token), None)

    # --- changes ------------------------------------------------------------------------------

    def committed(self, kept: Kept, keep: int, held: Collection[int] = ()) -> Record:
        """Add a new live and current version; `keep - 1` others stay live."""
        number = self.last + 1
        kept = replace(kept, version=replace(kept.version, number=number, state="live"))
        added = replace(
            self, last=number, recent=(*self.recent, number), kept={**self.kept, number: kept}
        )
        return added.retired(added.recent[:-keep], held)

    def promoted(self, number: int) -> Record:
        """Make a live version current."""
        return replace(self, recent=(*(n for n in self.recent if n != number), number))

    def retired(self, numbers: Iterable[int], held: Collection[int] = ()) -> Record:
        """Retire live versions, and forget the oldest retired ones that no variant holds."""
        numbers = set(numbers)
        recent = tuple(number for number in self.recent if number not in numbers)
        over = sorted(self.kept.keys() - set(recent))
        kept = {number: kept for number, kept in self.kept.items() if number in recent}
        for number in [n for n in over if n in held or n in over[-_REMEMBERED:]]:
            was = self.kept[number]
            version = replace(was.version, state="retired")
            how = replace(was.plan, make=None, files=(), bases=())
            kept[number] = replace(was, version=version, plan=how, places=(), uses=())
        return replace(self, recent=recent, kept=kept)

    def rebuilt(
        self,
        number: int,
        block: str,
        place: Address | None,
        nbytes: int,
        uses: tuple[Use, ...] = (),
    ) -> Record:
        """Replace a lost block."""
        kept = self.kept[number].at(place)
        generation = kept.version.generation + 1
        version = replace(kept.version, generation=generation, nbytes=nbytes)
        return self._with(number, replace(kept, version=version, block=block, uses=uses))

    def healing(self, number: int, how: Plan) -> Record:
        """Set the plan by which a version is rebuilt if it is lost."""
        kept = self.kept[number]
        version = replace(kept.version, heals=how.heals)
        return self._with(number, replace(kept, version=version, plan=how))

    def superseded(self, files: Iterable[str], digest: str) -> Record:
        """Stop versions from healing from files that now hold another model."""
        record, files = self, set(files)
        for number, kept in self.live.items():
            if files & set(kept.plan.files) and kept.version.digest != digest:
                record = record.unhealing(number)
        return record

    def unhealing(self, number: int) -> Record:
        """Drop a version's plan: it lives as long as a copy of it."""
        return self.healing(number, replace(self.kept[number].plan, make=None, files=()))

    def _with(self, number: int, kept: Kept) -> Record:
        return replace(self, kept={**self.kept, number: kept})


# --- as bytes -------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """Return a record as bytes without any name of this package."""
    plain = {
        "schema": SCHEMA,
        "last": record.last,
        "recent": record.recent,
        "kept": {
            number: _fields(kept)
            | {"version": _fields(kept.version, "ref"), "plan": _fields(kept.plan)}
            for number, kept in record.kept.items()
        },
    }
    return pickle.dumps(plain, 5)


def decode(encoded: bytes) -> Record:
    """Read a record; raises `VersionError` if a newer ray_zerocopy wrote it."""
    plain = pickle.loads(encoded)
    if plain["schema"] > SCHEMA:
        raise VersionError(
            f"the records of published models are from a newer ray_zerocopy (schema "
            f"{plain['schema']}, this one reads up to {SCHEMA}): upgrade ray_zerocopy here"
        )
    kept = {
        number: Kept(
            **fields
            | {"version": Version(ref=None, **fields["version"]), "plan": Plan(**fields["plan"])}
        )
        for number, fields in plain["kept"].items()
    }
    return Record(plain["last"], plain["recent"], kept)


def _fields(of: Any, *but: str) -> dict[str, Any]:
    return {
        each.name: getattr(of, each.name) for each in dataclasses.fields(of) if each.name not in but
    }


def _known(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Raise `VersionError` for fields that a newer ray_zerocopy has added."""
    if unknown := sorted(fields.keys() - {each.name for each in dataclasses.fields(kind)}):
        raise VersionError(
            f"this {kind.__name__.lower()} is from a newer ray_zerocopy, with {unknown}: upgrade "
            f"ray_zerocopy here"
        )
    return fields
