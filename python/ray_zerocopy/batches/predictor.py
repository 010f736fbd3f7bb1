"""Run a model on batches of columns, for Ray Data and Ray Serve.

batch ─ preprocess ─▶ columns ─ inputs ─▶ model ─ postprocess ─▶ columns
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ray_zerocopy.batches.columns import (
    Columns,
    argument,
    columns_of,
    described,
    floats_of,
    outputs,
)
from ray_zerocopy.errors import InputError, OutputError, RayZeroCopyError
from ray_zerocopy.wrappers import current

Hook = Callable[[Any], Any]

# Errors of torch and Python for wrong arguments.
_REFUSALS = (TypeError, ValueError, LookupError, RuntimeError)
# Subclasses with other causes than arguments. torch 2.8 and newer have `AcceleratorError`.
_FAULTS = (
    *(RayZeroCopyError, RecursionError, torch.OutOfMemoryError),
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),
)


class Predictor:
    """Runs a model on batches of columns; loads it once, over the shared block.

    Ray Data's `map_batches` takes this class; `ray_zerocopy.data.map_batches` does it in one line.

    The model gets each column of numbers as a tensor with its own memory. Integers and bools keep
    their dtype, but unsigned integers of more than one byte become int64. Floating-point numbers
    get the dtype of the model's parameters; if these have several dtypes, float64 becomes torch's
    default dtype. Lists of equal length count as numbers. Strings and other objects do not change.

    Args:
        model: a reference from `put`, a result of `publish` or `follow` (then the current version
            runs each batch), a `ModelWrapper`, or the model itself. A model from a reference runs
            in the mode it was stored in, others in eval mode.
        inputs: the columns that the model takes: a name or names for positional arguments, or a
            mapping from keyword arguments to columns. Default: all columns as keyword arguments, or
            a single column as the only argument.
        device: the device for the model and the columns; default: CPU, without a copy of the model.
        preprocess: a function from the batch to the batch for `inputs`: columns, a DataFrame, or a
            mapping of tensors and other arguments, which do not change.
        postprocess: a function from the model's output to columns: a tensor or array (column
            `"output"`), a tuple (`"output_0"`, `"output_1"`), a mapping, dataclass or named tuple
            (its names), or a list with one mapping per row. Rows of unequal shapes become a column
            of objects.
        method_name: the model's method to call.

    """

    def __init__(
        self,
        model: Any,
        *,
        inputs: str | Sequence[str] | Mapping[str, str] | None = None,
        device: torch.device | str | None = None,
        preprocess: Hook | None = None,
        postprocess: Hook | None = None,
        method_name: str = "__call__",
    ) -> None:
        self._current = current(model, device=device)
        self._method_name = method_name
        self._inputs = [inputs] if isinstance(inputs, str) else inputs
        self._device = device
        self._preprocess = preprocess
        self._postprocess = postprocess
        self._floats: tuple[Callable[[], object], torch.dtype | None] = (lambda: None, None)

    @property
    def model(self) -> Any:
        """The model that runs the next batch."""
        return self._current()

    def __call__(self, batch: Any) -> Columns:
        """Return the batch plus the output's columns, which replace columns of the same name.

        `batch` is a mapping of columns, a DataFrame or an Arrow table. Raises as `predict` does,
        and `OutputError` if the output and the batch differ in their number of rows.
        """
        columns, found = columns_of(batch), self.predict(batch)
        for name, column in found.items():
            expected = len(next(iter(columns.values()), column))
            if len(column) != expected:
                raise OutputError(
                    f"model returned {len(column)} rows for {name!r}; expected {expected}, one per "
                    f"input row (use postprocess=)"
                )
        return {**columns, **found}

    def predict(self, batch: Any) -> Columns:
        """Return only the output's columns.

        Raises:
            InputError: the batch lacks a column of the model, or the model rejects one for its
                type, dtype or shape.
            OutputError: a part of the output is not a column.

        """
        if self._preprocess:
            with _refused("preprocess", lambda: columns_of(batch).items()):
                made = self._preprocess(batch)
        else:
            made = batch
        model = self.model
        taken, keywords = self._taken(columns_of(made))
        floats = self._floats_of(model)
        values = [argument(name, column, floats, self._device) for name, column in taken]
        args, kwargs = ([], dict(zip(keywords, values, strict=True))) if keywords else (values, {})
        with torch.inference_mode():
            with _refused("model", lambda: zip([name for name, _ in taken], values, strict=True)):
                output = getattr(model, self._method_name)(*args, **kwargs)
            return outputs(self._postprocess(output) if self._postprocess else output)

    def _taken(self, columns: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[str]]:
        """Return the columns that the model takes, and their keywords, if any."""
        inputs = self._inputs
        if inputs is None:
            inputs = list(columns) if len(columns) == 1 else {name: name for name in columns}
        names, keywords = inputs, []
        if isinstance(inputs, Mapping):
            names, keywords = list(inputs.values()), list(inputs)
        for name in names:
            if name not in columns:
                raise InputError(f"model takes column {name!r}; the batch has {list(columns)}")
        return [(name, columns[name]) for name in names], keywords

    def _floats_of(self, model: Any) -> torch.dtype | None:
        """Return a model's `floats_of`, cached (144 parameters: 1.3 ms)."""
        seen, floats = self._floats
        if seen() is not model:
            floats = floats_of(model)
            if isinstance(model, torch.nn.Module):  # others allow no weak references
                self._floats = weakref.ref(model), floats
        return floats


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those of `Predictor` and those for Ray."""
    own = inspect.signature(Predictor).parameters.keys() & options.keys()
    how = {name: options[name] for name in own}
    return how, {name: value for name, value in options.items() if name not in own}


@contextlib.contextmanager
def _refused(by: str, batch: Callable[[], Iterable[tuple[str, Any]]]) -> Iterator[None]:
    """Raise `InputError` with the columns for errors that they may have caused."""
    try:
        yield
    except _FAULTS:
        raise
    except _REFUSALS as error:
        columns = ", ".join(itertools.starmap(described, batch())) or "a batch without columns"
        raise InputError(
            f"{by} refused {columns}: {type(error).__name__}: {error}; convert the type, dtype or "
            f"shape in preprocess="
        ) from error
