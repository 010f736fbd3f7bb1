"""What is published, in the key-value store of Ray's GCS: it outlives every process of ours.

One key a name. Where the GCS itself keeps its state (Redis), it outlives the head node, too.

With `room.py`, the only file that knows Ray from the inside.
"""

from __future__ import annotations

import pickle
from typing import Any

import ray
from ray._private import worker
from ray._raylet import GcsClient  # type: ignore[attr-defined]

_NAMESPACE = b"ray_zerocopy"
_TIMEOUT_S = 30


class Manifest:
    """A mapping from names to records, which are picklable and hold no reference."""

    def __init__(self) -> None:
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)

    def write(self, name: str, record: Any) -> None:
        """Replace the record of a name; it is kept when this returns."""
        self._gcs.internal_kv_put(
            name.encode(), pickle.dumps(record), True, _NAMESPACE, timeout=_TIMEOUT_S
        )

    def read(self, name: str) -> Any:
        """Give the record of a name, or None."""
        pickled = self._gcs.internal_kv_get(name.encode(), _NAMESPACE, timeout=_TIMEOUT_S)
        return None if pickled is None else pickle.loads(pickled)

    def names(self) -> list[str]:
        """Give every name that was ever written."""
        keys = self._gcs.internal_kv_keys(b"", _NAMESPACE, timeout=_TIMEOUT_S)
        return [key.decode() for key in keys]


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
