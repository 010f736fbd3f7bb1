"""Ray Serve: replicas that share one block, and replicas that each serve many models.

Serve keeps the bound arguments of a deployment as a plain pickle, and Ray cannot count references
there. So the cluster keeps the model as long as a deployment uses it.
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

    A request posts columns as JSON, such as `{"x": [[1.0, 2.0], [3.0, 4.0]]}` for two rows. The
    reply has the output's columns, with null for NaN and infinities. Input that the model rejects
    gets status 400 and `{"error": ...}`. Through a handle, `handle.predict.remote(batch)` takes and
    returns arrays, and raises `InputError`. Forwards run in a thread, so that a replica stays
    responsive. Running an application of the same name again replaces the weights, replica by
    replica.

    The cluster keeps the model exactly as long as the application is deployed, even if this process
    ends. It copies the object of a reference: drop the reference, so that the store has it once.

    Args:
        model: a reference from `put`, a `ModelWrapper`, the model itself, or a result of `follow`:
            then replicas switch to each published version between two requests, without a
            deployment.
        max_ongoing_forwards: requests that a replica runs at the same time through `preprocess`,
            the model and `postprocess`. Use more than one only if these keep no state: caches in
            buffers and fast tokenizers of transformers mix requests.
        options: options of `Predictor`, such as `postprocess`; all others go to
            `serve.deployment`, such as `num_replicas` and `ray_actor_options`.

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
    `handle.options(multiplexed_model_id=name)`; otherwise it works like `app`. A replica loads a
    model at its first request, in milliseconds and without a copy, and answers others meanwhile.

    Args:
        models: each as for `app`, by name.
        max_num_models_per_replica: models that a replica keeps loaded; default: all.
        max_ongoing_forwards: as for `app`, for all models of a replica together, because they
            share the hooks.
        options: as for `app`; options of `Predictor` apply to all models.

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
    """Make the cluster keep a model exactly as long as a deployment uses it.

    Use it for your own deployments; `app` and `multiplexed` call it themselves. If no deployment
    uses the model, the cluster drops it two minutes after this process drops the wrapper. Published
    models are bound unchanged. Models in task mode, and all models before Ray 2.46, live as long as
    the process that made the wrapper.

    Args:
        model: as for `app`.

    Raises:
        PublishError, StoreFullError, CatalogError: as from `publish`.

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
    """A wrapper that pickles, when Serve binds it, as a wrapper of the version's name."""

    def _bound(self) -> ModelWrapper:
        version: Any = self.ref
        if not deployments.hold(version):  # already dropped: no deployment used it
            version = deployments.keep(version.ref)
            object.__setattr__(self, "ref", version)
        return ModelWrapper(version.handle)

    def serialize(self) -> dict[str, Any]:
        return self._bound().serialize()

    def __reduce__(self) -> Any:
        return self._bound().__reduce__()


async def load(model: Any, **how: Any) -> Any:
    """Load a model in a thread, so that the replica answers requests meanwhile.

    `model`: a reference from `put`, a `ModelWrapper` or a model; `how`: as for `get`.
    """
    return await asyncio.to_thread(lambda: wrap(model).load(**how))


class Loading:
    """The result of a function that runs once, in a thread; `await` it any number of times.

    `serve.multiplexed` loads one model at a time, and a slow load blocks all others. Return this
    from the function that loads, so that it returns at once. After an error, the next `await` tries
    again.

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
        return asyncio.shield(task).__await__()  # a cancelled request does not cancel it for others


class Replica:
    """A replica of an `app`; you may subclass it."""

    def __init__(self, model: Any, *, max_ongoing_forwards: int = 1, **how: Any) -> None:
        self._predictor = Predictor(model, **how)
        self._forwards = _Forwards(max_ongoing_forwards)

    async def __call__(self, request: Request) -> Any:
        """Answer a request over HTTP."""
        return await _answer(request, self.predict)

    async def predict(self, batch: Any) -> Columns:
        """Return the output's columns for a batch; raises as `Predictor.predict` does."""
        return await self._forwards.run(self._predictor.predict, batch)


class _Named:
    """A replica of many models. Its subclass in `multiplexed` applies `serve.multiplexed`.

    Serve looks for multiplexed methods on the class, so `__init__` cannot set the bound.
    """

    predictor: Callable[[str], Any]

    def __init__(
        self, models: dict[str, ModelWrapper], *, max_ongoing_forwards: int, **how: Any
    ) -> None:
        # A replica that is being replaced may still load models that its deployment dropped.
        self._models = {name: borrowed(model) for name, model in models.items()}
        self._how = how
        self._forwards = _Forwards(max_ongoing_forwards)

    def loading(self, name: str) -> Loading:
        return Loading(Predictor, self._models[name], **self._how)

    async def __call__(self, request: Request) -> Any:
        if (unknown := self._unknown()) is not None:
            return JSONResponse({"error": unknown}, status_code=404)
        return await _answer(request, self.predict)

    async def predict(self, batch: Any) -> Columns:
        if (unknown := self._unknown()) is not None:  # Serve would drop a model to load this one
            raise InputError(unknown)
        predictor = await (await self.predictor(serve.get_multiplexed_model_id()))
        return await self._forwards.run(predictor.predict, batch)

    def _unknown(self) -> str | None:
        """Return an error if the request names none of the models."""
        name = serve.get_multiplexed_model_id()
        if name in self._models:
            return None
        return f"no model {name!r}; serve_multiplexed_model_id is one of {list(self._models)}"


def borrowed(wrapper: ModelWrapper) -> ModelWrapper:
    """Return a wrapper with a reference to the model that the cluster keeps."""
    if isinstance(wrapper.ref, Version):
        return ModelWrapper(deployments.borrowed(wrapper.ref))
    return wrapper


class _Forwards:
    """A replica's threads for forwards, apart from those that load, so that waiting blocks no load.

    A request cancelled before its turn does not run; a running one keeps its turn until it ends.
    """

    def __init__(self, at_once: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="ray_zerocopy.forward")

    async def run(self, predict: Callable[[Any], Columns], batch: Any) -> Columns:
        request = contextvars.copy_context()  # for Serve's own functions in hooks
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, request.run, predict, batch)


def _positive(at_once: int) -> int:
    if at_once < 1:
        raise ValueError(f"max_ongoing_forwards must be 1 or more, not {at_once}")
    return at_once


async def _answer(request: Request, predict: Callable[[Any], Any]) -> JSONResponse:
    try:
        columns = await predict(from_json(await _json(request)))
    except InputError as error:
        logger.warning("replied with status 400: %s", error, exc_info=error.__cause__)
        return JSONResponse({"error": str(error)}, status_code=400)
    return JSONResponse(to_json(columns))


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None
