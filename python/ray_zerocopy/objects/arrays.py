"""numpy arrays, as buffers of their elements."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from ray_zerocopy.pickled import named


def reducer(kind: Any) -> Callable[[Any], Any] | None:
    """Give what reduces arrays of a class; None if the class has to do with how it pickles."""
    _ = np.rec  # numpy 2 imports it when asked; before, its classes would travel by value
    pickled = ("__reduce__", "__reduce_ex__", "__setstate__")
    own = [getattr(kind, name) for name in pickled]
    known = [[getattr(base, name) for name in pickled] for base in (np.ndarray, np.ma.MaskedArray)]
    return _reduce_array if own in known else None


def _reduce_array(whole: np.ndarray) -> Any:
    """Reduce an array to a buffer of its elements, in the order in which they lie in memory.

    numpy does so only for arrays of no other class than its own; of a memory map it writes the
    whole file into the pickle. What has gaps comes back without. Empty arrays come this way, too:
    of those numpy 2 names a function that numpy 1.26 lacks. (numpy 2.4)
    """
    plain = whole.view(np.ndarray)
    if plain.dtype.hasobject:
        return NotImplemented
    if not np.may_share_memory(elements := plain.ravel(order="K"), plain) and plain.nbytes:
        plain = plain.copy(order="K")
        elements = plain.ravel(order="K")
    buffer = pickle.PickleBuffer(elements.view(np.uint8).data)
    made = (array, (type(whole), plain.shape, plain.dtype, plain.strides, buffer))
    state = {k: v for k, v in getattr(whole, "__dict__", {}).items() if k not in _OF_A_FILE}
    return (*made, state, None, None, set_array_attributes) if state else made


# What a memory map knows of its file, which its elements leave for the block.
_OF_A_FILE = ("_mmap", "filename", "mode", "offset")


@named
def array(
    kind: type[np.ndarray], shape: Any, dtype: np.dtype, strides: Any, buffer: Any
) -> np.ndarray:
    """Unpickle an array over a buffer; strides in bytes."""
    return np.ndarray(shape, dtype, buffer, 0, strides).view(kind)


@named
def set_array_attributes(array: np.ndarray, attributes: dict[str, Any]) -> None:
    """Give an array of a subclass its attributes."""
    vars(array).update(attributes)
