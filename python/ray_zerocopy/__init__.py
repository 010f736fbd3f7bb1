"""Load a PyTorch model into every Ray worker in milliseconds, with one copy of weights per node.

>>> import ray, ray_zerocopy as rzc
>>> ref = rzc.put(model)        # once
>>> model = ray.get(ref)        # in any worker: milliseconds, and no copy of the weights
"""

import importlib
from typing import TYPE_CHECKING, Any

from ray_zerocopy import requirements  # noqa: F401 - first: it rejects an old torch or Ray
from ray_zerocopy.errors import (
    BaseLostError,
    BlockError,
    CatalogError,
    ClientError,
    DeviceError,
    HostCopyWarning,
    InputError,
    IsolationWarning,
    LostVersionError,
    MismatchError,
    NotABlockError,
    NotABlockWarning,
    NoValuesWarning,
    OnDiskWarning,
    OutputError,
    PublishError,
    RayZeroCopyError,
    ResourceError,
    SaveError,
    SnapshotWarning,
    StoredAgainWarning,
    StoreFullError,
    UnknownVersionError,
    VersionError,
)
from ray_zerocopy.store import references as _references
from ray_zerocopy.store.automatic import disable, enable
from ray_zerocopy.store.description import Info, TensorInfo
from ray_zerocopy.store.envelope import Shared
from ray_zerocopy.store.inspection import inspect
from ray_zerocopy.store.references import build, get, put
from ray_zerocopy.store.snapshot import restore, save

if TYPE_CHECKING:
    from ray_zerocopy import aio as aio
    from ray_zerocopy import data as data
    from ray_zerocopy import serve as serve
    from ray_zerocopy.invoke import CallModel, Shim, call_model, rewrite_pipeline
    from ray_zerocopy.registry.broadcast import prefetch
    from ray_zerocopy.registry.follower import Live, follow
    from ray_zerocopy.registry.publication import (
        load,
        promote,
        publish,
        published,
        retire,
        versions,
    )
    from ray_zerocopy.registry.records import Version
    from ray_zerocopy.store.opening import open as open  # noqa: A004 - the package's name for it
    from ray_zerocopy.wrappers import JITModelWrapper, ModelWrapper

__all__ = [
    "BaseLostError",
    "BlockError",
    "CallModel",
    "CatalogError",
    "ClientError",
    "DeviceError",
    "HostCopyWarning",
    "Info",
    "InputError",
    "IsolationWarning",
    "JITModelWrapper",
    "Live",
    "LostVersionError",
    "MismatchError",
    "ModelWrapper",
    "NoValuesWarning",
    "NotABlockError",
    "NotABlockWarning",
    "OnDiskWarning",
    "OutputError",
    "PublishError",
    "RayZeroCopyError",
    "ResourceError",
    "SaveError",
    "Shared",
    "Shim",
    "SnapshotWarning",
    "StoreFullError",
    "StoredAgainWarning",
    "TensorInfo",
    "UnknownVersionError",
    "Version",
    "VersionError",
    "build",
    "call_model",
    "disable",
    "enable",
    "follow",
    "get",
    "inspect",
    "load",
    "prefetch",
    "promote",
    "publish",
    "published",
    "put",
    "restore",
    "retire",
    "rewrite_pipeline",
    "save",
    "versions",
]
__version__ = "0.1.0"

# Imported on first use: some of them import Ray Data and Ray Serve.
_FACES = {
    "CallModel": "invoke",
    "Shim": "invoke",
    "call_model": "invoke",
    "rewrite_pipeline": "invoke",
    "JITModelWrapper": "wrappers",
    "ModelWrapper": "wrappers",
    "Version": "registry.records",
    "prefetch": "registry.broadcast",
    "Live": "registry.follower",
    "open": "store.opening",  # not in `__all__`: a star import must not hide the builtin
    "follow": "registry.follower",
    **dict.fromkeys(
        ("load", "promote", "publish", "published", "retire", "versions"), "registry.publication"
    ),
}


def __getattr__(name: str) -> Any:
    if name in ("aio", "data", "serve"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FACES:
        return getattr(importlib.import_module(f"{__name__}.{_FACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _published(base: Any) -> Any:
    return importlib.import_module(f"{__name__}.registry.publication").block_of(base)


_references.published = _published  # so that `base=` takes names: the store knows none
