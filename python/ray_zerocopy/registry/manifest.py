"""What is published, in the key-value store of Ray's GCS: it outlives every process of ours.

One key a name. Where the GCS itself keeps its state (Redis), it outlives the head node, too.
"""

from __future__ import annotations

import pickle
from typing import Any

from ray_zerocopy.store.ray_inside import KeyValues


class Manifest:
    """A mapping from names to records, which are picklable and hold no reference."""

    def __init__(self) -> None:
        self._kept = KeyValues(b"ray_zerocopy")

    def write(self, name: str, record: Any) -> None:
        """Replace the record of a name; it is kept when this returns."""
        self._kept.put(name.encode(), pickle.dumps(record))

    def read(self, name: str) -> Any:
        """Give the record of a name, or None."""
        pickled = self._kept.get(name.encode())
        return None if pickled is None else pickle.loads(pickled)

    def names(self) -> list[str]:
        """Give every name that was ever written."""
        return [key.decode() for key in self._kept.every_key()]
