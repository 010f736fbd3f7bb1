"""Open a snapshot without Ray: map its block from the page cache.

file ─ open_snapshot ─▶ head + block over the page cache ─ join ─▶ object
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch

from ray_zerocopy import _core
from ray_zerocopy.errors import IsolationWarning
from ray_zerocopy.store.envelope import Isolation, Loading
from ray_zerocopy.store.references import check_device
from ray_zerocopy.store.snapshot import opened

os.register_at_fork(
    before=_core.before_fork,
    after_in_parent=_core.after_fork_in_parent,
    after_in_child=_core.after_fork_in_child,
)


def open(  # noqa: A001 - the package's name for it
    path: str | os.PathLike[str],
    *,
    isolation: Isolation = "private",
    prefault: bool = True,
    device: torch.device | str | None = None,
) -> Any:
    """Load an object from its snapshot, with or without Ray.

    `open` reads only the bytes before the block and maps the weights from the page cache. All
    processes that open the file share these pages, copy-on-write.
    `inspect(path, verify=True)` compares every byte with its checksum.

    `open` unpickles the object: as with any pickle, open only files you trust.

    Args:
        path: a file that `save` wrote.
        isolation: `"private"`: as above. `"copy"`: read everything into private memory, and compare
            it with the checksums.
        prefault: fill the page table in the background, so that the first forward has no page
            faults. False does not.
        device: copy the tensors to this device; default: keep them on the CPU.

    Raises:
        BlockError: the file is damaged, truncated or not a snapshot.
        VersionError: a newer ray_zerocopy wrote it.
        ValueError: `path` is a URL, or `isolation` is `"shared"`.
        DeviceError: this process cannot use that device.

    Example:
        >>> model = rzc.open("model.rzc")

    """
    start, path = time.perf_counter(), os.fspath(path)
    if isolation == "shared":
        raise ValueError(
            "isolation='shared' would write changes of the weights into the file: "
            "use 'private' or 'copy'"
        )
    if isolation not in ("private", "copy"):
        raise ValueError(f"isolation must be 'private' or 'copy', not {isolation!r}")
    if "://" in path:
        raise ValueError(
            f"{path} is a URL, and open can map only files: download it, or store it in Ray "
            "with ray_zerocopy.restore"
        )
    check_device(device)
    with opened(path) as file:
        head, block = _core.open_snapshot(file.fileno(), path, isolation == "copy")
    if block.fallback:
        warnings.warn(
            f"{path} must not be changed in place while it is open here ({block.fallback}): "
            "replace it, as ray_zerocopy.save does, or open it with isolation='copy'",
            IsolationWarning,
            stacklevel=2,
        )
    return Loading(isolation, prefault, device).join(
        [(block, ())], head.skeleton, head.buffers, start
    )
