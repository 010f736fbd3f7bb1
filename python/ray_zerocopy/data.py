"""Ray Data: a pool of actors that run batches through one shared model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ray.data import ActorPoolStrategy, Dataset

from ray_zerocopy.wrappers import current, wrap

Batch = dict[str, Any]
Hook = Callable[[Any], Any]


class Predictor:
    """Runs batches of columns through a model that is loaded once, over the shared block.

    Made for `map_batches`, which `ray_zerocopy.data.map_batches` calls in one line.

    Args:
        model: a reference from `put`, what `publish` or `follow` gave (the latter's current version
            runs each batch), a `ModelWrapper`, or the model itself. What a reference
            holds runs in the mode it was stored in, the others in eval mode.
        inputs: the columns that the model takes: a name or names for positional arguments, or a
            mapping from the names of keyword arguments to columns. By default all columns, by
            their names, or a single one as the only argument.
        device: where the model is loaded and the columns go; by default the model is not copied.
        preprocess: makes the batch from which `inputs` are taken: arrays, tensors, or whatever
            else the model takes.
        postprocess: makes of the model's output what becomes columns: a tensor or array (column
            `"output"`), a tuple (`"output_0"`, `"output_1"`) or a mapping by its names.
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

    @property
    def model(self) -> Any:
        """The model that runs the next batch."""
        return self._current()

    def __call__(self, batch: Batch) -> Batch:
        """Give the batch with the output's columns added, which replace others of their names."""
        return {**batch, **self.predict(batch)}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Give the output's columns alone."""
        batch = self._preprocess(batch) if self._preprocess else batch
        args, kwargs = self._arguments(batch)
        with torch.inference_mode():
            output = getattr(self.model, self._method_name)(*args, **kwargs)
            return _columns(self._postprocess(output) if self._postprocess else output)

    def _arguments(self, batch: Batch) -> tuple[list[Any], dict[str, Any]]:
        def argument(name: str) -> Any:
            if name not in batch:
                raise KeyError(f"the model takes {name!r}, the batch has {list(batch)}")
            return _argument(batch[name], self._device)

        inputs = self._inputs
        if inputs is None:
            inputs = list(batch) if len(batch) == 1 else {name: name for name in batch}
        if isinstance(inputs, Mapping):
            return [], {name: argument(column) for name, column in inputs.items()}
        return [argument(name) for name in inputs], {}


def map_batches(
    dataset: Dataset, model: Any, *, actors: int | tuple[int, int] | None = None, **options: Any
) -> Dataset:
    """Add a model's outputs to a dataset as columns; a pool of actors shares the one model.

    The block lives as long as the dataset does, or what is made from it.

    Args:
        dataset: whose batches reach `preprocess`, or the model, as a dict of arrays.
        model: as for `Predictor`.
        actors: how many, or the fewest and the most; without it Ray Data decides.
        options: those of `Predictor`, such as `inputs` and `postprocess`; the others go to
            `Dataset.map_batches`: `batch_size`, `num_gpus` and the rest.

    Example:
        >>> scored = rzc.data.map_batches(dataset, model, actors=4, batch_size=256)

    """
    if actors is not None:
        fewest, most = (actors, actors) if isinstance(actors, int) else actors
        options["compute"] = ActorPoolStrategy(min_size=fewest, max_size=most)
    how, options = split_options(options)
    how["model"] = wrap(model)
    options = {"batch_format": "numpy", "fn_constructor_kwargs": how, **options}
    return dataset.map_batches(Predictor, **options)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the options of a `Predictor` from those that go on to Ray."""
    own = inspect.signature(Predictor).parameters.keys() & options.keys()
    how = {name: options[name] for name in own}
    return how, {name: value for name, value in options.items() if name not in own}


def _argument(column: Any, device: torch.device | str | None) -> Any:
    """Give a column of numbers as a tensor; columns of strings and objects stay what they are."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "biufc":
        # Copied: a batch may be read-only, and the model may write what it is given.
        return torch.tensor(column, device=device)
    return column.to(device) if isinstance(column, torch.Tensor) else column


def _columns(output: Any) -> dict[str, np.ndarray]:
    if isinstance(output, tuple):
        output = {f"output_{index}": part for index, part in enumerate(output)}
    elif not isinstance(output, Mapping):
        output = {"output": output}
    return {name: _column(name, value) for name, value in output.items()}


def _column(name: str, value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype is torch.bfloat16 else value  # numpy has none
    column = np.asarray(value)
    if column.ndim == 0:
        raise TypeError(
            f"{name!r} of the model's output is a {type(value).__name__}, not a column with a row "
            f"for each of the batch's: choose in postprocess what becomes columns"
        )
    return column
