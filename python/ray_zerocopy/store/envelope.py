"""How an object travels through Ray: as its skeleton, its table and its block.

object ─ `Shared` pickles ─▶ skeleton, table, block ═ Ray ═▶ `load` ─ a reader ─▶ object, or less
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ray_zerocopy import _core, metrics
from ray_zerocopy.errors import IsolationWarning, NoValuesWarning, PublishError, VersionError
from ray_zerocopy.objects import programs, tensors, torch_inside, transformers_inside
from ray_zerocopy.objects.culprit import can_be_published, culprit, paths_to, way_out
from ray_zerocopy.objects.skeleton import join, split
from ray_zerocopy.pickled import named
from ray_zerocopy.store import cycles, ray_inside
from ray_zerocopy.store.collector import quiet_collector
from ray_zerocopy.store.description import Info, describe

Isolation = Literal["private", "shared", "copy"]


class Shared:
    """An object that pickles as skeleton, table and block; unpickling gives the object itself.

    `put` wraps in it. A task may return one, so that Ray can make the block again from lineage.
    """

    def __init__(self, obj: object) -> None:
        self.obj = obj
        self.nbytes = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            with quiet_collector():
                parts = split(self.obj)
                block = _core.Gather(parts.sources)
                anchored, buffers = self._buffers(block)
        except Exception as error:
            if can_be_published(self.obj):  # what was raised is none of its own: by a signal, say
                raise
            reason = f"{error}{way_out(str(error))}"
            raise PublishError(f"{culprit(self.obj)} cannot be published: {reason}") from error
        if transformers_inside.is_offloaded(parts.skeleton):  # the values are its hooks', or files
            _warn_of_files(self.obj)
        elif torch_inside.holds_meta(parts.skeleton) and parts.sources.tensors:
            _warn_of_meta(self.obj)
        self.nbytes = len(parts.skeleton) + block.nbytes
        segments = buffers if protocol >= 5 else [buffer.raw().tobytes() for buffer in buffers]
        head = Parts(parts.skeleton, parts.buffers, block.table, [], anchored)
        return _reduced(head, segments)

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        return False, [pickle.PickleBuffer(segment) for segment in block.segments()]


def _warn_of_meta(obj: object) -> None:
    told = f"{without_values(obj)}: a loader may have failed; load them before put"
    warnings.warn(told, NoValuesWarning, stacklevel=2)


def without_values(obj: object) -> str:
    """Tell which tensors of an object have no values."""
    paths = list(paths_to(obj, lambda part: isinstance(part, torch.Tensor) and part.is_meta))
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return f"{', '.join(paths[:5])}{more} lie on the meta device and have no values"


def references_in(obj: object) -> str:
    """Give the path to a reference or actor in an object that holds one."""
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
    """One that leaves its block to `put`: its only buffer is where the block is to start."""

    block: _core.Gather

    def _buffers(self, block: _core.Gather) -> tuple[bool, list[pickle.PickleBuffer]]:
        self.block = block
        return True, [pickle.PickleBuffer(bytes(_core.HEADER_NBYTES))]


class Parts:
    """A stored object taken apart: pickles to the same bytes, whatever process made them.

    None of its classes need to be importable, and nothing is copied: the segments, one after the
    other and each at a multiple of 64 bytes, are the block where it lies. With `anchored` the only
    one is where the block is to start, as for `Anchored`.
    """

    def __init__(
        self,
        skeleton: bytes,
        buffers: list[int],
        table: bytes,
        segments: list[Any],
        anchored: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.buffers = buffers
        self.table = table
        self.segments = [memoryview(segment).cast("B") for segment in segments]
        self.anchored = anchored
        self.nbytes = sum(segment.nbytes for segment in self.segments)

    @classmethod
    def of(cls, obj: object) -> Parts:
        """Take apart an object that is not stored yet; raises `PublishError` as `put` does."""
        _, (head, *segments) = Shared(obj).__reduce_ex__(5)
        raw = [segment.raw() for segment in segments]
        return cls(head["skeleton"], head["buffers"], head["table"], raw)

    def __reduce_ex__(self, protocol: Any) -> Any:
        segments = [pickle.PickleBuffer(segment) for segment in self.segments]
        return _reduced(self, segments)

    @property
    def holds_tensors(self) -> bool:
        """Whether there is a tensor or a buffer in it, however small."""
        return _core.view_count(self.table) > 0

    def digest(self) -> str:
        """Give what equal objects share, and no others: 128 bits, in hexadecimal.

        It is a hash of the weights' checksums and of the object's structure, and the same in every
        process (`rust/format/digest.rs`). No weight is read.
        """
        parts = self.skeleton, self.table, self.buffers, self.segments[0]
        return _core.digest(*parts, programs.plain)


def open_block(parts: Parts, isolation: Isolation) -> _core.Block:
    """Map the block of a stored object.

    Raises `BlockError` where the segments are not the block of this table, and warns with
    `IsolationWarning` where private pages were asked for and shared ones are all there is.
    """
    connection = ray_inside.connection()
    block = _core.Block(parts.table, parts.segments, isolation, parts.anchored, connection)
    if block.held == "shared" and isolation == "private":
        message = f"{block.fallback}: a write into these weights changes every process on the node"
        warnings.warn(message, IsolationWarning, stacklevel=2)
    return block


Reader = Callable[[Parts], Any]


def anchor(parts: Parts) -> memoryview:
    """Read only where the block is to start."""
    return parts.segments[0]


def in_place(parts: Parts) -> Parts:
    """Read the parts, the block where it lies in the store."""
    whole = open_block(parts, "shared")
    return Parts(parts.skeleton, parts.buffers, parts.table, [whole])


@dataclass(frozen=True)
class Inspecting:
    """Read what `inspect` tells; nothing is unpickled."""

    verify: bool = False

    def __call__(self, parts: Parts) -> Info:
        """Describe a stored object."""
        block = open_block(parts, "private")
        return describe(block, parts.skeleton, self.verify)


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
        block = open_block(parts, self.isolation)
        return self.join(block, parts.skeleton, parts.buffers, start)

    def join(self, block: _core.Block, skeleton: bytes, views: list[int], start: float) -> Any:
        """Join an object over its block; `views` are its buffers, its load began at `start`."""
        if self.prefault and self.device is not None:  # the copy is to find the pages filled in
            block.prefault()
        with quiet_collector():
            over = tensors.over(block, views, self.device)
            buffers = tensors.buffers_over(block, views)
            made = partial(join, skeleton, over, buffers, self.device)
            loaded, modules = _core.noting_modules(made)
        if self.prefault:  # joining reads none: beside it, a thread only holds it up
            block.prefault()
        metrics.loaded(block, self.isolation, time.perf_counter() - start)
        cycles.watch(loaded, modules)
        return loaded


_AS_RAY_GET = Loading()
_READER: ContextVar[Reader] = ContextVar("ray_zerocopy_reader", default=_AS_RAY_GET)


@contextlib.contextmanager
def reading(reader: Reader) -> Iterator[None]:
    """Have `reader` make what is unpickled in here of its parts."""
    token = _READER.set(reader)
    try:
        yield
    finally:
        _READER.reset(token)


_HEAD = ("skeleton", "buffers", "table", "anchored")


def _reduced(parts: Parts, segments: list[Any]) -> Any:
    """Reduce a stored object to what `load` takes; the head may grow."""
    return load, ({name: getattr(parts, name) for name in _HEAD}, *segments)


@named
def load(head: dict[str, Any], *segments: Any) -> Any:
    """Unpickle what `put` stored, as the reader of this context wants it."""
    if unknown := sorted(head.keys() - set(_HEAD)):
        raise VersionError(
            f"this object was stored by a newer ray_zerocopy, with {unknown}: upgrade here"
        )
    return _READER.get()(Parts(segments=list(segments), **head))
