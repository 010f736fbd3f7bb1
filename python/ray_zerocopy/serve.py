"""Ray Serve: replicas that share one block, and replicas that each serve many models.

Serve keeps what is bound to a deployment as a plain pickle, whose references Ray cannot count: so
the cluster keeps the model, for as long as a deployment has it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from ray_zerocopy import requirements
from ray_zerocopy.batches.columns import Columns, from_json, to_json
from ray_zerocopy.batches.predictor import Predictor, split_options
from ray_zerocopy.calls.replacement import StandsForModel
from ray_zerocopy.errors import InputError, VersionError
from ray_zerocopy.registry import deployments
from ray_zerocopy.registry.records import Version
from ray_zerocopy.wrappers import ModelWrapper, wrap

logger = logging.getLogger(__name__)


def app(model: Any, *, max_ongoing_forwards: int = 1, **options: Any) -> serve.Application:
    """Make an application for `serve.run` whose replicas share one model.

    A request posts its columns as JSON, such as `{"x": [[1.0, 2.0], [3.0, 4.0]]}` for two rows,
    and is answered by the output's columns, with null for NaN and infinities. What the model
    cannot take is answered by status 400 and `{"error": ...}`. Through a handle,
    `handle.predict.remote(batch)` takes and gives arrays, and raises `InputError`. Forwards run in
    a thread, so that a replica stays responsive. Running an application of the same name again
    replaces the weights, replica by replica.

    The cluster keeps the model for as long as the application is deployed, and no longer, whatever
    becomes of this process. What a reference refers to is copied for it: with the reference
    dropped, the store has it once.

    Args:
        model: a reference from `put`, a `ModelWrapper`, or the model itself; or what `follow` gave:
            then each publish reaches the replicas between two requests, without a deployment.
        max_ongoing_forwards: how many requests a replica runs through `preprocess`, the model and
            `postprocess` at a time. More than one is for those that keep nothing between or during
            calls: caches in buffers and fast tokenizers of transformers mix requests.
        options: those of `Predictor`, such as `postprocess`; the others go to `serve.deployment`:
            `num_replicas`, `ray_actor_options` and the rest.

    Example:
        >>> serve.run(rzc.serve.app(model, num_replicas=4))

    """
    how, options = split_options(options)
    how["max_ongoing_forwards"] = _positive(max_ongoing_forwards)
    return serve.deployment(Replica, **options).bind(keep(model), **how)


def multiplexed(
    models: Mapping[str, Any],
    *,
    max_num_models_per_replica: int = -1,
    max_ongoing_forwards: int = 1,
    **options: Any,
) -> serve.Application:
    """Make an application for `serve.run` whose replicas each serve many models.

    A request names its model in the header `serve_multiplexed_model_id`, a handle by
    `handle.options(multiplexed_model_id=name)`; otherwise as `app`. A replica loads a model at its
    first request, in milliseconds and without a copy, and answers others meanwhile.

    Args:
        models: each as for `app`, by name.
        max_num_models_per_replica: how many a replica keeps loaded; by default all.
        max_ongoing_forwards: as for `app`, of all models of a replica together, which share the
            hooks.
        options: as for `app`; those of `Predictor` hold for all models.

    """

    class Multiplexed(_Named):
        @serve.multiplexed(max_num_models_per_replica=max_num_models_per_replica)  # type: ignore[untyped-decorator]
        async def predictor(self, name: str) -> Loading:
            return self.loading(name)

    how, options = split_options(options)
    how["max_ongoing_forwards"] = _positive(max_ongoing_forwards)
    kept = {name: keep(model) for name, model in models.items()}
    return serve.deployment(Multiplexed, **options).bind(kept, **how)


def keep(model: Any) -> ModelWrapper:
    """Have the cluster keep a model for as long as a deployment has it, and no longer.

    For deployments of one's own; `app` and `multiplexed` do it by themselves. Bound to none, the
    model goes two minutes after this process drops the wrapper. What is published already is bound
    as it is. Wrappers in task mode, and all before Ray 2.46, live as long as the process that made
    them.

    Args:
        model: as for `app`.

    Raises as `publish` does.

    Example:
        >>> @serve.deployment
        ... class Classify:
        ...     def __init__(self, wrapper):
        ...         self.model = wrapper.load()
        >>> serve.run(Classify.bind(rzc.serve.keep(model)))

    """
    wrapped = wrap(model)
    if isinstance(wrapped.ref, StandsForModel) or wrapped.mode == "task":
        return wrapped
    try:
        requirements.check(requirements.PUBLISHING, requirements.VERSIONS)
    except VersionError:
        return wrapped
    return _Kept(deployments.keep(wrapped.ref))


@dataclass(frozen=True)
class _Kept(ModelWrapper):
    """A wrapper that pickles, where Serve binds it, as one of the same version by name."""

    def _bound(self) -> ModelWrapper:
        version: Any = self.ref
        if not deployments.hold(version):  # no deployment had it
            version = deployments.keep(version.ref)
            object.__setattr__(self, "ref", version)
        return ModelWrapper(version.handle)

    def serialize(self) -> dict[str, Any]:
        return self._bound().serialize()

    def __reduce__(self) -> Any:
        return self._bound().__reduce__()


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

    def __init__(self, model: Any, *, max_ongoing_forwards: int = 1, **how: Any) -> None:
        self._predictor = Predictor(model, **how)
        self._forwards = _Forwards(max_ongoing_forwards)

    async def __call__(self, request: Request) -> Any:
        """Answer a request over HTTP."""
        return await _answer(request, self.predict)

    async def predict(self, batch: Any) -> Columns:
        """Give the output's columns for a batch of columns; raises as `Predictor.predict` does."""
        return await self._forwards.run(self._predictor.predict, batch)


class _Named:
    """What a replica of many models does; `serve.multiplexed` is put on where its bound is known.

    Serve looks for multiplexed methods on the class, so it cannot be done in `__init__`.
    """

    predictor: Callable[[str], Any]

    def __init__(
        self, models: dict[str, ModelWrapper], *, max_ongoing_forwards: int, **how: Any
    ) -> None:
        # A replica that is being replaced still loads what its deployment no longer has.
        self._models = {name: borrowed(model) for name, model in models.items()}
        self._how = how
        self._forwards = _Forwards(max_ongoing_forwards)

    def loading(self, name: str) -> Loading:
        return Loading(Predictor, self._models[name], **self._how)

    async def __call__(self, request: Request) -> Any:
        name = serve.get_multiplexed_model_id()
        if name not in self._models:
            told = f"no model {name!r}; serve_multiplexed_model_id is one of {list(self._models)}"
            return JSONResponse({"error": told}, status_code=404)
        return await _answer(request, self.predict)

    async def predict(self, batch: Any) -> Columns:
        predictor = await (await self.predictor(serve.get_multiplexed_model_id()))
        return await self._forwards.run(predictor.predict, batch)


def borrowed(wrapper: ModelWrapper) -> ModelWrapper:
    """Give a wrapper that holds a reference to what the cluster keeps."""
    if isinstance(wrapper.ref, Version):
        return ModelWrapper(deployments.borrowed(wrapper.ref))
    return wrapper


class _Forwards:
    """Threads of a replica for its forwards: those that wait leave the threads that load alone.

    A request that goes away before its turn is not run; one that runs keeps its turn to its end.
    """

    def __init__(self, at_once: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="ray_zerocopy.forward")

    async def run(self, predict: Callable[[Any], Columns], batch: Any) -> Columns:
        request = contextvars.copy_context()  # which Serve's own functions ask in hooks
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, request.run, predict, batch)


def _positive(at_once: int) -> int:
    if at_once < 1:
        raise ValueError(f"max_ongoing_forwards is 1 or more, not {at_once}")
    return at_once


async def _answer(request: Request, predict: Callable[[Any], Any]) -> JSONResponse:
    try:
        columns = await predict(from_json(await _json(request)))
    except InputError as error:
        logger.warning("answered by 400: %s", error, exc_info=error.__cause__)
        return JSONResponse({"error": str(error)}, status_code=400)
    return JSONResponse(to_json(columns))


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None
