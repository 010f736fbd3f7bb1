"""Room in Ray's store: an object whose end Ray leaves for us to write.

Ray copies what it stores buffer by buffer, and only one of hundreds of MiB at full speed; a model
is hundreds of small ones. So the object is made larger than what Ray writes into it:

    ┌ written by Ray ─────────┐┌ written by `Gather` ───────────┐
    │ skeleton, table, anchor ││ block                          │
    └─────────────────────────┘└────────────────────────────────┘

The only file that knows Ray from the inside. Seen on Ray 2.43 to 2.60.
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
except ImportError:  # a Ray to come
    RawSerializedObject = object

INLINE_NBYTES = 100 * 1024
"""What is smaller travels in messages, not in the store: Ray's `max_direct_call_object_size`."""

# What Ray's pickles of references and actors call to come back: nothing that outlives a cluster.
_REFERENCES = (b"_object_ref_deserializer", b"_rdt_ref_deserializer", b"_actor_handle_deserializer")

# How this process puts: with room, or, where Ray is not inside as here, by Ray's own `put`.
way: Literal["room", "ray.put"] = "ray.put" if RawSerializedObject is object else "room"


_AS_IT_IS = nullcontext()


class Room(NamedTuple):
    """An object whose end is to be written: nobody else has the reference yet."""

    ref: ray.ObjectRef
    start: Any
    """What `ray.get` of it gives."""
    memory: memoryview
    """All of its memory ..."""
    connection: _core.Connection
    """... which is its own as long as this lives."""


def put(
    obj: object, nbytes: Callable[[], int], reading: AbstractContextManager[None] = _AS_IT_IS
) -> Room | None:
    """Store an object as `ray.put` does, in memory that is `nbytes()` longer than it needs.

    `nbytes` is called when the object has been pickled. `Room.start` is read inside of `reading`;
    the pickling is outside: objects may call `ray.get` there. None, and nothing stored, where Ray
    is not inside as it is from 2.43 to 2.60; from then on nothing is tried any more.
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
    """Give what a task returns for an object in memory that is `nbytes` longer, and all its bytes.

    Whoever has the reference first writes there, by `room_in`.
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
    """Map what a task has returned `with_room`, of so many bytes in all; None if it is not so."""
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
        return None  # never write where another object may lie
    with reading:
        (loaded,) = worker.global_worker.deserialize_objects(stored, [ref])
    return Room(ref, loaded, memory, held)


def connection() -> _core.Connection:
    """Keep this process's connection to its node's store open, as long as what is given lives.

    `ray.shutdown()` closes Ray's side of it. With the last side the store gives what this process
    has mapped to others.
    """
    return _core.Connection(getattr(worker.global_worker.node, "plasma_store_socket_name", None))


class _Roomy(RawSerializedObject):  # type: ignore[misc]
    """What Ray has serialized, and more bytes than that, which it will not write."""

    metadata: Any = None  # in place of the base's properties
    contained_object_refs: Any = None
    total_bytes: Any = None

    def __init__(self, serialized: Any, nbytes: int) -> None:
        super().__init__(serialized.to_bytes())
        self.metadata = serialized.metadata
        self.contained_object_refs = serialized.contained_object_refs
        self.total_bytes = serialized.total_bytes + nbytes


class _Returned(NamedTuple):
    """What a task returns, serialized already."""

    roomy: _Roomy


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


# --- Ray's serializer -----------------------------------------------------------------------------


class _Pickle:
    """`ray.cloudpickle`, as Ray's serializer knows it, with a `dumps` of ours."""

    def __init__(self, dumps: Callable[..., bytes]) -> None:
        self.dumps = dumps

    def __getattr__(self, name: str) -> Any:
        return getattr(cloudpickle, name)


def hook_dumps(dumps: Callable[..., bytes] | None) -> None:
    """Have Ray's serializer pickle by `dumps(value, protocol, buffer_callback)`; None: as before.

    It pickles so whatever Ray stores: what is put, arguments and returns. Raises `VersionError`
    where it does not pickle as in Ray 2.43 to 2.60.
    """
    method = getattr(serialization.SerializationContext, "_serialize_to_pickle5", None)
    if method is None or not {"pickle", "dumps"} <= set(method.__code__.co_names):
        raise VersionError(
            f"enable does not know the serializer of Ray {ray.__version__}: call ray_zerocopy.put, "
            f"or install Ray 2.60"
        )
    serialization.pickle = cloudpickle if dumps is None else _Pickle(dumps)


def is_hooked() -> bool:
    """Whether `hook_dumps` is in force."""
    return isinstance(serialization.pickle, _Pickle)


def shares_tensors() -> bool:
    """Whether Ray's own flag for tensors is set."""
    return bool(getattr(ray_constants, "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", False))


# --- references -----------------------------------------------------------------------------------

Address = tuple[bytes, bytes, bytes]  # of an object: its id, its owner, and where its bytes are


def address_of(ref: ray.ObjectRef) -> Address:
    """Give what `reference_at` makes the reference of again, in any process of the cluster.

    Ray's own pickle of a reference, outside of a message, would pin the object for as long as this
    process lives.
    """
    _, owner, status = worker.global_worker.core_worker.serialize_object_ref(ref)
    return ref.binary(), owner, status


def reference_at(address: Address) -> ray.ObjectRef:
    """Give the reference of an object that its owner, if alive, still holds."""
    binary, owner, status = address
    ref = ray.ObjectRef(binary, owner)
    core = worker.global_worker.core_worker
    core.deserialize_and_register_object_ref(binary, ray.ObjectRef.nil(), owner, status)
    return ref


def holds_references(skeleton: bytes) -> bool:
    """Whether a pickle of Ray's holds references or actors, which end with their cluster."""
    return any(mark in skeleton for mark in _REFERENCES)


def located(ref: ray.ObjectRef, timeout: float = -1.0) -> tuple[list[str], int]:
    """Give the ids of the nodes that have an object, and its bytes; 0 where nobody knows."""
    found = get_object_locations([ref], int(timeout * 1000) if timeout >= 0 else -1)[ref]
    return list(found["node_ids"]), found["object_size"] or 0


def is_spilled(ref: ray.ObjectRef) -> bool:
    """Whether Ray has written an object to disk."""
    return bool(get_object_locations([ref])[ref].get("did_spill"))


# --- the cluster ----------------------------------------------------------------------------------


def cluster() -> str:
    """Tell which cluster this process is connected to; nothing where it is to none."""
    node = worker.global_worker.node if ray.is_initialized() else None
    return "" if node is None else f"{ray.get_runtime_context().gcs_address} {node.session_name}"


_CALLED_BEFORE_LEAVING: list[Callable[[], None]] = []


def before_leaving(called: Callable[[], None]) -> None:
    """Have this called before the process leaves a cluster, by `ray.shutdown` or as it ends.

    From then on, and until that is done, a thread that touches a reference ends the process with
    status 1. Ray itself has a hook only for when a process has connected.
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
    """Give the environment of a process without the job that it belongs to.

    A driver takes the runtime environment of its job from there, and hands it on to what it starts;
    of `uv run` it takes it from its parents' command lines.
    """
    kept = {key: value for key, value in environment.items() if not key.startswith(_OF_A_JOB)}
    return kept | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


_OF_A_JOB = ("RAY_JOB_", "RAY_RUNTIME_ENV", "RAY_OVERRIDE_JOB_RUNTIME_ENV", "RAY_RAYLET_PID")


def is_client() -> bool:
    """Whether this process is a Ray Client, with no object store on its side."""
    return bool(ray.util.client.ray.is_connected())


def free_resources() -> dict[str, float]:
    """Give what a task from here may take: of its placement group where it has one, as in Tune."""
    free, context = ray.available_resources(), ray.get_runtime_context()
    if not context.should_capture_child_tasks_in_placement_group:
        return dict(free)
    group = f"_group_{context.get_placement_group_id()}"
    return {name.removesuffix(group): n for name, n in free.items() if name.endswith(group)}


def is_store(file: str) -> bool:
    """Whether a file is the store, in memory, not one in which Ray keeps what had no room there.

    Ray has the whole store on disk where `/dev/shm` is smaller.
    """
    directory = os.path.dirname(file)
    return directory == _store_directory(_store_socket()) and _in_memory(directory)


@functools.cache
def _in_memory(directory: str) -> bool:
    nearest, kind = "", "tmpfs"
    with contextlib.suppress(OSError):  # no /proc: as almost everywhere
        for mount in Path("/proc/self/mounts").read_text().splitlines():
            _, point, found, *_ = mount.split(" ")
            if len(point) >= len(nearest) and os.path.commonpath([point, directory]) == point:
                nearest, kind = point, found
    return kind in ("tmpfs", "ramfs", "hugetlbfs")


def _store_socket() -> str:
    return getattr(worker.global_worker.node, "plasma_store_socket_name", None) or ""


@functools.cache
def _store_directory(socket: str) -> str:
    """Give the directory of a store, as its raylet was told: `/dev/shm` unless it was too small."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            arguments = command.read_bytes().split(b"\0")
            if f"--store_socket_name={socket}".encode() in arguments:
                for argument in arguments:
                    if argument.startswith(b"--plasma_directory="):
                        return os.fsdecode(argument.partition(b"=")[2])
    return "/dev/shm"


def cause_of(error: ray.exceptions.RaySystemError) -> BaseException | None:
    """Give what was raised while Ray unpickled an object."""
    return getattr(error, "client_exc", None)


def serve_deployments(timeout: float = 30.0) -> list[bytes]:
    """Give what Serve's controller has of each deployment: what was bound to it lies in there.

    Nothing where Serve does not run. Raises `LookupError` where a deployment is in another form.
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
            raise LookupError(f"Serve has deployment {each.name!r} in a form that is not known")
    return found


class KeyValues:
    """Bytes by key in the GCS: they outlive every process of ours, and the head where it is kept.

    Raises what Ray does where the GCS does not answer in time.
    """

    _TIMEOUT_S = 30

    def __init__(self, namespace: bytes) -> None:
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._namespace = namespace

    def put(self, key: bytes, value: bytes) -> None:
        """Replace the value of a key; it is kept when this returns."""
        self._gcs.internal_kv_put(key, value, True, self._namespace, timeout=self._TIMEOUT_S)

    def get(self, key: bytes) -> bytes | None:
        """Give the value of a key, or None."""
        value: bytes | None = self._gcs.internal_kv_get(
            key, self._namespace, timeout=self._TIMEOUT_S
        )
        return value

    def every_key(self) -> list[bytes]:
        """Give every key that was ever put."""
        return list(self._gcs.internal_kv_keys(b"", self._namespace, timeout=self._TIMEOUT_S))
