"""A model that takes batches of columns, and gives columns: what Ray Data and Ray Serve run.

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

# What torch and Python raise where arguments do not fit.
_REFUSALS = (TypeError, ValueError, LookupError, RuntimeError)
# Of those, what arguments are not to blame for. torch 2.8 and newer have `AcceleratorError`.
_FAULTS = (
    *(RayZeroCopyError, RecursionError, torch.OutOfMemoryError),
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),
)


class Predictor:
    """Runs batches of columns through a model that is loaded once, over the shared block.

    Made for `map_batches`, which `ray_zerocopy.data.map_batches` calls in one line.

    A column of numbers reaches the model as a tensor of its own memory: integers and bools as they
    are, unsigned integers of more than a byte as int64, floating-point numbers in the dtype of the
    model's parameters (where these have several, float64 becomes torch's default dtype). Lists of
    one length count as numbers; strings and other objects stay what they are.

    Args:
        model: a reference from `put`, what `publish` or `follow` gave (the latter's current version
            runs each batch), a `ModelWrapper`, or the model itself. What a reference
            holds runs in the mode it was stored in, the others in eval mode.
        inputs: the columns that the model takes: a name or names for positional arguments, or a
            mapping from the names of keyword arguments to columns. By default all columns, by
            their names, or a single one as the only argument.
        device: where the model is loaded and the columns go; by default the model is not copied.
        preprocess: makes the batch from which `inputs` are taken: columns, a DataFrame, or a
            mapping of tensors and whatever else the model takes, which reach it as they are.
        postprocess: makes of the model's output what becomes columns: a tensor or array (column
            `"output"`), a tuple (`"output_0"`, `"output_1"`), a mapping, dataclass or named tuple
            by its names, or a list with a mapping for each row. Rows of unequal shapes become a
            column of objects.
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
        """Give the batch with the output's columns added, which replace others of their names.

        `batch` is a mapping of columns, a DataFrame or an Arrow table. Raises as `predict` does,
        and `OutputError` where the output has another number of rows than the batch.
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
        """Give the output's columns alone.

        Raises:
            InputError: the model lacks a column, or refuses one: by its kind, dtype or shape.
            OutputError: a part of the output is no column.

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
        """Give the columns that the model takes, and the keywords for them, if it has any."""
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
        """Give `floats_of` a model, which takes 1.3 ms for one of 144 parameters: once for each."""
        seen, floats = self._floats
        if seen() is not model:
            floats = floats_of(model)
            if isinstance(model, torch.nn.Module):  # others have none, and no weak references
                self._floats = weakref.ref(model), floats
        return floats


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the options of a `Predictor` from those that go on to Ray."""
    own = inspect.signature(Predictor).parameters.keys() & options.keys()
    how = {name: options[name] for name in own}
    return how, {name: value for name, value in options.items() if name not in own}


@contextlib.contextmanager
def _refused(by: str, batch: Callable[[], Iterable[tuple[str, Any]]]) -> Iterator[None]:
    """Raise `InputError` with the columns where they may be what an error comes from."""
    try:
        yield
    except _FAULTS:
        raise
    except _REFUSALS as error:
        columns = ", ".join(itertools.starmap(described, batch())) or "a batch without columns"
        raise InputError(
            f"{by} refused {columns}: {type(error).__name__}: {error}; another kind, dtype or "
            f"shape is made in preprocess="
        ) from error
