"""Share a PyTorch model among Ray workers: one block in the object store, mapped, never copied.

>>> import ray, ray_zerocopy as rzc
>>> ref = rzc.put(model)        # once
>>> model = ray.get(ref)        # in any worker: milliseconds, no memory of its own
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from ray_zerocopy import data, serve
    from ray_zerocopy.invoke import CallModel, Shim, call_model, rewrite_pipeline
    from ray_zerocopy.wrappers import JITModelWrapper, ModelWrapper

__all__ = [
    "BlockError",
    "CallModel",
    "ClientError",
    "HostCopyWarning",
    "Info",
    "IsolationWarning",
    "JITModelWrapper",
    "MismatchError",
    "ModelWrapper",
    "NotABlockError",
    "PublishError",
    "RayZeroCopyError",
    "Shared",
    "Shim",
    "StoreFullError",
    "TensorInfo",
    "call_model",
    "data",
    "get",
    "inspect",
    "put",
    "rewrite_pipeline",
    "serve",
]
__version__ = "0.1.0"

# The faces are loaded when they are used, and Ray Data and Ray Serve with them.
_FACES = {
    "CallModel": "invoke",
    "Shim": "invoke",
    "call_model": "invoke",
    "rewrite_pipeline": "invoke",
    "JITModelWrapper": "wrappers",
    "ModelWrapper": "wrappers",
}


def __getattr__(name: str) -> Any:
    if name in ("data", "serve"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FACES:
        return getattr(importlib.import_module(f"{__name__}.{_FACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
