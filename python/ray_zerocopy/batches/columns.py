"""Convert a batch's columns to a model's arguments, and its output to columns.

JSON ─ from_json ─▶ columns ─ argument ─▶ tensors ─▶ model ─ outputs ─▶ columns ─ to_json ─▶ JSON

A column is an ndarray with one row per item. Rows of unequal shapes are a column of objects, as in
Ray Data.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
import torch

from ray_zerocopy.errors import InputError, OutputError

Columns = dict[str, np.ndarray]

_NUMBERS = "biufc"
_TEXT = "OSUT"  # objects and strings: passed on as they are
_SIGNED_NBYTES = 1  # torch cannot compute with larger unsigned integers
_REAL = (bool, int, float, complex, np.bool_, np.number)
_ROWS = (list, tuple, np.ndarray)


# --- from a batch to the model --------------------------------------------------------------------


def columns_of(batch: Any) -> Mapping[str, Any]:
    """Return a batch as columns: a mapping unchanged, a DataFrame or Table as Ray Data would."""
    if isinstance(batch, Mapping):
        return batch
    blocks = importlib.import_module("ray.data.block")  # needs pyarrow, which Serve lacks
    found: Mapping[str, Any] = blocks.BlockAccessor.for_block(batch).to_numpy()
    return found


def from_json(body: Any) -> Columns:
    """Return the columns of a JSON object of lists.

    Raises `InputError` for any other body, and for columns with different numbers of rows.
    """
    if not isinstance(body, dict):
        kind = type(body).__name__
        raise InputError(f"the body is a {kind}, not a JSON object of columns such as {{'x': [1]}}")
    for name, rows in body.items():
        if not isinstance(rows, list):
            raise InputError(f"column {name!r} is a {type(rows).__name__}, not a list of rows")
    counts = {name: len(rows) for name, rows in body.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"columns have unequal numbers of rows: {counts}")
    return {name: _read(rows) for name, rows in body.items()}


def _read(rows: list[Any]) -> np.ndarray:
    if (dense := _dense(rows)) is not None:
        return dense
    return np.array(rows) if all(map(_is_same_in_numpy, rows)) else _objects(rows)


def floats_of(model: Any) -> torch.dtype | None:
    """Return the dtype of a module's floating-point parameters, else buffers; None if several."""
    if not isinstance(model, torch.nn.Module):
        return None
    for tensors in (model.parameters(), model.buffers()):
        dtypes = {tensor.dtype for tensor in tensors if _computes_in_floats(tensor.dtype)}
        if dtypes:
            return dtypes.pop() if len(dtypes) == 1 else None
    return None


def _computes_in_floats(dtype: torch.dtype) -> bool:
    """Whether torch computes in this dtype; one-byte floats only store weights."""
    return bool(dtype.is_floating_point and dtype.itemsize > 1)


def argument(
    name: str, column: Any, floats: torch.dtype | None, device: torch.device | str | None
) -> Any:
    """Return a model's argument for a column: a copied tensor for numbers, else the column itself.

    Integers and bools keep their dtype, but unsigned integers of more than one byte become int64.
    Floating columns get `floats`, the model's dtype. Without it, float64 becomes torch's default
    dtype, as in `torch.tensor` of Python numbers.

    Raises `InputError` for dates, rows of unequal shapes, and None among numbers.
    """
    if isinstance(column, torch.Tensor):
        return column.to(device)
    if hasattr(column, "to_numpy"):  # a Series
        column = column.to_numpy()
    if not isinstance(column, np.ndarray):
        return column
    if column.dtype.kind == "O":
        column = _stacked(name, column)
    kind, itemsize = column.dtype.kind, column.dtype.itemsize
    if kind in _TEXT:
        return column
    if kind not in _NUMBERS:
        raise InputError(
            f"column {name!r} is {column.dtype}, which no tensor holds: convert it in preprocess="
        )
    dtype = None
    if kind == "u" and itemsize > _SIGNED_NBYTES:
        if itemsize == 8 and column.size and column.max() > np.iinfo(np.int64).max:
            raise InputError(f"column {name!r} is uint64 with numbers beyond int64")
        column = column.astype(np.int64)
    elif kind == "f":
        column = column.astype(np.float64) if itemsize > 8 else column
        dtype = floats or (torch.get_default_dtype() if itemsize >= 8 else None)
    # Copy: a batch may be read-only, and the model may write to its arguments.
    copied = np.array(column, dtype=column.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(copied).to(device, dtype)


def _stacked(name: str, column: np.ndarray) -> np.ndarray:
    """Convert a column of objects to numbers if it has only numbers; else return it unchanged."""
    rows = list(column)
    if not rows:
        return column
    if (dense := _dense(rows)) is not None:
        return dense
    kinds = {type(leaf) for row in rows for leaf in _leaves(row)}
    if not all(issubclass(kind, (*_REAL, NoneType)) for kind in kinds) or kinds <= {NoneType}:
        return column
    if NoneType in kinds:
        wrong = "None beside numbers: fill it"
    elif len(lengths := {len(row) if isinstance(row, _ROWS) else 1 for row in rows}) > 1:
        wrong = f"rows of {min(lengths)} to {max(lengths)} items: pad them to one length"
    else:
        wrong = "rows of unequal shapes, or integers beyond 64 bits: make them equal"
    raise InputError(f"column {name!r} (object) holds {wrong} in preprocess=")


def _dense(rows: Sequence[Any]) -> np.ndarray | None:
    """Return rows of numbers as one array; None for other rows and for unequal shapes."""
    if not all(isinstance(row, _REAL + _ROWS) for row in rows):
        return None
    try:
        array = np.array([_nested(row) for row in rows])
    except ValueError:  # rows of unequal shapes
        return None
    return array if array.dtype.kind in _NUMBERS else None


def _nested(row: Any) -> Any:
    """Convert arrays of arrays, such as Arrow's lists of lists, to lists."""
    objects = isinstance(row, np.ndarray) and row.dtype.kind == "O"
    return [_nested(item) for item in row] if objects else row


def _leaves(row: Any) -> Iterator[Any]:
    """Yield the items of a row, but only one for an array of numbers."""
    if isinstance(row, np.ndarray) and row.dtype.kind in _NUMBERS:
        yield row.dtype.type()
    elif isinstance(row, _ROWS):
        for item in row:
            yield from _leaves(item)
    else:
        yield row


def _objects(rows: Sequence[Any]) -> np.ndarray:
    """Return any rows as a column of objects."""
    column = np.empty(len(rows), object)
    for index, row in enumerate(rows):
        column[index] = row
    return column


def described(name: str, value: Any) -> str:
    """Describe a column in an error: its name, dtype and shape."""
    if not isinstance(value, np.ndarray | torch.Tensor):
        return f"{name!r} ({type(value).__name__})"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{name!r} ({dtype}{list(value.shape)})"


# --- from the model to columns --------------------------------------------------------------------


def outputs(output: Any) -> Columns:
    """Return a model's output as columns, each in its own memory.

    A tensor or array becomes the column `"output"`, a tuple `"output_0"`, `"output_1"` and so on. A
    mapping, a dataclass, a named tuple and a list with one mapping per row have their own names.
    Rows of unequal shapes become a column of objects.

    Raises `OutputError` for outputs without rows.
    """
    return {name: _column(name, value) for name, value in _named(output).items()}


def _named(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Mapping):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {each.name: getattr(output, each.name) for each in dataclasses.fields(output)}
    if isinstance(output, tuple):
        unnamed = [f"output_{index}" for index in range(len(output))]
        names = getattr(output, "__match_args__", unnamed)  # named tuples have it
        return dict(zip(names, output, strict=True))
    if isinstance(output, list) and output and all(isinstance(row, Mapping) for row in output):
        names = dict.fromkeys(name for row in output for name in row)
        return {name: [row.get(name) for row in output] for name in names}
    return {"output": output}


def _column(name: str, value: Any) -> np.ndarray:
    try:
        column = _array(value)
    except (TypeError, ValueError) as error:
        raise _no_column(name, value) from error
    if column.ndim == 0:
        raise _no_column(name, value)
    return column


def _no_column(name: str, value: Any) -> OutputError:
    what = "None" if value is None else f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        what = "a scalar"
    return OutputError(
        f"model returned {what} for {name!r}; expected one row per input row (use postprocess=)"
    )


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return _rows(value.unbind()) if value.is_nested else _from_tensor(value)
    if isinstance(value, list | tuple):
        return _rows(value)
    return np.array(value)  # copy: the model may keep its output, and write to it in the next call


def _rows(values: Sequence[Any]) -> np.ndarray:
    """Return a list of rows as a column; of objects if their shapes differ."""
    rows = [_array(row) if isinstance(row, torch.Tensor | list | tuple) else row for row in values]
    shapes = {() if isinstance(row, Mapping) else np.shape(row) for row in rows}
    if len(shapes) > 1 or any(isinstance(row, np.ndarray) and row.dtype == object for row in rows):
        return _objects(rows)
    column = np.array(rows)
    changed = column.dtype.kind in "SU" and not all(map(_is_same_in_numpy, rows))
    return _objects(rows) if changed else column


def _is_same_in_numpy(row: Any) -> bool:
    """Whether numpy, which drops zeros at the end of text and bytes, gives back the same text."""
    return isinstance(row, np.ndarray) or (isinstance(row, str) and not row.endswith("\0"))


def _from_tensor(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and (tensor.itemsize == 1 or tensor.dtype is torch.bfloat16):
        tensor = tensor.float()  # numpy lacks these
    tensor = tensor.to(torch.complex64) if tensor.dtype is torch.complex32 else tensor
    return np.array(tensor.numpy())


# --- from columns to JSON -------------------------------------------------------------------------


def to_json(columns: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Return columns as lists that are valid JSON: null for NaN and infinities, which JSON lacks.

    Raises `OutputError` for types that JSON lacks, such as complex numbers.
    """
    found = {}
    for name, column in columns.items():
        try:
            found[name] = _plain(column)
        except TypeError as error:
            raise OutputError(f"column {name!r} holds {error} (use postprocess=)") from None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        if not (finite := np.isfinite(value)).all():
            value = value.astype(object)
            value[~finite] = None
        return value.tolist()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuU":
        return value.tolist()
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        raise TypeError(f"{value.dtype}, which JSON lacks")
    if isinstance(value, torch.Tensor):
        return _plain(_from_tensor(value))
    if isinstance(value, _ROWS):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, str | int | None):
        raise TypeError(f"a {type(value).__name__}, which JSON lacks")
    return value
