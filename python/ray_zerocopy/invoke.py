"""Call a shared model in Ray tasks: by reference, or through a shim in the model's place.

pipeline ─ rewrite_pipeline ─▶ the same with shims for models
shim(x) ═ call_model.remote(shim.ref, (x,)) ═▶ in a worker: cache ─▶ model(x)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch

from ray_zerocopy.calls.cache import Cache
from ray_zerocopy.calls.replacement import Leaf, replace
from ray_zerocopy.errors import UnknownVersionError
from ray_zerocopy.objects.tensors import nbytes_of
from ray_zerocopy.pickled import named
from ray_zerocopy.registry.follower import Live
from ray_zerocopy.registry.publication import find, load_version
from ray_zerocopy.registry.records import Version
from ray_zerocopy.rewrite import is_extracted, replace_tensors_direct
from ray_zerocopy.store.envelope import Shared
from ray_zerocopy.store.ray_inside import INLINE_NBYTES, free_resources
from ray_zerocopy.store.references import put

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # then a waiting call warns about missing resources


class CallModel(Leaf):
    """A Ray task that calls a model in the store; its worker keeps the model loaded.

    A call costs a task and a forward. A worker loads a model at its first call, keeps it for more
    calls, and drops it five seconds after the last. So the store has the memory back within ten
    seconds after the driver drops its last reference. Do not rely on in-place changes by a forward,
    such as a cache in a buffer: they stay in one worker, only later calls there see them, and they
    end when the worker drops the model.

    The task runs without autograd unless `grad=True`, on as many torch threads as it has CPUs, at
    least one. An exception of the model reaches the caller with its own type and the worker's
    traceback. If a worker dies, Ray repeats the call up to `max_retries` times.
    """

    def __init__(self, *, grad: bool = False, **options: Any) -> None:
        self._grad = grad
        self._options = options

    def __reduce__(self) -> Any:
        return call, (self._grad, self._options)

    def options(self, **options: Any) -> CallModel:
        """Return the same task with other options: `grad=True`, or any of Ray's task options."""
        return CallModel(**{"grad": self._grad, **self._options, **options})

    def remote(
        self,
        model_ref: ray.ObjectRef | Version | Live,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        method_name: str = "__call__",
    ) -> ray.ObjectRef:
        """Call a method of the model and return the reference of its result.

        `model_ref` is a reference from `rzc.put` (the model runs in the mode it was put in), a
        reference to a result of `extract_tensors`, or a result of `publish` or `follow`. As in any
        task, Ray replaces an argument that is a reference by its value. Arguments and results with
        100 KiB of tensors or more travel as blocks: like numpy arrays in Ray, such a result stays
        in the store as long as it lives. With `num_returns=2`, a pair of results has two
        references. The task runs a coroutine to its end.

        Raises `AttributeError` for a private method; for an unknown one the task raises it.
        """
        if isinstance(model_ref, Version | Live):
            model_ref = _handle(model_ref)
        elif not isinstance(model_ref, ray.ObjectRef):
            kind = type(model_ref).__name__
            raise TypeError(f"model_ref must be an ObjectRef, not a {kind}: use ray_zerocopy.put")
        if not isinstance(args, tuple | list):
            raise TypeError(f"args must be a tuple, not a {type(args).__name__}: (x,)")
        if _is_private(method_name):
            raise AttributeError(f"{method_name!r} is private: a task can call only public methods")
        # In a list, so that Ray does not resolve the reference: the worker's cache loads it.
        count = self._options.get("num_returns")
        several = isinstance(count, int) and count > 1
        asked = ([model_ref], method_name, self._grad, several)
        keywords = {name: _light(value) for name, value in (kwargs or {}).items()}
        return self._task.remote(asked, *map(_light, args), **keywords)

    def lacks(self) -> list[tuple[str, float, float]]:
        """Return the resources that a task needs more of than are free: (name, needed, free)."""
        options = {"num_cpus": 1, **self._options}
        needs = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus")}
        needs |= options.get("resources") or {}
        free = free_resources()
        found = [(name, need or 0, free.get(name, 0)) for name, need in needs.items()]
        return [(name, need, has) for name, need, has in found if has < need]

    @functools.cached_property
    def _task(self) -> Any:
        return _remote_call.options(**self._options)


@named
def call(grad: bool, options: dict[str, Any]) -> CallModel:
    """Unpickle a `CallModel`."""
    return CallModel(grad=grad, **options)


call_model = CallModel()


def rewrite_pipeline(
    pipeline: Any,
    method_names: Collection[str] = ("__call__",),
    *,
    attribute_names: Collection[str] = ("config",),
    grad: bool = False,
    **options: Any,
) -> Any:
    """Copy a pipeline so that each call of one of its models runs as a Ray task.

    It finds models in attributes, slots, lists, dicts, tuples and sets, at any depth, but not in
    closures. It stores each model once, in eval mode, and puts a `Shim` in its place. The pipeline
    does not change: objects that lead to a model are copied, the copy shares all others. A model by
    itself becomes a shim.

    A model is an `nn.Module` (including TorchScript modules) with everything it holds: a part that
    two models share is stored with each. Results of `publish` and `follow` count as models; calls
    through `follow` run the current version.

    Args:
        pipeline: any object.
        method_names: methods that the shims offer besides `__call__`, if the model has them.
        attribute_names: attributes that a shim copies from its model, if it has them;
            transformers' pipelines read `config`.
        grad: record autograd's graph in the task; results return without it.
        options: Ray's options for the tasks, such as `num_cpus=2`.

    Example:
        >>> fast = rewrite_pipeline(pipeline, method_names=("generate",), num_cpus=2)
        >>> fast(text)                                              # its models run in tasks
        >>> refs = [fast.model.remote(batch) for batch in batches]  # many tasks at a time

    """
    for names in (method_names, attribute_names):
        if isinstance(names, str):
            raise TypeError(f"names must be a tuple: ({names!r},), not {names!r}")
    if own := {"ref", "remote"}.intersection(method_names):
        raise ValueError(f"a shim has its own {own.pop()!r}: use call_model for the model's")
    task = call_model.options(grad=grad, **options)

    def shim_of(source: Any) -> Shim:
        if isinstance(source, Version | Live):
            ref = source.handle if isinstance(source, Version) else source
            model = load_version(_version(source))
        else:
            ref, model = put(_Evaluated(source)), source
        methods = [name for name in method_names if callable(getattr(model, name, None))]
        carried = {name: getattr(model, name) for name in attribute_names if hasattr(model, name)}
        return Shim(ref, type(model).__name__, methods, carried, task)

    return replace(pipeline, shim_of)


class Method(Leaf):
    """A method of a model in the store: call it and wait, or get the reference of its result."""

    def __init__(self, ref: Any, name: str, task: CallModel) -> None:
        self.ref = ref
        self._name = name
        self._task = task

    def __reduce__(self) -> Any:
        # Ray's pickle of a reference includes its owner; plain pickle keeps only the id.
        return method, (ray.cloudpickle.dumps(self.ref), self._name, self._task)

    def __deepcopy__(self, memo: object) -> Method:
        return self

    def __repr__(self) -> str:
        return f"<{self._name!r} of a model in tasks>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method in a task and wait for its result.

        Logs a warning if the task waits for CPUs or other resources. A call from an actor that
        holds them all never ends, unless the task needs none (`num_cpus=0`).
        """
        result, told = self.remote(*args, **kwargs), False
        while True:
            try:
                return ray.get(result, timeout=None if told else _PATIENCE_S)
            except ray.exceptions.GetTimeoutError as error:
                if isinstance(error, ray.exceptions.RayTaskError):  # the model's own
                    raise
                told = self._tell_what_lacks()

    def _tell_what_lacks(self) -> bool:
        """Warn about resources that the task waits for; returns whether there are any."""
        lacking = [f"{need:g} {name} ({has:g} free)" for name, need, has in self._task.lacks()]
        if lacking:
            logger.warning(
                "%s waits for a task that needs %s. If the caller itself holds these (an actor, "
                "a Tune trial, a pool of Ray Data), it waits for ever: set num_cpus=0 in "
                "rewrite_pipeline or call_model.options",
                *(self, " and ".join(lacking)),
            )
        return bool(lacking)

    def remote(self, *args: Any, **kwargs: Any) -> ray.ObjectRef:
        """Start the call; `ray.get` or `await` the reference for its result."""
        return self._task.remote(self.ref, args, kwargs, self._name)


@named
def method(ref: bytes, name: str, task: CallModel) -> Method:
    """Unpickle a `Method`."""
    return Method(ray.cloudpickle.loads(ref), name, task)


class Shim(Method):
    """Replaces a model; calls of it and of its allowed methods run as Ray tasks.

    `shim(x)` waits for the result. `shim.remote(x)` and `shim.predict.remote(x)` return its
    reference, for parallel calls or `await`. `shim.ref` refers to the model. A shim is small,
    pickles, and works in other tasks and actors.
    """

    def __init__(
        self,
        ref: Any,
        kind: str,
        methods: list[str],
        carried: dict[str, Any],
        task: CallModel,
    ) -> None:
        super().__init__(ref, "__call__", task)
        self._kind = kind
        self._methods = methods
        self._carried = carried
        self.__dict__.update(carried)

    def __reduce__(self) -> Any:
        ref = ray.cloudpickle.dumps(self.ref)
        return shim, (ref, self._kind, self._methods, self._carried, self._task)

    def __getattr__(self, name: str) -> Method:
        if _is_private(name) or name not in self._methods:
            raise AttributeError(f"{self!r} has no {name!r}: add public methods to method_names")
        return Method(self.ref, name, self._task)

    def __repr__(self) -> str:
        methods = {"__call__": None} | dict.fromkeys(self._methods)
        return f"<{self._kind} in tasks, with {', '.join(methods)}>"


@named
def shim(
    ref: bytes, kind: str, methods: list[str], carried: dict[str, Any], task: CallModel
) -> Shim:
    """Unpickle a `Shim`."""
    return Shim(ray.cloudpickle.loads(ref), kind, methods, carried, task)


def _version(source: Version | Live) -> Version:
    return source if isinstance(source, Version) else source.version


def _handle(source: Version | Live) -> Version:
    """Return what a call carries; `current` if it may run a later version, should this retire."""
    version = _version(source)
    return dataclasses.replace(version.handle, current=isinstance(source, Live))


class _Evaluated:
    """A model that pickles as itself in eval mode."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __reduce__(self) -> Any:
        return evaluated, (self.model,)


@named
def evaluated(model: torch.nn.Module) -> torch.nn.Module:
    """Unpickle a model in eval mode."""
    return model.eval()


def _light(value: Any) -> Any:
    """Wrap values whose tensors Ray would put into the store, so that they become a block.

    A task that returns 16 MB: 16 ms, was 58; 120 kB: 9.0 ms, was 11.4. Ray sends 40 kB in the
    message, and its own pickle is faster there by 0.8 ms.
    """
    if isinstance(value, Mapping):
        parts: Any = value.values()
    else:
        parts = value if isinstance(value, tuple | list) else [value]
    tensors = (part for part in parts if isinstance(part, torch.Tensor))
    return Shared(value) if sum(map(nbytes_of, tensors)) > INLINE_NBYTES else value


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "__call__"


# --- in the worker --------------------------------------------------------------------------------


def _load(ref: ray.ObjectRef | Version) -> Any:
    loaded = load_version(ref) if isinstance(ref, Version) else ray.get(ref)
    if not is_extracted(loaded):
        return loaded
    skeleton, tensors = loaded
    replace_tensors_direct(skeleton, tensors)
    return skeleton


_models = Cache(_load)


@contextlib.contextmanager
def _lent(ref: ray.ObjectRef | Version) -> Iterator[Any]:
    """Lend the model of a call."""
    with contextlib.ExitStack() as stack:
        try:
            model = stack.enter_context(_models.use(ref))
        except UnknownVersionError:  # retired meanwhile
            if not (isinstance(ref, Version) and ref.current):
                raise
            model = stack.enter_context(_models.use(find(ref.name).handle))
        yield model


def _call(call: tuple[list[Any], str, bool, bool], /, *args: Any, **kwargs: Any) -> Any:
    [ref], method_name, grad, several = call
    _use_assigned_cpus()
    with _lent(ref) as model, torch.set_grad_enabled(grad):
        result = getattr(model, method_name)(*args, **kwargs)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    if several and isinstance(result, tuple | list):
        return [_light(part) for part in result]
    return result if several else _light(result)  # Ray reports a wrong number of results


# Not a decorator: `_call` keeps its name, so Ray pickles it by name and a worker has one cache.
_remote_call = ray.remote(_call)


def _use_assigned_cpus() -> None:
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    threads = max(1, int(cpus))
    if torch.get_num_threads() != threads:  # setting it clears caches of oneDNN
        torch.set_num_threads(threads)
