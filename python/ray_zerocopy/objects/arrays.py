"""Reduce numpy arrays to buffers over the memory of their elements.

    memory     ▒▒▒▒▒▒▒▒▒▒▒▒████████████████████▒▒▒▒▒▒     of another array, or a file
    window                 └─── buffer ───────┘           from its first element to its last

Overlapping windows share one span, as do an array and a tensor over the same memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ray_zerocopy.pickled import named


def reducer(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that reduces arrays of a class; None if the class pickles its own way."""
    _ = np.rec  # numpy 2 imports it lazily; without it, its classes would pickle by value
    pickled = ("__reduce__", "__reduce_ex__", "__setstate__")
    own = [getattr(kind, name) for name in pickled]
    known = [[getattr(base, name) for name in pickled] for base in (np.ndarray, np.ma.MaskedArray)]
    return _reduce_array if own in known else None


def _reduce_array(whole: np.ndarray) -> Any:
    """Reduce an array to a buffer, with its elements in memory order.

    numpy does so only for its own class, and pickles the whole file of a memory map. Arrays with
    gaps load without gaps. Empty arrays are reduced here because numpy 2 would pickle a function
    for them that numpy 1.26 lacks. (numpy 2.4)
    """
    plain = whole.view(np.ndarray)
    if plain.dtype.hasobject:
        return NotImplemented
    flags = plain.flags
    if flags.c_contiguous or flags.f_contiguous:
        memory, strides, offset = plain.ravel(order="K"), plain.strides, 0
    else:
        memory, strides, offset = _window(plain)
    align = min(plain.dtype.alignment, 8) if flags.aligned else 1
    buffer = _buffer(memory, align)
    made = (array, (type(whole), plain.shape, plain.dtype, strides, buffer, offset))
    state = {k: v for k, v in getattr(whole, "__dict__", {}).items() if k not in _OF_A_FILE}
    return (*made, state, None, None, set_array_attributes) if state else made


def columns_reducer(kind: type) -> Callable[[Any], Any] | None:
    """Return the function for a class of pandas' blocks, which hold the columns of frames."""
    bases = [(base.__module__, base.__name__) for base in kind.__mro__]
    return _reduce_columns if ("pandas._libs.internals", "Block") in bases else None


def _reduce_columns(block: Any) -> Any:
    """Reduce a pandas block; copy values that another frame or series shows, too.

    pandas copies such values before it writes to them. A pickle does not say who shows them, and a
    loaded frame would write to the other one. (pandas 3.1)
    """
    made, (values, *others) = block.__reduce_ex__(5)[:2]
    refs = getattr(block, "refs", None)
    shown = refs is not None and refs.has_reference()
    return made, (values.copy() if shown else values, *others)


def _window(plain: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], int]:
    """Return the memory from an array's first byte to its last, and its strides and offset there.

    The memory is a copy if the array has gaps. It has repeated elements once.
    """
    steps = tuple(zip(plain.shape, plain.strides, strict=True))
    once = plain[tuple(slice(None if step else 1) for _, step in steps)]
    ascending = once[tuple(slice(None, None, -1 if step < 0 else 1) for _, step in steps)]
    reach = sum((n - 1) * abs(step) for n, step in steps) + plain.itemsize
    if reach > once.nbytes:
        once = once.copy(order="K")
        once.flags.writeable = plain.flags.writeable
        strides = (own if step else 0 for own, (_, step) in zip(once.strides, steps, strict=True))
        return once.ravel(order="K"), tuple(strides), 0
    first = ascending[(slice(1),) * plain.ndim].reshape(1).view(np.uint8)
    memory = as_strided(first, (reach,), (1,), writeable=plain.flags.writeable)
    return memory, plain.strides, sum((n - 1) * -step for n, step in steps if step < 0)


def _buffer(memory: np.ndarray, align: int) -> pickle.PickleBuffer:
    """Return contiguous memory as a buffer whose item size is its alignment."""
    items = memory.view(np.uint8) if memory.nbytes else np.empty(0, np.uint8)
    if items.size % align:
        align = 1
    return pickle.PickleBuffer(items.view(f"u{align}").data)


# Attributes of a memory map about its file; the stored array has no file.
_OF_A_FILE = ("_mmap", "filename", "mode", "offset")


@named
def array(
    kind: type[np.ndarray], shape: Any, dtype: np.dtype, strides: Any, buffer: Any, offset: int = 0
) -> np.ndarray:
    """Unpickle an array over a buffer; strides and offset in bytes."""
    made = np.ndarray(shape, dtype, buffer, offset, strides)
    return made if kind is np.ndarray else made.view(kind)


@named
def set_array_attributes(array: np.ndarray, attributes: dict[str, Any]) -> None:
    """Set the attributes of an array of a subclass."""
    vars(array).update(attributes)
