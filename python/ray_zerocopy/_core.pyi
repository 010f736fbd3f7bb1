"""The Rust core, as Python sees it (`rust/python.rs`)."""

from collections.abc import Callable, Sequence
from typing import Any, Final, final

import torch
from typing_extensions import Buffer

__all__ = [
    "CONJ",
    "NEG",
    "PARAMETER",
    "REQUIRES_GRAD",
    "Block",
    "Gather",
    "Segment",
    "TensorIds",
    "differing",
    "dtypes",
    "module_state",
    "restore_module",
    "source_of",
]

REQUIRES_GRAD: Final[int]
PARAMETER: Final[int]
CONJ: Final[int]
NEG: Final[int]

@final
class Gather:
    """Storages and views on their way into a block."""

    def __new__(
        cls,
        storages: Sequence[tuple[int, int, Any]],
        views: Sequence[tuple[int, str, int, int, Sequence[int], Sequence[int]]],
        adjoin: bool,
    ) -> Gather: ...
    @property
    def table(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def adjoins(self) -> bool: ...
    def segments(self) -> list[Segment]: ...

@final
class Segment(Buffer):
    """A run of the block on its way: a read-only buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Block(Buffer):
    """A block in this process, with its table: writable memory over the store's buffer."""

    def __new__(cls, table: bytes, buffers: Sequence[Buffer], isolation: str) -> Block: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def fallback(self) -> str | None: ...
    @property
    def held(self) -> str: ...
    @property
    def source(self) -> tuple[str, int, int] | None: ...
    @property
    def spans(self) -> list[tuple[int, int]]: ...
    @property
    def views(self) -> list[tuple[int, str, int, int, tuple[int, ...], tuple[int, ...]]]: ...
    def clear(self) -> bool: ...
    def prefault(self) -> None: ...
    def tensors(self) -> list[torch.Tensor | None]: ...

@final
class TensorIds:
    """Picks the tensors out of all that a pickler asks about: its `persistent_id`."""

    def __new__(cls, take: Callable[[torch.Tensor], int | None]) -> TensorIds: ...
    def __call__(self, obj: object, /) -> int | None: ...

def differing(state: dict[str, Any]) -> dict[str, Any] | None: ...
def module_state(differing: dict[str, Any]) -> dict[str, Any]: ...
def restore_module(module: torch.nn.Module, differing: dict[str, Any]) -> None: ...
def source_of(address: int) -> tuple[str, int, int] | None: ...
def dtypes() -> list[str]: ...
