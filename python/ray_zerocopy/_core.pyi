"""The Rust core, as Python sees it (`rust/python/`)."""

from collections.abc import Callable, Sequence
from typing import Any, Final, final

import torch
from typing_extensions import Buffer

__all__ = [
    "CONJ",
    "HEADER_NBYTES",
    "NEG",
    "PARAMETER",
    "REQUIRES_GRAD",
    "Block",
    "Gather",
    "ModuleReducer",
    "Segment",
    "Sources",
    "differing",
    "dtypes",
    "has_plain_storage",
    "module_state",
    "restore_module",
    "source_of",
]

HEADER_NBYTES: Final[int]
REQUIRES_GRAD: Final[int]
PARAMETER: Final[int]
CONJ: Final[int]
NEG: Final[int]

@final
class Sources:
    """The tensors of an object graph as a pickler meets them: views over storages of the source."""

    def __new__(
        cls, to_host: Callable[[torch.UntypedStorage], torch.UntypedStorage]
    ) -> Sources: ...
    def take(self, object: object) -> int | None: ...  # noqa: A002 - as in Rust
    def take_buffer(self, buffer: Buffer) -> int: ...
    @property
    def tensors(self) -> list[Any]: ...

@final
class Gather:
    """Storages and views on their way into a block."""

    def __new__(cls, sources: Sources) -> Gather: ...
    @property
    def table(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...
    def segments(self) -> list[Segment]: ...
    def write(self, anchor: Buffer, room: Buffer) -> None: ...

@final
class Segment(Buffer):
    """A part of the block on its way: a read-only buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Block(Buffer):
    """A block in this process, with its table: writable memory over the store's buffer."""

    def __new__(
        cls, table: bytes, buffers: Sequence[Buffer], isolation: str, anchored: bool = False
    ) -> Block: ...
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
    def prefault(self) -> None: ...
    def tensors(self) -> list[torch.Tensor | None]: ...

@final
class ModuleReducer:
    """Reduces modules of one class to the class and what differs from `nn.Module`'s defaults."""

    def __new__(
        cls,
        kind: type,
        make: Callable[[type], torch.nn.Module],
        restore: Callable[[torch.nn.Module, dict[str, Any]], None],
    ) -> ModuleReducer: ...
    def reduce(self, module: torch.nn.Module) -> Any: ...

def differing(state: dict[str, Any]) -> dict[str, Any] | None: ...
def has_plain_storage(tensor: torch.Tensor) -> bool: ...
def module_state(differing: dict[str, Any]) -> dict[str, Any]: ...
def restore_module(module: torch.nn.Module, differing: dict[str, Any]) -> None: ...
def source_of(address: int) -> tuple[str, int, int] | None: ...
def dtypes() -> list[str]: ...
