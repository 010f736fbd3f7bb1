"""What is stored, told without loading it: by its reference, or as a file."""

from __future__ import annotations

import os
from typing import Any

from ray_zerocopy.store import references, snapshot
from ray_zerocopy.store.description import Info


def inspect(ref: Any, *, verify: bool = False, timeout: float | None = None) -> Info:
    """Tell what a reference or a snapshot holds and where its bytes lie, without loading it.

    With `verify` every byte is compared with the checksums that were taken when it was written.

    Raises:
        NotABlockError: the reference does not come from `put`.
        BlockError: with `verify`, a byte has changed; the message names its span and tensor.

    """
    if isinstance(ref, str | os.PathLike):
        return snapshot.describe(ref, verify=verify)
    return references.describe(ref, verify=verify, timeout=timeout)
