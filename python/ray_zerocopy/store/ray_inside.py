"""Every use of Ray's private parts. First: an object whose end Ray leaves for us to write.

Ray copies an object into the store buffer by buffer, at full speed only for buffers of hundreds of
MiB. A model has hundreds of small ones. So we make the object larger than what Ray writes into it:

    ┌ written by Ray ─────────┐┌ written by `Gather` ───────────┐
    │ skeleton, table, anchor ││ block                          │
    └─────────────────────────┘└────────────────────────────────┘

No other file uses private parts of Ray. Tested on Ray 2.43 to 2.60.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray import cloudpickle
from ray._private import auto_init_hook, ray_constants, serialization, worker
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.experimental import get_object_locations

from ray_zerocopy import _core
from ray_zerocopy.errors import VersionError

try:
    from ray._raylet import RawSerializedObject  # type: ignore[attr-defined]
except ImportError:  # a future Ray
    RawSerializedObject = object

INLINE_NBYTES = 100 * 1024
"""Ray sends smaller objects in messages, not the store: its `max_direct_call_object_size`."""

# Functions in Ray's pickles of references and actors, which end with their cluster.
_REFERENCES = (b"_object_ref_deserializer", b"_rdt_ref_deserializer", b"_actor_handle_deserializer")

# How this process puts: with room, or with Ray's own `put` if Ray's private parts have changed.
way: Literal["room", "ray.put"] = "ray.put" if RawSerializedObject is object else "room"


_AS_IT_IS = nullcontext()


class Room(NamedTuple):
    """An object whose end we write; no other process has the reference yet."""

    ref: ray.ObjectRef
    start: Any
    """The result of `ray.get`."""
    memory: memoryview
    """All memory of the object."""
    connection: _core.Connection
    """While this lives, the store gives the memory to no other object."""


def put(
    obj: object, nbytes: Callable[[], int], reading: AbstractContextManager[None] = _AS_IT_IS
) -> Room | None:
    """Store an object as `ray.put` does, in memory that is `nbytes()` longer than it needs.

    It calls `nbytes` after pickling, and reads `Room.start` inside of `reading`. Pickling is
    outside of it, because objects may call `ray.get` there. Returns None and stores nothing if
    Ray's private parts differ from 2.43 to 2.60; later calls then do not try again.
    """
    global way
    if way != "room":
        return None
    auto_init_hook.auto_init_ray()
    ray_worker = worker.global_worker
    ray_worker.check_connected()
    held = connection()
    if not held.kept:
        return None
    serialized = ray_worker.get_serialization_context().serialize(obj)
    try:
        roomy = _Roomy(serialized, nbytes())
        ref = ray_worker.put_object.__func__(_Storing(ray_worker), roomy)
        stored, memory = _memory_of(ref)
    except (AttributeError, TypeError):
        way = "ray.put"
        return None
    return _room(ref, roomy.total_bytes, stored, memory, reading, held)


def with_room(obj: object, nbytes: int) -> tuple[Any, int]:
    """Return what a task must return for an object with `nbytes` of room, and the total bytes.

    The first process that has the reference writes into the room, by `room_in`.
    """
    context = worker.global_worker.get_serialization_context()
    if "serialize" not in vars(context):
        serialize = context.serialize
        context.serialize = lambda value: (
            value.roomy if isinstance(value, _Returned) else serialize(value)
        )
    roomy = _Roomy(context.serialize(obj), nbytes)
    return _Returned(roomy), roomy.total_bytes


def room_in(
    ref: ray.ObjectRef, nbytes: int, reading: AbstractContextManager[None] = _AS_IT_IS
) -> Room | None:
    """Map a task's result `with_room`; None if it is not `nbytes` in all, or not writable."""
    held = connection()
    if way != "room" or not held.kept:
        return None
    try:
        stored, memory = _memory_of(ref)
    except (AttributeError, TypeError):
        return None
    return _room(ref, nbytes, stored, memory, reading, held)


def _memory_of(ref: ray.ObjectRef) -> tuple[Any, memoryview]:
    stored = worker.global_worker.core_worker.get_objects([ref], -1)
    return stored, memoryview(stored[0][0])


def _room(
    ref: ray.ObjectRef,
    nbytes: int,
    stored: Any,
    memory: memoryview,
    reading: AbstractContextManager[None],
    held: _core.Connection,
) -> Room | None:
    if memory.readonly or memory.nbytes != nbytes:
        return None  # never write to memory that may belong to another object
    with reading:
        (loaded,) = worker.global_worker.deserialize_objects(stored, [ref])
    return Room(ref, loaded, memory, held)


def connection() -> _core.Connection:
    """Keep this process's connection to its node's store open while the result lives.

    `ray.shutdown()` closes Ray's descriptor of it. When the last descriptor is closed, the store
    reuses the memory of objects that this process still maps.
    """
    return _core.Connection(getattr(worker.global_worker.node, "plasma_store_socket_name", None))


class _Roomy(RawSerializedObject):  # type: ignore[misc]
    """A serialized object plus bytes that Ray will not write."""

    metadata: Any = None  # replaces a property of the base class, as the next two do
    contained_object_refs: Any = None
    total_bytes: Any = None

    def __init__(self, serialized: Any, nbytes: int) -> None:
        super().__init__(serialized.to_bytes())
        self.metadata = serialized.metadata
        self.contained_object_refs = serialized.contained_object_refs
        self.total_bytes = serialized.total_bytes + nbytes


class _Returned(NamedTuple):
    """The return value of a task, already serialized."""

    roomy: _Roomy


class _Storing:
    """Stands for Ray's worker in its `put_object`, with a serializer that returns a ready result.

    We call `put_object`, because the name and arguments of the method below it took five forms from
    Ray 2.43 to 2.60.
    """

    def __init__(self, ray_worker: Any) -> None:
        self._worker = ray_worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def get_serialization_context(self) -> _Storing:
        return self

    def serialize(self, roomy: _Roomy) -> _Roomy:
        return roomy


# --- Ray's serializer -----------------------------------------------------------------------------


class _Pickle:
    """`ray.cloudpickle` for Ray's serializer, with our `dumps`."""

    def __init__(self, dumps: Callable[..., bytes]) -> None:
        self.dumps = dumps

    def __getattr__(self, name: str) -> Any:
        return getattr(cloudpickle, name)


def hook_dumps(dumps: Callable[..., bytes] | None) -> None:
    """Make Ray's serializer pickle with `dumps(value, protocol, buffer_callback)`; None: as before.

    This applies to everything that Ray stores: put objects, arguments and returns. Raises
    `VersionError` if the serializer differs from Ray 2.43 to 2.60.
    """
    method = getattr(serialization.SerializationContext, "_serialize_to_pickle5", None)
    if method is None or not {"pickle", "dumps"} <= set(method.__code__.co_names):
        raise VersionError(
            f"enable does not know the serializer of Ray {ray.__version__}: call ray_zerocopy.put, "
            f"or install Ray 2.60"
        )
    serialization.pickle = cloudpickle if dumps is None else _Pickle(dumps)


def is_hooked() -> bool:
    """Whether `hook_dumps` is active."""
    return isinstance(serialization.pickle, _Pickle)


def shares_tensors() -> bool:
    """Whether Ray's own flag for tensors is set."""
    return bool(getattr(ray_constants, "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", False))


# --- references -----------------------------------------------------------------------------------

Address = tuple[bytes, bytes, bytes]  # of an object: its id, owner and location


def address_of(ref: ray.ObjectRef) -> Address:
    """Return an address; `reference_at` makes the reference from it, in any process of the cluster.

    Ray's own pickle of a reference, outside of a message, pins the object until this process ends.
    """
    _, owner, status = worker.global_worker.core_worker.serialize_object_ref(ref)
    return ref.binary(), owner, status


def reference_at(address: Address) -> ray.ObjectRef:
    """Return a reference from its address; its owner, if alive, must still hold the object."""
    binary, owner, status = address
    ref = ray.ObjectRef(binary, owner)
    core = worker.global_worker.core_worker
    core.deserialize_and_register_object_ref(binary, ray.ObjectRef.nil(), owner, status)
    return ref


def holds_references(skeleton: bytes) -> bool:
    """Whether Ray's pickle contains references or actors, which end with their cluster."""
    return any(mark in skeleton for mark in _REFERENCES)


def located(ref: ray.ObjectRef, timeout: float = -1.0) -> tuple[list[str], int]:
    """Return the ids of the nodes that have an object, and its bytes (0 if unknown)."""
    found = _locations(ref, int(timeout * 1000) if timeout >= 0 else -1)
    return list(found.get("node_ids", ())), found.get("object_size") or 0


def is_spilled(ref: ray.ObjectRef) -> bool:
    """Whether Ray has written an object to disk, or lost it with its owner."""
    found = _locations(ref)
    return not found or bool(found.get("did_spill"))


def _locations(ref: ray.ObjectRef, milliseconds: int = -1) -> dict[str, Any]:
    """Return what Ray knows of an object; nothing if its owner has just died."""
    found: dict[str, Any] = get_object_locations([ref], milliseconds).get(ref, {})
    return found


# --- the cluster ----------------------------------------------------------------------------------


def cluster() -> str:
    """Return a name of the cluster that this process is connected to, or an empty string."""
    node = worker.global_worker.node if ray.is_initialized() else None
    return "" if node is None else f"{ray.get_runtime_context().gcs_address} {node.session_name}"


_CALLED_BEFORE_LEAVING: list[Callable[[], None]] = []


def before_leaving(called: Callable[[], None]) -> None:
    """Register a function to call before the process disconnects, at `ray.shutdown` or exit.

    During the disconnect, a thread that touches a reference ends the process with status 1. Ray has
    a hook after connecting, but none before disconnecting.
    """
    if not _CALLED_BEFORE_LEAVING:
        disconnect = worker.disconnect

        def leave(*args: Any, **kwargs: Any) -> Any:
            for each in _CALLED_BEFORE_LEAVING:
                each()
            return disconnect(*args, **kwargs)

        worker.disconnect = leave
    if called not in _CALLED_BEFORE_LEAVING:
        _CALLED_BEFORE_LEAVING.append(called)


def outside_of_jobs(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment variables of a process without those of its job.

    A driver reads its job's runtime environment there and passes it to the processes it starts;
    with `uv run` it reads the command lines of its parents.
    """
    kept = {key: value for key, value in environment.items() if not key.startswith(_OF_A_JOB)}
    return kept | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


_OF_A_JOB = ("RAY_JOB_", "RAY_RUNTIME_ENV", "RAY_OVERRIDE_JOB_RUNTIME_ENV", "RAY_RAYLET_PID")


def is_client() -> bool:
    """Whether this process is a Ray Client, which has no local object store."""
    return bool(ray.util.client.ray.is_connected())


def free_resources() -> dict[str, float]:
    """Return the free resources for tasks from here: of a placement group if in one, as in Tune."""
    free, context = ray.available_resources(), ray.get_runtime_context()
    if not context.should_capture_child_tasks_in_placement_group:
        return dict(free)
    group = f"_group_{context.get_placement_group_id()}"
    return {name.removesuffix(group): n for name, n in free.items() if name.endswith(group)}


def is_store(file: str) -> bool:
    """Whether a file is the store in memory, not Ray's fallback file on disk.

    If `/dev/shm` is too small, Ray puts the whole store on disk.
    """
    directory = os.path.dirname(file)
    return directory == _store_directory(_store_socket()) and _in_memory(directory)


@functools.cache
def _in_memory(directory: str) -> bool:
    nearest, kind = "", "tmpfs"
    with contextlib.suppress(OSError):  # no /proc: assume memory, as almost everywhere
        for mount in Path("/proc/self/mounts").read_text().splitlines():
            _, point, found, *_ = mount.split(" ")
            if len(point) >= len(nearest) and os.path.commonpath([point, directory]) == point:
                nearest, kind = point, found
    return kind in ("tmpfs", "ramfs", "hugetlbfs")


def _store_socket() -> str:
    return getattr(worker.global_worker.node, "plasma_store_socket_name", None) or ""


@functools.cache
def _store_directory(socket: str) -> str:
    """Return a store's directory, as its raylet was told: `/dev/shm` unless that was too small."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            arguments = command.read_bytes().split(b"\0")
            if f"--store_socket_name={socket}".encode() in arguments:
                for argument in arguments:
                    if argument.startswith(b"--plasma_directory="):
                        return os.fsdecode(argument.partition(b"=")[2])
    return "/dev/shm"


def cause_of(error: ray.exceptions.RaySystemError) -> BaseException | None:
    """Return the exception that was raised while Ray unpickled an object."""
    return getattr(error, "client_exc", None)


def serve_deployments(timeout: float = 30.0) -> list[bytes]:
    """Return what Serve's controller stores for each deployment, including its bound arguments.

    Empty if Serve does not run. Raises `LookupError` if a deployment has an unknown form.
    """
    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
    except ValueError:
        return []
    found = []
    for each in ray.get(controller.list_deployment_ids.remote(), timeout=timeout):
        asked = controller.get_deployment_info.remote(each.name, each.app_name)
        try:
            found.append(ray.get(asked, timeout=timeout))
        except KeyError:  # deleted meanwhile
            continue
        if each.name.encode() not in found[-1]:
            raise LookupError(f"Serve stores deployment {each.name!r} in an unknown form")
    return found


class KeyValues:
    """Bytes by key in the GCS: they outlive our processes, and the head node if the GCS persists.

    Raises Ray's error if the GCS does not answer in time.
    """

    _TIMEOUT_S = 30

    def __init__(self, namespace: bytes) -> None:
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._namespace = namespace

    def put(self, key: bytes, value: bytes) -> None:
        """Set the value of a key; the GCS has it when this returns."""
        self._gcs.internal_kv_put(key, value, True, self._namespace, timeout=self._TIMEOUT_S)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None."""
        value: bytes | None = self._gcs.internal_kv_get(
            key, self._namespace, timeout=self._TIMEOUT_S
        )
        return value

    def delete(self, key: bytes) -> None:
        """Delete a key, if it exists."""
        self._gcs.internal_kv_del(key, False, self._namespace, timeout=self._TIMEOUT_S)

    def every_key(self) -> list[bytes]:
        """Return all keys."""
        return list(self._gcs.internal_kv_keys(b"", self._namespace, timeout=self._TIMEOUT_S))
