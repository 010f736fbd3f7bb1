"""What is published under a name, and every way in which that changes: plain values, no reference.

                 committed            promoted, rebuilt, superseded
    (staging) ─────────────▶ live ◀───────────────────────┘
                              │ retired, or more than `keep`
                              ▼
                           retired ─ the oldest are forgotten

A record never changes: each method gives another one. The catalog writes that, and then acts.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray

from ray_zerocopy.calls.replacement import StandsForModel
from ray_zerocopy.errors import VersionError
from ray_zerocopy.pickled import named
from ray_zerocopy.store.ray_inside import Address

Source = Literal["object", "make", "path"]
Key = tuple[str, int]  # of a version: its name and number

SCHEMA = 1
_REMEMBERED = 16  # retired versions that a name still lists
_PLACES = 3  # generations whose copies may be in use somewhere


@dataclass(frozen=True)
class Version(StandsForModel):
    """A published block: a name, a number, and where it came from."""

    name: str
    number: int
    """1, 2, 3 …; 0 while it is staging, as it is given when it is live."""
    ref: ray.ObjectRef | None
    """An ordinary reference; None while the block is being made, and once it is retired."""
    nbytes: int
    """Bytes in the block."""
    digest: str
    """128 bits, in hexadecimal: equal for equal weights and structure, in every process."""
    source: Source
    """`"object"`, `"make"` or `"path"`: what was published."""
    heals: bool
    """Whether the block can be made again when every copy is lost, as it was made once."""
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

    @property
    def mark(self) -> tuple[int, int]:
        """What changes when a name stands for another block."""
        return self.number, self.generation

    def __reduce__(self) -> Any:
        return version, (_fields(self),)


@named
def version(fields: dict[str, Any]) -> Version:
    """Unpickle a version; raises `VersionError` where a newer ray_zerocopy has pickled it."""
    return Version(**_known(Version, fields))


@dataclass(frozen=True)
class Plan:
    """How the block of a version is made, and made again."""

    source: Source
    node: str
    """Where it is made, if that node is there: where the publisher is."""
    make: bytes | None = None
    """The pickle of a callable that gives the object."""
    files: tuple[str, ...] = ()
    """Snapshots, of which the first with the version's digest is read."""
    seconds: float = 3600.0
    """How long it may take."""

    @property
    def heals(self) -> bool:
        """Whether the block can be made again when every copy of it is gone."""
        return self.make is not None or bool(self.files)

    def __reduce__(self) -> Any:
        return plan, (_fields(self),)


@named
def plan(fields: dict[str, Any]) -> Plan:
    """Unpickle a plan; raises `VersionError` where a newer ray_zerocopy has pickled it."""
    return Plan(**_known(Plan, fields))


@dataclass(frozen=True)
class Kept:
    """A version as its name's record has it."""

    version: Version
    plan: Plan
    token: str
    """Who published it: told again, a publication is the same one."""
    block: str
    """What the owner holds its block by."""
    places: tuple[Address, ...]
    """Where its last blocks are: a view in use may be of one before this."""

    def at(self, place: Address | None) -> Kept:
        """With one more place; where Ray keeps no place, with those that there were."""
        places = self.places if place is None else (*self.places, place)
        return replace(self, places=places[-_PLACES:])


@dataclass(frozen=True)
class Record:
    """A name: its versions, and which of them is current."""

    last: int = 0
    """The highest number ever given: none is given twice."""
    recent: tuple[int, ...] = ()
    """The live versions, by when they were last current; the last one is."""
    kept: Mapping[int, Kept] = field(default_factory=dict)
    """Live and lately retired versions, by number."""

    # --- questions ----------------------------------------------------------------------------

    @property
    def number(self) -> int | None:
        """The number of the current version."""
        return self.recent[-1] if self.recent else None

    @property
    def current(self) -> Version | None:
        """The version that the name stands for."""
        return self.version(self.recent[-1]) if self.recent else None

    @property
    def live(self) -> dict[int, Kept]:
        """The live versions, by number."""
        return {number: self.kept[number] for number in self.recent}

    def version(self, number: int) -> Version:
        """Give a version, and whether it is current."""
        return replace(self.kept[number].version, current=number == self.number)

    def published_by(self, token: str) -> int | None:
        """Give the number of what was published by this token, or None."""
        return next((n for n, kept in self.kept.items() if kept.token == token), None)

    # --- changes ------------------------------------------------------------------------------

    def committed(self, kept: Kept, keep: int) -> Record:
        """Have a new version live and current; of the others, `keep - 1` stay."""
        number = self.last + 1
        kept = replace(kept, version=replace(kept.version, number=number, state="live"))
        added = replace(
            self, last=number, recent=(*self.recent, number), kept={**self.kept, number: kept}
        )
        return added.retired(added.recent[:-keep])

    def promoted(self, number: int) -> Record:
        """Have a live version current."""
        return replace(self, recent=(*(n for n in self.recent if n != number), number))

    def retired(self, numbers: Iterable[int]) -> Record:
        """Retire live versions, and forget the oldest of the retired."""
        numbers = set(numbers)
        recent = tuple(number for number in self.recent if number not in numbers)
        over = sorted(self.kept.keys() - set(recent))
        kept = {number: kept for number, kept in self.kept.items() if number in recent}
        for number in over[-_REMEMBERED:]:
            was = self.kept[number]
            version = replace(was.version, state="retired")
            how = replace(was.plan, make=None, files=())
            kept[number] = replace(was, version=version, plan=how, places=())
        return replace(self, recent=recent, kept=kept)

    def rebuilt(self, number: int, block: str, place: Address | None) -> Record:
        """Have another block in place of one that is lost."""
        kept = self.kept[number].at(place)
        version = replace(kept.version, generation=kept.version.generation + 1)
        return self._with(number, replace(kept, version=version, block=block))

    def healing(self, number: int, how: Plan) -> Record:
        """Have a version made by this plan, if it is lost."""
        kept = self.kept[number]
        version = replace(kept.version, heals=how.heals)
        return self._with(number, replace(kept, version=version, plan=how))

    def superseded(self, files: Iterable[str], digest: str) -> Record:
        """Have no version healed from files that are another's from now on."""
        record, files = self, set(files)
        for number, kept in self.live.items():
            if files & set(kept.plan.files) and kept.version.digest != digest:
                record = record.unhealing(number)
        return record

    def unhealing(self, number: int) -> Record:
        """Have a version live as long as a copy of it does."""
        return self.healing(number, replace(self.kept[number].plan, make=None, files=()))

    def _with(self, number: int, kept: Kept) -> Record:
        return replace(self, kept={**self.kept, number: kept})


# --- as bytes -------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """Give a record as bytes, which name nothing of ours."""
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
    """Read a record; raises `VersionError` where a newer ray_zerocopy has written it."""
    plain = pickle.loads(encoded)
    if plain["schema"] > SCHEMA:
        raise VersionError(
            f"what is published here was written by a newer ray_zerocopy (schema "
            f"{plain['schema']}, this one reads up to {SCHEMA}): upgrade here"
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
    """Refuse fields that a newer version has added."""
    if unknown := sorted(fields.keys() - {each.name for each in dataclasses.fields(kind)}):
        raise VersionError(
            f"a {kind.__name__.lower()} of a newer ray_zerocopy, with {unknown}: upgrade here"
        )
    return fields
