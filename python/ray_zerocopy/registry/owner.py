"""Who owns the blocks of published versions: an actor that outlives drivers, and holds no bytes.

Owner ═ a task, max_retries=-1 ═▶ make, or read ──▶ block, owned by the Owner
Owner ═ a Copier of the node ═══▶ copy an object ─▶ block, owned by the Owner

What heals is what a task returned, so that Ray makes it again where the node that held it is lost.
Whoever makes it again compares it with the digest in the manifest: a version never changes. A copy
of an object keeps no lineage, which would keep the object, too.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_zerocopy import _core, metrics
from ray_zerocopy.errors import CatalogError, LostVersionError, PublishError
from ray_zerocopy.registry.manifest import Manifest
from ray_zerocopy.store import snapshot
from ray_zerocopy.store.envelope import Parts
from ray_zerocopy.store.loader import following
from ray_zerocopy.store.references import parts_of

Source = Literal["object", "make", "path"]
Key = tuple[str, int]

_MAKE_NBYTES = 2**20
_IDLE_S = 60.0


@dataclass(frozen=True)
class Plan:
    """How the block of a version is made, and made again."""

    source: Source
    make: bytes | None
    """The pickle of a callable that gives the object."""
    node: str
    """Where it is made, if that node is there: where the publisher is."""

    @property
    def heals(self) -> bool:
        """Whether the block can be made again when every copy of it is gone."""
        return self.make is not None


def plan(source: Source, make: Callable[[], Any] | None, node: str) -> Plan:
    """Plan how a version is made; raises `PublishError` for what does not pickle, or is large."""
    if make is None:
        return Plan(source, None, node)
    try:
        pickled = cloudpickle.dumps(make)
    except Exception as error:
        raise PublishError(f"make does not pickle, so no worker can call it: {error}") from error
    if len(pickled) > _MAKE_NBYTES:
        raise PublishError(
            f"make pickles to {len(pickled):,} bytes, {_MAKE_NBYTES:,} at most: it should say how "
            f"to load the model, not hold it; publish the object itself, or a path"
        )
    return Plan(source, pickled, node)


@dataclass(frozen=True)
class Made:
    """What came of making a block."""

    nbytes: int
    digest: str
    ref: ray.ObjectRef | None = None
    """None where the name's current version is the same to the byte: nothing was stored."""


class Owner:
    """Makes blocks by tasks and holds their references, under names and numbers.

    A new process starts with none: what its predecessor owned is gone, or going, and the catalog
    has it made again. `incarnation` tells them apart.
    """

    def __init__(self) -> None:
        self._incarnation = uuid.uuid4().hex
        self._blocks: dict[Key, ray.ObjectRef] = {}
        self._copiers: dict[str, tuple[Any, asyncio.TimerHandle]] = {}

    async def held(self) -> tuple[str, dict[Key, ray.ObjectRef]]:
        """Give the incarnation, and what it holds."""
        return self._incarnation, self._blocks

    async def watch(self, incarnation: str, wait_s: float) -> bool:
        """Wait while this is the incarnation; whether it is. Its death ends the call sooner."""
        if incarnation != self._incarnation:
            return False
        await asyncio.sleep(wait_s)
        return True

    async def build(self, key: Key, plan: Plan, copied: list[ray.ObjectRef]) -> Made:
        """Have a block made and hold it; `copied` refers to the object, if it is one."""
        if copied:
            block, (nbytes, digest, stored) = await self._copy(key, plan.node, copied)
        else:
            there = NodeAffinitySchedulingStrategy(plan.node, soft=True)
            block, facts = _build.options(scheduling_strategy=there).remote(key, plan)
            nbytes, digest, stored = await facts
        if not stored:
            return Made(nbytes, digest)
        metrics.record("rzc_published_bytes", nbytes)  # a worker may be gone before Ray asks it
        self._blocks[key] = block
        return Made(nbytes, digest, block)

    async def _copy(self, key: Key, node: str, copied: list[ray.ObjectRef]) -> Any:
        """Have an object copied by the node's copier: the block, and what `_build` says of one."""
        there = NodeAffinitySchedulingStrategy(node, soft=False)  # soft, Ray puts actors anywhere
        copier = self._let_go(node) or Copier.options(scheduling_strategy=there).remote()  # type: ignore[attr-defined]
        leaving = asyncio.get_running_loop().call_later(_IDLE_S, self._let_go, node)
        self._copiers[node] = copier, leaving
        block, facts = copier.copy.remote(key, copied)
        try:
            return block, await facts
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
            self._let_go(node)
            raise CatalogError(
                f"{key[0]!r} was not copied, publish it again; who copied it is gone: {error}"
            ) from error

    def _let_go(self, node: str) -> Any:
        """Forget a node's copier, and give it; without a handle it ends when all is copied."""
        copier, leaving = self._copiers.pop(node, (None, None))
        if leaving is not None:
            leaving.cancel()
        return copier

    async def rescue(self, key: Key, lost: list[ray.ObjectRef], nodes: list[str]) -> Made | None:
        """Copy a block whose owner is gone, any generation, from a node that still has it.

        Ray keeps such a copy while a process there has it mapped, and gives it only to that node.
        None if no node has one.
        """
        for block, node in itertools.product(reversed(lost), nodes):
            try:
                return await self.build(key, Plan("object", None, node), [block])
            except (ray.exceptions.RayError, CatalogError, LostVersionError):
                continue
        return None

    async def drop(self, keys: list[Key]) -> None:
        """Let go of blocks; their bytes are free when nobody has them mapped."""
        for key in keys:
            self._blocks.pop(key, None)


@ray.remote(num_cpus=0, max_concurrency=8)
class Copier:
    """Copies objects on its node, a few at a time.

    As a task it would cost a new worker each time, seconds of imports: Ray ends the idle workers of
    a job that is over, as the owner's is.
    """

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    def copy(self, key: Key, copied: list[ray.ObjectRef]) -> Any:
        """Give a block like the one referred to, as `_build` does."""
        return _checked(key, parts_of(copied[0]))


@ray.remote(num_cpus=0, num_returns=2, max_retries=-1)  # type: ignore[untyped-decorator]
def _build(key: Key, plan: Plan) -> Any:
    """Give a block and its (nbytes, digest, whether it is stored)."""
    return _checked(key, _make(key, plan))


def _checked(key: Key, made: Any) -> Any:
    """Compare what was made with what is recorded."""
    parts = made if isinstance(made, Parts) else Parts.of(made)
    digest = parts.digest()
    recorded, current = Manifest().read(key[0]).digests(key[1])
    if digest == current and recorded is None:
        return None, (parts.nbytes, digest, False)
    if recorded not in (None, digest):
        raise LostVersionError(
            f"version {key[1]} of {key[0]!r} cannot be made again: what its make gives now is "
            f"another model ({digest[:12]}) than was published ({recorded[:12]}); publish it anew, "
            f"with snapshot= where make does not give the same each time"
        )
    return parts, (parts.nbytes, digest, True)


def restored(path: str) -> Parts:
    """Read a snapshot into the store of this node, checked, and give its parts."""
    return parts_of(snapshot.restore(path))


def _make(key: Key, plan: Plan) -> Any:
    assert plan.make is not None
    try:
        with following(_core.Arena()):
            return cloudpickle.loads(plan.make)()
    except ImportError as error:
        raise PublishError(
            f"{key[0]!r} cannot be made where the cluster makes it again: {error}. That is outside "
            f"of the job that publishes it, and of its working_dir: install the module on every "
            f"node, define make in __main__, or have it pickled by value "
            f"(ray.cloudpickle.register_pickle_by_value)"
        ) from error
