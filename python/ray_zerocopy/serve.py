"""Ray Serve: replicas that share one block, and replicas that each serve many models.

Serve keeps what is bound to a deployment as a plain pickle, whose references Ray cannot count: a
block stays in the store, for the replicas to come, as long as the process that published it lives,
and no longer. Publish from a process that outlives the deployment.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from ray_zerocopy.data import Batch, Predictor, split_options
from ray_zerocopy.wrappers import ModelWrapper, wrap


def app(model: Any, **options: Any) -> serve.Application:
    """Make an application for `serve.run` whose replicas share one model.

    A request posts its columns as JSON, such as `{"x": [[1.0, 2.0], [3.0, 4.0]]}` for two rows,
    and is answered by the output's columns; through a handle, `handle.predict.remote(batch)` takes
    and gives arrays. Forwards run in threads, so that a replica stays responsive. Running an
    application of the same name again replaces the weights, replica by replica.

    Args:
        model: a reference from `put`, a `ModelWrapper`, or the model itself; or what `follow` gave:
            then each publish reaches the replicas between two requests, without a deployment.
        options: those of `Predictor`, such as `postprocess`; the others go to `serve.deployment`:
            `num_replicas`, `ray_actor_options` and the rest.

    Example:
        >>> serve.run(rzc.serve.app(model, num_replicas=4))

    """
    how, options = split_options(options)
    return serve.deployment(Replica, **options).bind(wrap(model), **how)


def multiplexed(
    models: Mapping[str, Any], *, max_num_models_per_replica: int = -1, **options: Any
) -> serve.Application:
    """Make an application for `serve.run` whose replicas each serve many models.

    A request names its model in the header `serve_multiplexed_model_id`, a handle by
    `handle.options(multiplexed_model_id=name)`; otherwise as `app`. A replica loads a model at its
    first request, in milliseconds and without a copy, and answers others meanwhile.

    Args:
        models: each as for `app`, by name.
        max_num_models_per_replica: how many a replica keeps loaded; by default all.
        options: as for `app`; those of `Predictor` hold for all models.

    """

    class Multiplexed(_Named):
        @serve.multiplexed(max_num_models_per_replica=max_num_models_per_replica)  # type: ignore[untyped-decorator]
        async def predictor(self, name: str) -> Loading:
            return self.loading(name)

    how, options = split_options(options)
    wrapped = {name: wrap(model) for name, model in models.items()}
    return serve.deployment(Multiplexed, **options).bind(wrapped, **how)


async def load(model: Any, **how: Any) -> Any:
    """Load a model in a thread, so that the replica answers requests meanwhile.

    `model` is a reference from `put`, a `ModelWrapper` or a model; `how` is as for `get`.
    """
    return await asyncio.to_thread(lambda: wrap(model).load(**how))


class Loading:
    """What a function makes in a thread, to `await` as often as one likes; it is made once.

    `serve.multiplexed` loads one model at a time: a slow one keeps all others waiting, unless the
    function that loads returns at once, with this. What failed is tried again at the next `await`.

    Example:
        >>> @serve.multiplexed(max_num_models_per_replica=20)
        ... async def model(self, name):
        ...     return rzc.serve.Loading(rzc.get, self.refs[name])
        >>> async def __call__(self, request):
        ...     model = await (await self.model(serve.get_multiplexed_model_id()))

    """

    def __init__(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._make = functools.partial(make, *args, **kwargs)
        self._task: asyncio.Task[Any] | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        task = self._task
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._task = asyncio.create_task(asyncio.to_thread(self._make))
        return asyncio.shield(task).__await__()  # a request that goes away leaves it to the others


class Replica:
    """One of the replicas of an `app`; a class of one's own may build on it."""

    def __init__(self, model: Any, **how: Any) -> None:
        self._predictor = Predictor(model, **how)

    async def __call__(self, request: Request) -> Any:
        """Answer a request over HTTP."""
        return await _answer(request, self.predict)

    async def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Give the output's columns for a batch of columns."""
        return await asyncio.to_thread(self._predictor.predict, batch)


class _Named:
    """What a replica of many models does; `serve.multiplexed` is put on where its bound is known.

    Serve looks for multiplexed methods on the class, so it cannot be done in `__init__`.
    """

    predictor: Callable[[str], Any]

    def __init__(self, models: dict[str, ModelWrapper], **how: Any) -> None:
        self._models = models
        self._how = how

    def loading(self, name: str) -> Loading:
        return Loading(Predictor, self._models[name], **self._how)

    async def __call__(self, request: Request) -> Any:
        name = serve.get_multiplexed_model_id()
        if name not in self._models:
            told = f"no model {name!r}; serve_multiplexed_model_id is one of {list(self._models)}"
            return JSONResponse({"error": told}, status_code=404)
        return await _answer(request, self.predict)

    async def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        predictor = await (await self.predictor(serve.get_multiplexed_model_id()))
        return await asyncio.to_thread(predictor.predict, batch)


async def _answer(request: Request, predict: Callable[[Batch], Any]) -> Any:
    try:
        batch = {name: _column(values) for name, values in (await request.json()).items()}
    except (ValueError, AttributeError) as error:
        told = f"the body is a JSON object of columns, each a list with an item a row: {error}"
        return JSONResponse({"error": told}, status_code=400)
    return {name: column.tolist() for name, column in (await predict(batch)).items()}


def _column(values: Any) -> np.ndarray:
    """Give a column of numbers in the widths that torch gives them."""
    column = np.array(values)
    return column.astype(np.float32) if column.dtype == np.float64 else column
