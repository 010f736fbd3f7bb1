"""A snapshot opened where it lies: its block is mapped from the page cache, and no Ray is needed.

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

    Nothing is read but what precedes the block: the weights are the file's pages in the page cache,
    which all processes share that open it. A process that writes to a page gets its own copy of it.
    `inspect(path, verify=True)` compares every byte with its checksum.

    The object is unpickled: as with any pickle, open only what you trust.

    Args:
        path: a file that `save` wrote.
        isolation: `"private"` as above. `"copy"`: read everything into memory of this process, and
            compare it with the checksums.
        prefault: fill the page table on a thread, so that the first forward does not. False leaves
            it to the forward.
        device: copy the tensors there instead of leaving them on the CPU.

    Raises:
        BlockError: the file is damaged, truncated or no snapshot.
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
        raise ValueError(f"isolation is 'private' or 'copy', not {isolation!r}")
    if "://" in path:
        raise ValueError(
            f"{path} is a URL, and only a file can be mapped: download it, or store it in Ray "
            "with ray_zerocopy.restore"
        )
    check_device(device)
    with opened(path) as file:
        head, block = _core.open_snapshot(file.fileno(), path, isolation == "copy")
    if block.fallback:
        warnings.warn(
            f"{path} must not be changed in place while it is open here, for {block.fallback}: "
            "replace it, as ray_zerocopy.save does, or open it with isolation='copy'",
            IsolationWarning,
            stacklevel=2,
        )
    return Loading(isolation, prefault, device).join(
        [(block, ())], head.skeleton, head.buffers, start
    )
