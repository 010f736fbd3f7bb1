"""The actor that owns the blocks of published versions; it outlives drivers, and holds no bytes.

    Owner ═ a task, max_retries=-1 ═▶ make, or read ──▶ block, owned by the Owner
    Owner ═ a Copier of the node ═══▶ room, which the publisher fills ─▶ block, owned by the Owner
                                ╰══▶ copy a stored object ─▶ the same

Blocks that heal are results of tasks, so that Ray rebuilds them from lineage if their node is lost.
The task compares its result with the digest in the manifest: a version never changes. A copy has no
lineage, because that would keep the original object too.

Each block has a token; the catalog asks for the block and drops it by that. Dropping a block that
is still being made stops the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_zerocopy import _core, metrics
from ray_zerocopy.errors import (
    BaseLostError,
    BlockError,
    CatalogError,
    LostVersionError,
    PublishError,
    RayZeroCopyError,
    StoreFullError,
)
from ray_zerocopy.objects import torch_inside
from ray_zerocopy.registry import manifest
from ray_zerocopy.registry.records import Plan
from ray_zerocopy.store import inspection, ray_inside, references, snapshot
from ray_zerocopy.store.envelope import (
    LOST,
    InBase,
    Parts,
    Shared,
    anchor,
    as_written,
    fetch,
    reading,
    references_in,
    without_values,
)
from ray_zerocopy.store.loader import following
from ray_zerocopy.store.ray_inside import INLINE_NBYTES, holds_references, located

# The errors for a version that is lost for good; a model's own errors are not among them.
LOSSES = (*LOST, BaseLostError)

_MAKE_NBYTES = 2**20
_IDLE_S = 60.0
_RESCUE_S = 30.0  # for a node to answer whether it has a copy
_COPIED_A_SECOND = 1e8  # bytes, by a busy node: it reads them, and writes them to other pages
_TRIES = 3  # processes that may die while they make a block
_CHECK_S = 60.0  # to read a block that a process could not load


class AnotherModelError(LostVersionError):
    """The plan of a version now returns another model."""


@dataclass(frozen=True)
class Made:
    """The result of making a block."""

    nbytes: int
    digest: str
    ref: ray.ObjectRef | None
    """None if the name's current version is equal: nothing was stored."""
    incarnation: str = ""
    """The incarnation of the owner that holds it."""
    bases: tuple[bytes, ...] = ()
    """The ids of the blocks with some of its tensors, for a block made by its plan."""


@dataclass(frozen=True)
class Draft:
    """An object that its publisher writes itself, once, into room that the owner has made."""

    skeleton: bytes
    buffers: list[int]
    table: bytes
    nbytes: int
    """Size of its block."""
    numbers: Sequence[int] = ()
    bases: Sequence[InBase] = ()

    def parts(self) -> Parts:
        """Return its parts without the block, for Ray to store."""
        start = bytes(_core.HEADER_NBYTES)
        variant = self.numbers, self.bases
        return Parts(self.skeleton, self.buffers, self.table, [start], True, *variant)


class Owner:
    """Makes blocks by tasks, and holds their references by token.

    A new process starts with none: blocks of its predecessor are lost, and the catalog rebuilds
    them. `incarnation` identifies the process.
    """

    def __init__(self) -> None:
        self._incarnation = uuid.uuid4().hex
        self._node = ray.get_runtime_context().get_node_id()
        self._blocks: dict[str, asyncio.Task[Made | None]] = {}
        self._tasks: dict[str, ray.ObjectRef] = {}
        self._tries: Counter[str] = Counter()
        self._copiers: dict[str, tuple[Any, asyncio.TimerHandle]] = {}

    async def held(self) -> tuple[str, dict[str, ray.ObjectRef | None]]:
        """Return the incarnation, and the held references by token; None while being made."""
        done = {token: block.result() for token, block in self._blocks.items() if block.done()}
        refs = {token: made.ref for token, made in done.items() if made is not None}
        return self._incarnation, dict.fromkeys(self._blocks) | refs

    async def starts(self, token: str) -> bool:
        """Count a try to make a block; returns whether it is the first making of the block.

        If the processes of the tries before have died, this ends the work.
        """
        block = self._blocks.get(token)
        if block is None or block.done():
            return False
        self._tries[token] += 1
        if self._tries[token] > _TRIES and (task := self._tasks.get(token)) is not None:
            ray.cancel(task, force=True)
        return True

    async def watch(self, incarnation: str, wait_s: float) -> list[str] | None:
        """Wait, then return the tokens of held blocks; None at once for another incarnation.

        If this process dies, the call ends early with an error.
        """
        if incarnation != self._incarnation:
            return None
        await asyncio.sleep(wait_s)
        return list(self._blocks)

    # --- making -------------------------------------------------------------------------------

    async def make(
        self,
        token: str,
        name: str,
        plan: Plan,
        digest: str | None,
        bases: Sequence[ray.ObjectRef] = (),
    ) -> Made:
        """Make a block by its plan, and hold it; repeated calls for a token share one run.

        `digest` is the expected digest; None for the first time. `bases` are the blocks of the
        plan's bases that there are.

        Raises:
            AnotherModelError: the block has another digest.
            PublishError, StoreFullError, CatalogError: it could not be made, or was dropped.

        """
        made: Made = await self._once(token, lambda: self._make(token, name, plan, digest, bases))
        return made

    async def copy(
        self, token: str, name: str, plan: Plan, digest: str, copied: list[ray.ObjectRef]
    ) -> Made:
        """Copy an object's block on its node, and hold the copy; otherwise like `make`."""

        def copy(copier: Any) -> Any:
            return copier.copy.remote(copied, plan.seconds)

        made: Made = await self._once(token, lambda: self._at_node(name, plan, copy))
        return dataclasses.replace(made, digest=digest)

    async def reserve(self, token: str, name: str, plan: Plan, draft: Draft) -> Made:
        """Make room for an object on its node, and hold it; `nbytes` is its size. Like `make`.

        On this node, it needs no other process.
        """

        def reserve(copier: Any) -> Any:
            return copier.reserve.remote(draft)

        def work() -> Coroutine[Any, Any, Made]:
            here = plan.node == self._node and ray_inside.way == "room"
            return self._room_here(draft) if here else self._at_node(name, plan, reserve)

        made: Made = await self._once(token, work)
        return made

    async def _room_here(self, draft: Draft) -> Made:
        try:
            with reading(anchor):  # in a thread, because a put into a full store takes long
                room = await asyncio.to_thread(ray_inside.put, draft.parts(), lambda: draft.nbytes)
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error
        if room is None:
            raise CatalogError("this Ray version cannot make room for a publisher to write")
        return Made(room.memory.nbytes, "", room.ref, self._incarnation)

    async def rescue(
        self, token: str, lost: list[ray.ObjectRef], digest: str, nodes: list[str]
    ) -> Made | None:
        """Copy a block whose owner died, from a node that still has it, and hold the copy.

        Ray keeps such a block while a process maps it, and only processes on that node can get it.
        This asks all nodes at once, each for the newest block first, and copies the first whose
        bytes are right. None if no node has one.
        """
        made: Made | None = await self._once(token, lambda: self._rescue(lost, digest, nodes))
        return made

    async def drop(self, tokens: Sequence[str]) -> None:
        """Drop blocks; their bytes are free when no process maps them.

        For blocks still being made, this ends the worker.
        """
        for token in tokens:
            if block := self._blocks.pop(token, None):
                block.cancel()
            if task := self._tasks.pop(token, None):
                ray.cancel(task, force=True)

    async def _once(self, token: str, work: Callable[[], Coroutine[Any, Any, Made | None]]) -> Any:
        """Start the work for a token, unless it is done or running, and wait for it."""
        block = self._blocks.get(token)
        if block is None:
            block = self._blocks[token] = asyncio.ensure_future(work())
            block.add_done_callback(functools.partial(self._keep_or_forget, token))
        await asyncio.wait([block])
        if block.cancelled():
            raise CatalogError("this publication was abandoned: publish again")
        return block.result()

    def _keep_or_forget(self, token: str, block: asyncio.Task[Made | None]) -> None:
        failed = block.cancelled() or block.exception() is not None
        made = None if failed else block.result()
        if (made is None or made.ref is None) and self._blocks.get(token) is block:
            del self._blocks[token]
            self._tasks.pop(token, None)
        if made is not None and made.ref is not None:
            metrics.record("rzc_published_bytes", made.nbytes)  # a worker may end before Ray asks

    async def _make(
        self,
        token: str,
        name: str,
        plan: Plan,
        digest: str | None,
        bases: Sequence[ray.ObjectRef],
    ) -> Made:
        me = ray.get_runtime_context().current_actor
        asked = token, name, plan, digest, list(bases), me
        block, facts = _build.options(**_on(plan.node, soft=True)).remote(*asked)
        self._tasks[token] = block
        try:
            nbytes, found, stored, used = await asyncio.wait_for(facts, plan.seconds)
        except TimeoutError:
            ray.cancel(block, force=True)
            raise CatalogError(
                f"{name!r} was not made in {plan.seconds:g} s: publish it with a larger timeout"
            ) from None
        except ray.exceptions.RayError as error:
            if self._tries[token] > _TRIES:
                raise CatalogError(
                    f"{name!r} was not made: each of {_TRIES} processes that made it died, for "
                    f"lack of memory or in a crash; see the logs of their node"
                ) from error
            raise cause_of(error) from error
        finally:
            self._tries.pop(token, None)
        return Made(nbytes, found, block if stored else None, self._incarnation, used)

    async def _at_node(self, name: str, plan: Plan, ask: Callable[[Any], Any]) -> Made:
        # with soft=True, Ray puts actors on any node
        copier = self._let_go(plan.node) or Copier.options(**_on(plan.node)).remote()  # type: ignore[attr-defined]
        leaving = asyncio.get_running_loop().call_later(_IDLE_S, self._let_go, plan.node)
        self._copiers[plan.node] = copier, leaving
        block, nbytes = ask(copier)
        try:
            nbytes = await asyncio.wait_for(nbytes, plan.seconds)
            return Made(nbytes, "", block, self._incarnation)
        except TimeoutError:
            raise CatalogError(
                f"{name!r} was not copied in {plan.seconds:g} s: publish it with a larger timeout"
            ) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
            self._let_go(plan.node)
            raise CatalogError(
                f"{name!r} was not copied: the copying process died; publish it again: {error}"
            ) from error
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error

    def _let_go(self, node: str) -> Any:
        """Remove and return a node's copier; without a handle, Ray ends it after its last copy."""
        copier, leaving = self._copiers.pop(node, (None, None))
        if leaving is not None:
            leaving.cancel()
        return copier

    async def _rescue(
        self, lost: list[ray.ObjectRef], digest: str, nodes: list[str]
    ) -> Made | None:
        asks = [asyncio.ensure_future(self._held_by(node, lost)) for node in nodes]
        try:
            for ask in asyncio.as_completed(asks):
                node, nbytes = await ask
                if nbytes is not None:
                    seconds = _RESCUE_S + nbytes / _COPIED_A_SECOND
                    block, copied = _copy_of.options(**_on(node)).remote(lost, digest)
                    if (nbytes := await _answer(copied, seconds)) is not None:
                        return Made(nbytes, digest, block)
            return None
        finally:
            for ask in asks:
                ask.cancel()

    async def _held_by(self, node: str, lost: list[ray.ObjectRef]) -> tuple[str, int | None]:
        """Return a node and the size of the block that it has, or None."""
        return node, await _answer(_size_of.options(**_on(node)).remote(lost), _RESCUE_S)

    async def check(self, block: list[ray.ObjectRef], node: str) -> str | None:
        """Return what is wrong with a block that a process on a node could not load, or None.

        Another process on that node reads it and compares it with its checksums.
        """
        places, nbytes = await asyncio.to_thread(located, block[0])
        if not places and nbytes > INLINE_NBYTES:
            return "no node has it"
        answer = _check.options(**_on(node, soft=True)).remote(block)
        found: str | None = await _answer(answer, 2 * _CHECK_S)
        return found


def _on(node: str, *, soft: bool = False) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=soft)}


async def _answer(ref: ray.ObjectRef, seconds: float) -> Any:
    """Return a task's answer, or None if it failed or took too long."""
    try:
        return await asyncio.wait_for(ref, seconds)
    except ray.exceptions.RayError:
        return None
    except TimeoutError:
        ray.cancel(ref, force=True)
        return None
    except asyncio.CancelledError:
        ray.cancel(ref, force=True)
        raise


# --- tasks that make blocks -----------------------------------------------------------------------


@ray.remote(num_cpus=0, max_concurrency=8)
class Copier:
    """Makes room for objects on its node, or copies them, a few at a time.

    A task would need a new worker each time, with seconds of imports: the owner's job is over, and
    Ray ends idle workers of such jobs.
    """

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    def copy(self, copied: list[ray.ObjectRef], seconds: float) -> Any:
        """Return a copy of the block of this reference, and its size."""
        parts = references.parts_of(copied[0], timeout=seconds)
        return parts, parts.nbytes

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    def reserve(self, draft: Draft) -> Any:
        """Return an object with room for its block, and its size."""
        return ray_inside.with_room(draft.parts(), draft.nbytes)


# A new process for each, so that torch's counters, such as for TorchScript's names, start at zero.
@ray.remote(num_cpus=0, num_returns=2, max_retries=-1, max_calls=1)  # type: ignore[untyped-decorator]
def _build(
    token: str,
    name: str,
    plan: Plan,
    digest: str | None,
    bases: list[ray.ObjectRef],
    owner: Any,
) -> Any:
    """Return a block and its (nbytes, digest, whether it is stored, ids of the bases in use)."""
    record = manifest.read(name)
    number = record.published_by(token)
    if digest is None and number is not None:  # Ray is rebuilding a lost block
        digest = record.kept[number].version.digest
    if not ray.get(owner.starts.remote(token)) and digest is None:
        raise LostVersionError(
            f"a version of {name!r} that was retired long ago is lost: load a live version"
        )
    bases = [base for base in bases if _is_there(base)]  # else the block is whole
    if plan.files:
        obj, parts = None, _restored(name, plan.files, digest, bases)
    else:
        obj = _called(name, plan.make)
        parts = Parts.of(Shared(obj, bases))
    complete(parts, f"the object of {name!r}", obj)
    found = parts.digest()
    if digest is None and record.current is not None and record.current.digest == found:
        return None, (parts.nbytes, found, False, ())
    if digest not in (None, found):
        raise AnotherModelError(
            f"make or path of {name!r} now gives another model ({found[:12]}) than was published "
            f"({digest[:12]}): publish it again, with snapshot= if make does not return the same "
            f"model each time"
        )
    used = tuple(ref.binary() for ref, *_ in parts.bases)
    return parts, (parts.nbytes, found, True, used)


def _is_there(base: ray.ObjectRef) -> bool:
    try:
        fetch([base], _RESCUE_S)
    except (ray.exceptions.RayError, RayZeroCopyError):
        return False
    return True


def _called(name: str, make: bytes | None) -> Any:
    assert make is not None
    try:
        with following(_core.Arena()):
            return cloudpickle.loads(make)()
    except ImportError as error:
        raise PublishError(
            f"the cluster cannot make {name!r} outside of your job and its working_dir: {error}; "
            f"install the module on every node, define make in __main__, or pickle it by value "
            f"(ray.cloudpickle.register_pickle_by_value)"
        ) from error


def _restored(
    name: str, files: Sequence[str], digest: str | None, bases: list[ray.ObjectRef]
) -> Parts:
    """Read the first of these snapshots with the version's digest, checked, into the store."""
    others, failed = [], []
    for path in files:
        try:
            if digest is None or snapshot.digest(path) == digest:
                return references.parts_of(snapshot.restore(path, base=bases), reader=as_written)
            others.append(path)
        except (OSError, BlockError) as error:
            failed.append(str(error))
    if others:
        raise AnotherModelError(
            f"{' and '.join(others)} now holds another model than {name!r} was published from: "
            f"publish it again, from a file that is not overwritten"
        )
    raise CatalogError(f"{name!r} cannot be read: {'; '.join(failed)}")


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _size_of(lost: list[ray.ObjectRef]) -> int | None:
    """Return the size of the newest of these blocks on this node, or None."""
    for ref in reversed(lost):
        with contextlib.suppress(ray.exceptions.RayError, RayZeroCopyError):
            info = references.describe(ref, timeout=_RESCUE_S / 2 / len(lost))
            return info.nbytes + info.base_nbytes
    return None


@ray.remote(num_cpus=0, num_returns=2, max_retries=0)  # type: ignore[untyped-decorator]
def _copy_of(lost: list[ray.ObjectRef], digest: str) -> Any:
    """Return a copy of the newest of these blocks on this node, and its size, or None."""
    seconds = _RESCUE_S / 2 / len(lost)
    for ref in reversed(lost):
        try:
            references.describe(ref, verify=True, timeout=seconds)  # a process may have written it
            parts = references.parts_of(ref, timeout=seconds)
        except (ray.exceptions.RayError, RayZeroCopyError):
            continue
        if parts.digest() == digest:
            return parts, parts.nbytes
    return None, None


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _check(block: list[ray.ObjectRef]) -> str | None:
    """Return what is wrong with a block: its checksums differ, or it is lost. None if intact."""
    try:
        inspection.inspect(block[0], verify=True, timeout=_CHECK_S)
    except ray.exceptions.GetTimeoutError:
        return None
    except (*LOSSES, BlockError) as error:
        return str(error)
    return None


# --- errors ---------------------------------------------------------------------------------------


def complete(parts: Parts, what: str, obj: Any = None) -> None:
    """Raise `PublishError` for an object without tensors, or with tensors that cannot be shared."""
    if torch_inside.holds_meta(parts.skeleton):
        tensors = "tensors lie on the meta device" if obj is None else without_values(obj)
        raise PublishError(f"{what} is not complete: {tensors}; load them before publish")
    if holds_references(parts.skeleton):
        where = "" if obj is None else f", {references_in(obj)}"
        raise PublishError(
            f"{what} holds an ObjectRef or an actor{where}, which may end with the job that made "
            f"it: publish the object it refers to"
        )
    if not parts.holds_tensors and b"numpy" not in parts.skeleton:
        raise PublishError(f"{what} holds no tensors or arrays: there is nothing to share")


def cause_of(error: ray.exceptions.RayError) -> Exception:
    """Turn the error of a task or actor into one of ours, with advice for the user."""
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, RayZeroCopyError):
        return cause
    if isinstance(cause, ray.exceptions.ObjectStoreFullError | ray.exceptions.OutOfDiskError):
        return StoreFullError(
            f"the object store has no room for the block: start Ray with a larger store "
            f"(object_store_memory), or retire versions: {cause}"
        )
    if isinstance(cause, ray.exceptions.OwnerDiedError):
        return CatalogError(f"the publishing process died before the copy finished: {cause}")
    return CatalogError(f"the block could not be made: {type(cause).__name__}: {cause}")
