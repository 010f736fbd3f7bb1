"""Put the casts and merges of a loader into shared memory from the start.

    cast, stack, cat ─▶ arena ─▶ block; each page is freed once it is written

The arena has huge pages, the C library's heap small ones: casting and storing 375 MiB takes 0.6
times as long. All other tensors stay where the loader put them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from ray_zerocopy import _core
from ray_zerocopy.objects import torch_inside

_FROM_NBYTES = 4096  # an allocation in the arena takes at least a page
_MERGES = {torch.stack, torch.cat, torch.concat, torch.concatenate}
_COPIES = {torch.Tensor.clone, torch.clone, torch.Tensor.contiguous}
_HERE = threading.local()


@contextlib.contextmanager
def following(arena: _core.Arena) -> Iterator[None]:
    """Put casts and merges of this thread, and of threads it starts meanwhile, into the arena."""
    loading = _Loading(arena)
    with contextlib.ExitStack() as stack:
        stack.callback(loading.end)
        stack.enter_context(_followed_threads)
        stack.enter_context(loading.here())
        yield


class _Loading:
    """One run of a loader in all its threads."""

    def __init__(self, arena: _core.Arena) -> None:
        self.arena = arena
        self.running = True
        self.births = _Births(self)
        # only on a terminal, and only after one second
        self.progress = tqdm(
            desc="build", unit="B", unit_scale=True, delay=1, disable=None, leave=False
        )
        self.lock = threading.Lock()

    def end(self) -> None:
        self.running = False
        self.progress.close()

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Follow this thread."""
        outer, _HERE.loading = getattr(_HERE, "loading", None), self
        try:
            with self.births:
                yield
        finally:
            _HERE.loading = outer

    def lend(self, nbytes: int) -> torch.Tensor:
        """Return that many bytes of the arena, as a uint8 tensor with its own storage."""
        with self.lock:
            self.progress.update(nbytes)
        return torch.frombuffer(self.arena.lend(nbytes), dtype=torch.uint8)


class _Births(TorchFunctionMode):  # type: ignore[misc]
    """Puts results of casts and merges into the arena."""

    def __init__(self, loading: _Loading) -> None:
        super().__init__()
        self.loading = loading

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.loading.running and not torch.jit.is_tracing():
            if function is torch.Tensor.to and args and "copy" not in kwargs:
                born = self._cast(args[0], args[1:], kwargs)
            elif function in _COPIES and len(args) == 1 and not kwargs:
                born = self._copied(function, args[0])
            elif function in _MERGES and args and "out" not in kwargs:
                born = self._merged(function, args, kwargs)
            else:
                born = None
            if born is not None:
                return born
        return function(*args, **kwargs)

    def _cast(self, source: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
        if not _can_be_copied(source) or not source.is_contiguous():
            return None
        device, dtype, _, memory_format = torch_inside.parse_to(*args, **kwargs)
        stays = device is None or device.type == "cpu"
        if dtype is None or dtype == source.dtype or not stays or memory_format is not None:
            return None
        return self._copy(source, dtype, source.stride())

    def _copied(self, function: Any, source: Any) -> torch.Tensor | None:
        if not _can_be_copied(source):
            return None
        if function is torch.Tensor.contiguous:
            return None if source.is_contiguous() else self._copy(source, source.dtype)
        return self._copy(source, source.dtype, source.stride()) if source.is_contiguous() else None

    def _copy(
        self, source: torch.Tensor, dtype: torch.dtype, stride: tuple[int, ...] | None = None
    ) -> torch.Tensor | None:
        if source.numel() * dtype.itemsize < _FROM_NBYTES:
            return None
        copy = self._empty(source.numel(), dtype).view(source.shape)
        if stride is not None:  # a contiguous tensor can have any stride where a length is 1
            copy = copy.as_strided(source.shape, stride)
        return copy.copy_(source)

    def _merged(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
        sources = args[0]
        if not isinstance(sources, (list, tuple)) or not all(map(_can_be_copied, sources)):
            return None
        numel = sum(source.numel() for source in sources)
        alike = len({source.dtype for source in sources}) == 1
        if not alike or numel * sources[0].dtype.itemsize < _FROM_NBYTES:
            return None
        # a contiguous tensor can have others: any stride is valid where a length is 1
        if any(source.stride() != _strides(source.shape) for source in sources):
            return None
        # torch resizes `out`; it does not reallocate an empty tensor with a large enough storage
        out = self._empty(numel, sources[0].dtype)[:0]
        return function(*args, **kwargs, out=out)

    def _empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self.loading.lend(numel * dtype.itemsize).view(dtype)


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor without `__torch_dispatch__` over a storage in host memory."""
    kind = type(tensor)
    dispatches = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not dispatches and tensor.is_cpu and _core.has_plain_storage(tensor)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def _can_be_copied(source: Any) -> bool:
    return (
        type(source) in (torch.Tensor, torch.nn.Parameter)
        and _is_plain(source)
        and not (source.is_conj() or source.is_neg())
        and not (source.requires_grad and torch.is_grad_enabled())
    )


class _FollowedThreads:
    """While any loader runs: follow the threads that a followed thread starts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaders = 0
        self.is_there = False  # `_start`, as `Thread.start` or in a wrapper of it
        self.start: Callable[[threading.Thread], None] = threading.Thread.start

    def __enter__(self) -> None:
        with self.lock:
            self.loaders += 1
            if self.loaders == 1 and not self.is_there:
                self.is_there = True
                self.start = threading.Thread.start
                threading.Thread.start = _start  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.loaders -= 1
            # if other code has wrapped it meanwhile, leave it: the wrapper still calls ours
            if not self.loaders and threading.Thread.start is _start:
                self.is_there = False
                threading.Thread.start = self.start  # type: ignore[method-assign, assignment]


_followed_threads = _FollowedThreads()


def _start(thread: threading.Thread) -> None:
    """Start a thread, followed too: up to Python 3.13 it does not inherit context variables."""
    loading = getattr(_HERE, "loading", None)
    if loading is not None:
        run = thread.run

        def run_followed() -> None:
            del thread.run  # restore the method of the class
            with loading.here():
                run()

        thread.run = run_followed  # type: ignore[method-assign]
    _followed_threads.start(thread)
