"""Pickle an object for Ray as skeleton, table and block, and read it again.

object ─ `Shared` pickles ─▶ skeleton, table, block ═ Ray ═▶ `load` ─ a reader ─▶ object, or less

A variant has some of its tensors in the blocks of other objects, its bases:

variant ─ `Shared` pickles ─▶ skeleton, table, block; for each base: reference, header, table
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import torch

from ray_zerocopy import _core, metrics
from ray_zerocopy.errors import (
    BaseLostError,
    IsolationWarning,
    NotABlockError,
    NoValuesWarning,
    PublishError,
    RayZeroCopyError,
    VersionError,
)
from ray_zerocopy.objects import programs, tensors, torch_inside, transformers_inside
from ray_zerocopy.objects.culprit import can_be_published, culprit, paths_to, way_out
from ray_zerocopy.objects.skeleton import join, split, to_host
from ray_zerocopy.pickled import named
from ray_zerocopy.store import cycles, ray_inside
from ray_zerocopy.store.collector import quiet_collector
from ray_zerocopy.store.description import Info, describe

Isolation = Literal["private", "shared", "copy"]


# A base of a variant: its reference, the header of its block, the table of the variant's tensors in
# that block (over the block's spans), and their numbers.
InBase = tuple[ray.ObjectRef, bytes, bytes, list[int]]

# What is not in bases, the numbers of its tensors, and the bases.
Rest = tuple[_core.Gather, Sequence[int], Sequence[InBase]]

Previous = Callable[[int], ray.ObjectRef | None]

# Of a version that shares with its previous one: its loads map few blocks, as versions drift apart.
_MOST_BASES = 3
_PREVIOUS_S = 2.0  # for the block of the previous version, which should be on this node


class Shared:
    """An object that pickles as skeleton, table and block; unpickling returns the object itself.

    `put` uses it. Return one from a task, so that Ray can rebuild the block from lineage.
    """

    to_host = staticmethod(to_host)

    def __init__(self, obj: object, bases: Sequence[ray.ObjectRef] = ()) -> None:
        self.obj = obj
        self.bases = bases
        self.nbytes = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            with quiet_collector():
                parts = split(self.obj, self.to_host)
                block = _core.Gather(parts.sources)
            block, numbers, bases = self._without(block)
            anchored, buffers = self._buffers(block)
        except (BaseLostError, NotABlockError):
            raise
        except Exception as error:
            if can_be_published(self.obj):  # the object is not the cause: a signal, for example
                raise
            reason = f"{error}{way_out(str(error))}"
            raise PublishError(f"{culprit(self.obj)} cannot be published: {reason}") from error
        if transformers_inside.is_offloaded(parts.skeleton):  # hooks or files have the values
            _warn_of_files(self.obj)
        elif torch_inside.holds_meta(parts.skeleton) and parts.sources.tensors:
            _warn_of_meta(self.obj)
        self.nbytes = len(parts.skeleton) + block.nbytes
        segments = buffers if protocol >= 5 else [buffer.raw().tobytes() for buffer in buffers]
        head = Parts(parts.skeleton, parts.buffers, block.table, [], anchored, numbers, bases)
        return _reduced(head, segments)

    def _without(self, whole: _core.Gather) -> Rest:
        return without(whole, self.bases)

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        return False, [pickle.PickleBuffer(segment) for segment in block.segments()]


def _warn_of_meta(obj: object) -> None:
    told = f"{without_values(obj)}: a loader may have failed; load them before put"
    warnings.warn(told, NoValuesWarning, stacklevel=2)


def without_values(obj: object) -> str:
    """Return a message that names the tensors without values."""
    paths = list(paths_to(obj, lambda part: isinstance(part, torch.Tensor) and part.is_meta))
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return f"{', '.join(paths[:5])}{more} lie on the meta device and have no values"


def references_in(obj: object) -> str:
    """Return the path to a reference or actor in an object that holds one."""
    return culprit(obj, lambda skeleton: not ray_inside.holds_references(skeleton))


def _warn_of_files(obj: object) -> None:
    for path in itertools.islice(paths_to(obj, transformers_inside.reads_files), 1):
        warnings.warn(
            f"{path} reads weights from files at each call: they are not stored, and only nodes "
            f"with these files can call the model; load it without disk offload before put",
            NoValuesWarning,
            stacklevel=2,
        )


class Anchored(Shared):
    """A `Shared` whose block `put` writes later: its only buffer marks the start of the block.

    `previous` takes the size of the block, and returns the object's previous version, or None.
    """

    block: _core.Gather

    def __init__(
        self, obj: object, bases: Sequence[ray.ObjectRef] = (), previous: Previous | None = None
    ) -> None:
        super().__init__(obj, bases)
        self.previous = previous

    def _without(self, whole: _core.Gather) -> Rest:
        ref = self.previous(whole.nbytes) if self.previous else None
        return super()._without(whole) if ref is None else without_previous(whole, ref)

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        self.block = block
        return True, [pickle.PickleBuffer(bytes(_core.HEADER_NBYTES))]


class Parts:
    """The parts of a stored object; they pickle to the same bytes in every process.

    The object's classes need not be importable, and nothing is copied: `segments`, one after the
    other and each at a multiple of 64 bytes, are the block in place. With `anchored` the only
    segment marks the start of the block, as in `Anchored`. A variant's block has the tensors with
    these `numbers`; its `bases` have the others.
    """

    def __init__(
        self,
        skeleton: bytes,
        buffers: list[int],
        table: bytes,
        segments: list[Any],
        anchored: bool = False,
        numbers: Sequence[int] = (),
        bases: Sequence[InBase] = (),
    ) -> None:
        self.skeleton = skeleton
        self.buffers = buffers
        self.table = table
        self.segments = [memoryview(segment).cast("B") for segment in segments]
        self.anchored = anchored
        self.numbers = numbers
        self.bases = bases
        self.nbytes = sum(segment.nbytes for segment in self.segments)

    @classmethod
    def of(cls, obj: object) -> Parts:
        """Split an object that is not stored yet; raises `PublishError` as `put` does.

        The parts of an `Anchored` object lack its block: the caller writes it.
        """
        shared = obj if isinstance(obj, Shared) else Shared(obj)
        _, (head, *segments) = shared.__reduce_ex__(5)
        return cls(segments=[segment.raw() for segment in segments], **head)

    def __reduce_ex__(self, protocol: Any) -> Any:
        segments = [pickle.PickleBuffer(segment) for segment in self.segments]
        return _reduced(self, segments)

    @property
    def holds_tensors(self) -> bool:
        """Whether it has a tensor or a buffer, however small."""
        return _core.view_count(self.table) > 0 or bool(self.bases)

    def digest(self) -> str:
        """Return 128 bits in hexadecimal: the same for equal objects, and only for them.

        It hashes the weights' checksums and the object's structure, reads no weights, and is the
        same in every process (`rust/format/digest.rs`).
        """
        if self.bases:
            blocks = open_blocks(self, "shared")
            return _core.digest_of_blocks(self.skeleton, self.buffers, blocks, programs.plain)
        parts = self.skeleton, self.table, self.buffers, self.segments[0]
        return _core.digest(*parts, programs.plain)


def open_block(
    parts: Parts, isolation: Isolation, variant: tuple[bytes, bytes] | None = None
) -> _core.Block:
    """Map the block of a stored object; `variant`: header and table for the block of a base.

    Raises `BlockError` if the segments are not the block of this table. Warns with
    `IsolationWarning` if the caller asked for private pages and only shared ones are possible.
    """
    connection = ray_inside.connection()
    block = _core.Block(parts.table, parts.segments, isolation, parts.anchored, connection, variant)
    if block.held == "shared" and isolation == "private":
        message = (
            f"loaded without copy-on-write ({block.fallback}): writing to these weights changes "
            f"them in every process on this node"
        )
        warnings.warn(message, IsolationWarning, stacklevel=2)
    return block


# The blocks of an object, each with the numbers of its tensors.
Placed = list[tuple[_core.Block, Sequence[int]]]


def open_blocks(parts: Parts, isolation: Isolation) -> Placed:
    """Map the blocks of a stored object and its bases; raises `BaseLostError`, too."""
    own = open_block(parts, isolation)
    if not parts.bases:
        return [(own, range(own.view_count))]
    ends_s = _ENDS_S.get()
    left_s = None if ends_s is None else max(0.0, ends_s - time.monotonic())
    found = fetch([ref for ref, *_ in parts.bases], left_s)
    others = [
        (open_block(base, isolation, (header, table)), numbers)
        for (_, header, table, numbers), base in zip(parts.bases, found, strict=True)
    ]
    return [(own, parts.numbers), *others]


def without(whole: _core.Gather, refs: Sequence[ray.ObjectRef]) -> Rest:
    """Leave out tensors that these objects or their bases have; a load maps each block once."""
    if not refs:
        return whole, (), ()
    stored = dict(zip(refs, fetch(refs), strict=True))
    further = {ref for parts in stored.values() for ref, *_ in parts.bases} - stored.keys()
    stored.update(zip(further, fetch(list(further)), strict=True))
    blocks = [open_block(parts, "shared") for parts in stored.values()]
    return _over(whole, list(stored), blocks, whole.without(blocks))


def without_previous(whole: _core.Gather, ref: ray.ObjectRef) -> Rest:
    """Leave out tensors that the previous version has, if that saves a quarter of the bytes."""
    try:
        (parts,) = fetch([ref], _PREVIOUS_S)
        placed = open_blocks(parts, "shared")
    except (RayZeroCopyError, ray.exceptions.RayError):
        return whole, (), ()
    refs = [ref, *(base for base, *_ in parts.bases)]
    blocks = [block for block, _ in placed]
    return _over(whole, refs, blocks, whole.without_previous(placed, _MOST_BASES))


def _over(
    whole: _core.Gather,
    refs: Sequence[ray.ObjectRef],
    blocks: Sequence[_core.Block],
    rest: tuple[_core.Gather, list[int], list[tuple[bytes, list[int]]]],
) -> Rest:
    own, numbers, tables = rest
    bases = [
        (ref, bytes(memoryview(block)[: _core.HEADER_NBYTES]), table, there)
        for ref, block, (table, there) in zip(refs, blocks, tables, strict=True)
        if there
    ]
    return (own, numbers, bases) if bases else (whole, (), ())


# Ray's errors for an object that is lost for good.
LOST = (
    ray.exceptions.ObjectLostError,
    ray.exceptions.RayTaskError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
)


def fetch(refs: Sequence[ray.ObjectRef], timeout: float | None = None) -> list[Parts]:
    """Get the parts of stored objects without mapping their blocks.

    Raises:
        BaseLostError: one of them is gone.
        NotABlockError: one of them does not come from `put`.

    """
    try:
        with reading(lambda parts: parts):
            found: list[Parts] = ray.get(list(refs), timeout=timeout)
    except LOST as error:
        raise BaseLostError(
            f"a base of this variant is gone ({type(error).__name__}): put it again, then its "
            f"variants; a base ends with the process that put it, or with its version"
        ) from error
    for ref, parts in zip(refs, found, strict=True):
        if not isinstance(parts, Parts):
            kind = type(parts).__name__
            raise NotABlockError(f"{ref} holds a {kind}, not what ray_zerocopy.put stores")
    return found


Reader = Callable[[Parts], Any]


def anchor(parts: Parts) -> memoryview:
    """Read only the start of the block."""
    return parts.segments[0]


def in_place(parts: Parts) -> Parts:
    """Read the parts, with the block in place in the store; copy a variant into one block."""
    if parts.bases:
        block = _core.Gather.of_blocks(open_blocks(parts, "shared"))
        segments = [memoryview(segment) for segment in block.segments()]
        return Parts(parts.skeleton, parts.buffers, block.table, segments)
    return as_written(parts)


def as_written(parts: Parts) -> Parts:
    """Read the parts, with the own block of a variant in place in the store."""
    head = parts.skeleton, parts.buffers, parts.table
    own = open_block(parts, "shared")
    return Parts(*head, [own], False, parts.numbers, parts.bases)


@dataclass(frozen=True)
class Inspecting:
    """Read the description for `inspect`, without unpickling the object."""

    verify: bool = False

    def __call__(self, parts: Parts) -> Info:
        """Describe a stored object."""
        return describe(open_blocks(parts, "private"), parts.skeleton, self.verify)


@dataclass(frozen=True)
class Loading:
    """Read the object itself, over its block."""

    isolation: Isolation = "private"
    prefault: bool = True
    device: torch.device | str | None = None

    def __call__(self, parts: Parts) -> Any:
        """Map the block, and join the object over it."""
        start = time.perf_counter()
        cycles.look()
        blocks = open_blocks(parts, self.isolation)
        return self.join(blocks, parts.skeleton, parts.buffers, start)

    def join(self, blocks: Placed, skeleton: bytes, views: list[int], start: float) -> Any:
        """Join an object over its blocks; `views` are its buffers, the load began at `start`."""
        if self.prefault and self.device is not None:  # so that the copy has no page faults
            _prefault(blocks)
        with quiet_collector():
            over, buffers = tensors.over_blocks(blocks, views, self.device)
            made = partial(join, skeleton, over, buffers, self.device)
            loaded, modules = _core.noting_modules(made)
        if self.prefault:  # after join, which reads no page: a thread beside it only slows it down
            _prefault(blocks)
        metrics.loaded(blocks[0][0], self.isolation, time.perf_counter() - start)
        cycles.watch(loaded, modules)
        return loaded


def _prefault(blocks: Placed) -> None:
    for block, _ in blocks:
        block.prefault()


_AS_RAY_GET = Loading()
_READER: ContextVar[Reader] = ContextVar("ray_zerocopy_reader", default=_AS_RAY_GET)


@contextlib.contextmanager
def reading(reader: Reader) -> Iterator[None]:
    """Inside this context, unpickling a stored object returns `reader(parts)`."""
    token = _READER.set(reader)
    try:
        yield
    finally:
        _READER.reset(token)


_ENDS_S: ContextVar[float | None] = ContextVar("ray_zerocopy_ends", default=None)


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Inside this context, unpickling a variant waits no longer than this for its bases."""
    token = _ENDS_S.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _ENDS_S.reset(token)


_HEAD = ("skeleton", "buffers", "table", "anchored")
_OF_A_VARIANT = ("numbers", "bases")


def _reduced(parts: Parts, segments: list[Any]) -> Any:
    """Reduce a stored object to the arguments of `load`; the head may get more keys."""
    names = _HEAD + _OF_A_VARIANT if parts.bases else _HEAD
    return load, ({name: getattr(parts, name) for name in names}, *segments)


@named
def load(head: dict[str, Any], *segments: Any) -> Any:
    """Unpickle a stored object with the reader of this context."""
    if unknown := sorted(head.keys() - set(_HEAD + _OF_A_VARIANT)):
        raise VersionError(
            f"a newer ray_zerocopy stored this object, with {unknown}: upgrade ray_zerocopy here"
        )
    return _READER.get()(Parts(segments=list(segments), **head))
