"""Make Ray's serializer store objects with tensors as blocks: `ray.put`, arguments, returns.

Ray ─ dumps(value) ─▶ fewer than 100 KiB of tensors in it ─▶ Ray's own pickle, byte for byte
                        └ more ─▶ `Shared(value)` ─▶ skeleton, table, block
"""

from __future__ import annotations

import io
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from ray import cloudpickle

from ray_zerocopy import metrics
from ray_zerocopy.errors import (
    NotABlockError,
    NotABlockWarning,
    PublishError,
    StoredAgainWarning,
)
from ray_zerocopy.objects.tensors import nbytes_of
from ray_zerocopy.pickled import named
from ray_zerocopy.store import ray_inside
from ray_zerocopy.store.envelope import Shared

# What `CloudPickler.reducer_override` reduces itself.
_BY_CLOUDPICKLE = (type, types.FunctionType)

_STORED_AGAIN = 3  # warn when the same model is stored for the third time


def enable(only: type | tuple[type, ...] = object) -> None:
    """Make Ray store every object with tensors as one block, like `put`.

    From now on, in this process, Ray stores models as blocks: with `ray.put(model)`, as arguments
    and return values of tasks and actors, and inside other stored objects (`fn_constructor_args` of
    Ray Data, `with_parameters` of Ray Tune, the config of Ray Train). Readers need no `enable`.
    Ray itself still pickles objects with fewer than 100 KiB of tensors, objects with tensors on
    another device than the CPU, and, with a `NotABlockWarning`, objects that `put` rejects. Objects
    that only `put` can pickle become blocks.

    As in Ray, each call stores its argument again; the third time for the same model warns with
    `StoredAgainWarning`.

    Args:
        only: store as blocks only objects that hold an instance of this class.

    Raises:
        VersionError: this Ray has an unknown serializer.

    Example:
        >>> rzc.enable()                                                # in the driver
        >>> ray.init(runtime_env={"worker_process_setup_hook": "ray_zerocopy.enable"})  # in workers

    """
    if ray_inside.shares_tensors():
        warnings.warn(
            "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS is set: ray_zerocopy stores objects with 100 KiB "
            "of tensors or more, Ray stores smaller ones",
            stacklevel=2,
        )
    ray_inside.hook_dumps(_Serializer(only))


def disable() -> None:
    """Undo `enable`: Ray pickles everything itself again."""
    ray_inside.hook_dumps(None)


class _Serializer:
    """Pickles for Ray, in place of `ray.cloudpickle.dumps`."""

    def __init__(self, only: type | tuple[type, ...]) -> None:
        self._only = only
        self._stored: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        value: list[Any],
        protocol: int | None = None,
        buffer_callback: Callable[[Any], Any] | None = None,
    ) -> bytes:
        if buffer_callback is None:  # Ray up to 2.49 pickles functions here, without buffers
            pickled: bytes = cloudpickle.dumps(value, protocol)
            return pickled
        buffers: list[Any] = []
        try:
            pickled = _pickled(_Watcher, value, protocol, buffers, self._only)
        except Exception as error:  # it holds tensors, or Ray cannot pickle it
            if not isinstance(error, _HoldsTensors) and _pickles(value, protocol):
                raise  # the value is not the cause: a signal, for example
            buffers.clear()
            pickled = self._as_block(value, protocol, buffers, error)
        for buffer in buffers:
            buffer_callback(buffer)
        return pickled

    def _as_block(
        self, value: list[Any], protocol: int | None, buffers: list[Any], why: Exception
    ) -> bytes:
        """Pickle the objects that Ray has found in a value, all over one block."""
        self._warn_of_the_third(value)
        if len(value) == 1:  # as `put` stores it
            items: list[Any] = [_OnHost(value[0])]
        else:
            whole = _OnHost(value)
            items = [_Item(whole, index) for index in range(len(value))]
        try:
            pickled = _pickled(cloudpickle.CloudPickler, items, protocol, buffers)
        except _OnDeviceError:
            pass
        except PublishError as error:
            if not isinstance(why, _HoldsTensors):
                raise why from None
            metrics.record("rzc_automatic", 1, "refused")
            warnings.warn(f"Ray stores this object itself: {error}", NotABlockWarning, stacklevel=2)
        else:
            metrics.record("rzc_automatic", 1, "block")
            return pickled
        buffers.clear()
        return _pickled(cloudpickle.CloudPickler, value, protocol, buffers)

    def _warn_of_the_third(self, value: list[Any]) -> None:
        for obj in value:
            if isinstance(obj, torch.nn.Module):
                times = self._stored[obj] = self._stored.get(obj, 0) + 1
                if times == _STORED_AGAIN:
                    warnings.warn(
                        f"this {type(obj).__name__} has been stored {times} times, once for each "
                        f"call that takes it: pass ref = ray_zerocopy.put(model) instead",
                        StoredAgainWarning,
                        stacklevel=2,
                    )


def _pickled(
    pickler: Callable[..., Any], value: Any, protocol: int | None, buffers: list[Any], *how: Any
) -> bytes:
    file = io.BytesIO()
    pickler(file, protocol, buffers.append, *how).dump(value)
    return file.getvalue()


def _pickles(value: Any, protocol: int | None) -> bool:
    """Whether Ray can pickle a value."""
    try:
        _pickled(cloudpickle.CloudPickler, value, protocol, [])
    except Exception:
        return False
    return True


class _OnDeviceError(NotABlockError):
    """An object holds a tensor on another device, which only Ray's pickle keeps."""


class _OnHost(Shared):
    """A `Shared` that copies nothing from another device."""

    @staticmethod
    def to_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        raise _OnDeviceError(f"a tensor lies on {storage.device}")


class _Item:
    """One of several objects over one block."""

    def __init__(self, whole: Shared, index: int) -> None:
        self._reduced = whole, index

    def __reduce__(self) -> Any:
        return item, self._reduced


@named
def item(whole: Any, index: int) -> Any:
    """Unpickle one of several objects, or return a reader's result for all of them."""
    return whole[index] if isinstance(whole, list) else whole


class _HoldsTensors(Exception):  # noqa: N818 - a message to `_Serializer`
    """An object has enough tensors for a block."""


class _Watcher(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Ray's pickler, which also adds up the bytes of tensors.

    It raises `_HoldsTensors` at 100 KiB, once it has met an instance of `only`.
    """

    def __init__(self, file: io.BytesIO, protocol: Any, take_buffer: Any, only: Any) -> None:
        super().__init__(file, protocol, take_buffer)
        self._only = only
        self._met = only is object
        self._nbytes = 0

    def reducer_override(self, obj: Any) -> Any:
        if not self._met:
            self._met = isinstance(obj, self._only)
        if isinstance(obj, torch.Tensor):
            self._add(obj)
        elif isinstance(obj, _BY_CLOUDPICKLE):
            return super().reducer_override(obj)
        return NotImplemented  # as cloudpickle itself, but that took 0.5 µs for each object

    def _add(self, tensor: torch.Tensor) -> None:
        if not tensor.is_cpu:
            self._only, self._met = (), False  # Ray's pickle keeps the device
        self._nbytes += nbytes_of(tensor)
        if self._met and self._nbytes >= ray_inside.INLINE_NBYTES:
            raise _HoldsTensors
