"""Describe a stored object or a snapshot without loading it."""

from __future__ import annotations

import os
from typing import Any

from ray_zerocopy.store import references, snapshot
from ray_zerocopy.store.description import Info


def inspect(ref: Any, *, verify: bool = False, timeout: float | None = None) -> Info:
    """Describe a stored object or a snapshot and the place of its bytes, without loading it.

    `verify` compares every byte with the checksums from when it was written.

    Raises:
        NotABlockError: the reference does not come from `put`.
        BlockError: with `verify`, a byte has changed; the message names its span and tensor.

    """
    if isinstance(ref, str | os.PathLike):
        return snapshot.describe(ref, verify=verify)
    return references.describe(ref, verify=verify, timeout=timeout)
