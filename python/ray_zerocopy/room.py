"""Room in Ray's store: an object whose end Ray leaves for us to write.

Ray copies what it stores buffer by buffer, and only one of hundreds of MiB at full speed; a model
is hundreds of small ones. So the object is made larger than what Ray writes into it:

    ┌ written by Ray ─────────┐┌ written by `Gather` ───────────┐
    │ skeleton, table, anchor ││ block                          │
    └─────────────────────────┘└────────────────────────────────┘

The only file that knows Ray from the inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import ray

try:
    from ray._private import auto_init_hook, worker
    from ray._raylet import RawSerializedObject  # type: ignore[attr-defined]
except ImportError:  # a Ray to come
    RawSerializedObject = object

# How this process puts: with room, or, where Ray is not inside as here, by Ray's own `put`.
way: Literal["room", "ray.put"] = "ray.put" if RawSerializedObject is object else "room"


def put(obj: object, nbytes: Callable[[], int]) -> tuple[ray.ObjectRef, Any, memoryview] | None:
    """Store an object as `ray.put` does, in memory that is `nbytes()` longer than it needs.

    `nbytes` is called when the object has been pickled. Gives the reference, what `ray.get` of it
    gives, and all the memory of the object, to be written before anyone else has the reference.
    None, and nothing stored, where Ray is not inside as it is from 2.43 to 2.60; from then on
    nothing is tried any more.
    """
    global way
    if way != "room":
        return None
    auto_init_hook.auto_init_ray()
    ray_worker = worker.global_worker
    ray_worker.check_connected()
    serialized = ray_worker.get_serialization_context().serialize(obj)
    try:
        roomy = _Roomy(serialized, nbytes())
        ref = ray_worker.put_object.__func__(_Storing(ray_worker), roomy)
        stored = ray_worker.core_worker.get_objects([ref], -1)
        memory = memoryview(stored[0][0])
    except (AttributeError, TypeError):
        way = "ray.put"
        return None
    if memory.readonly or memory.nbytes != roomy.total_bytes:
        return None  # never write where another object may lie
    (loaded,) = ray_worker.deserialize_objects(stored, [ref])
    return ref, loaded, memory


class _Roomy(RawSerializedObject):  # type: ignore[misc]
    """What Ray has serialized, and more bytes than that, which it will not write."""

    metadata = contained_object_refs = total_bytes = None  # in place of the base's properties

    def __init__(self, serialized: Any, nbytes: int) -> None:
        super().__init__(serialized.to_bytes())
        self.metadata = serialized.metadata
        self.contained_object_refs = serialized.contained_object_refs
        self.total_bytes = serialized.total_bytes + nbytes


class _Storing:
    """Ray's worker, for its own `put_object`, with a serializer that has been at work already.

    What that method calls beneath was named, and took arguments, in five ways from Ray 2.43 to
    2.60; the method knows which.
    """

    def __init__(self, ray_worker: Any) -> None:
        self._worker = ray_worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def get_serialization_context(self) -> _Storing:
        return self

    def serialize(self, roomy: _Roomy) -> _Roomy:
        return roomy
