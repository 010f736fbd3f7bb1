"""Share a PyTorch model among Ray workers: one block in the object store, mapped, never copied.

>>> import ray, ray_zerocopy as rzc
>>> ref = rzc.put(model)        # once
>>> model = ray.get(ref)        # in any worker: milliseconds, no memory of its own
"""

from ray_zerocopy.errors import (
    BlockError,
    ClientError,
    HostCopyWarning,
    IsolationWarning,
    MismatchError,
    NotABlockError,
    PublishError,
    RayZeroCopyError,
    StoreFullError,
)
from ray_zerocopy.store import Info, Shared, TensorInfo, get, inspect, put

__all__ = [
    "BlockError",
    "ClientError",
    "HostCopyWarning",
    "Info",
    "IsolationWarning",
    "MismatchError",
    "NotABlockError",
    "PublishError",
    "RayZeroCopyError",
    "Shared",
    "StoreFullError",
    "TensorInfo",
    "get",
    "inspect",
    "put",
]
__version__ = "0.1.0"
