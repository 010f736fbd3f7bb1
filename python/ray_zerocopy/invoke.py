"""Calls of a shared model as Ray tasks: by reference, or through what stands where it stood.

pipeline ─ rewrite_pipeline ─▶ the same with shims for models
shim(x) ═ call_model.remote(shim.ref, (x,)) ═▶ in a worker: cache ─▶ model(x)
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
import torch

from ray_zerocopy.calls.cache import Cache
from ray_zerocopy.calls.replacement import Leaf, replace
from ray_zerocopy.objects.tensors import nbytes_of
from ray_zerocopy.pickled import named
from ray_zerocopy.registry.follower import Live
from ray_zerocopy.registry.publication import load_version
from ray_zerocopy.registry.records import Version
from ray_zerocopy.rewrite import is_extracted, replace_tensors_direct
from ray_zerocopy.store.envelope import Shared
from ray_zerocopy.store.ray_inside import INLINE_NBYTES, free_resources
from ray_zerocopy.store.references import put

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # of a call, after which it says what it may wait for


class CallModel(Leaf):
    """A Ray task that calls a model in the store; the worker that runs it keeps the model loaded.

    A call costs a task and a forward: a worker loads a model at its first call, keeps it for the
    next, and drops it five seconds after the last, so that the store has its memory back within ten
    seconds of the driver dropping its last reference. What a forward changes in place, such as a
    cache in a buffer, stays in the worker that ran it, is seen by what that worker runs next and by
    nobody else, and goes with the model: never build on it.

    It runs without autograd unless `grad` says so, on as many torch threads as Ray gave it CPUs, at
    least one. An exception of the model reaches the caller as itself, with the worker's traceback;
    the call of a worker that died is made again by Ray, as often as `max_retries` says.
    """

    def __init__(self, *, grad: bool = False, **options: Any) -> None:
        self._grad = grad
        self._options = options

    def __reduce__(self) -> Any:
        return call, (self._grad, self._options)

    def options(self, **options: Any) -> CallModel:
        """Give the same task with other options: `grad=True`, or any of Ray's for a task."""
        return CallModel(**{"grad": self._grad, **self._options, **options})

    def remote(
        self,
        model_ref: ray.ObjectRef | Version | Live,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        method_name: str = "__call__",
    ) -> ray.ObjectRef:
        """Call a method of the model and give the reference of its result.

        `model_ref` refers to what `rzc.put` stored, which is called in the mode it was put in, or
        to what `extract_tensors` returned; or it is what `publish` or `follow` gave. As in any
        task, an argument that is itself a reference is replaced by its value. Tensors of 100 kB
        and more come and go as blocks: like numpy arrays with Ray, a result then lies in the store
        for as long as it lives. With the option `num_returns=2` a pair of results comes by two
        references. A coroutine is run to its end in the task.

        Raises `AttributeError` for a private method; for an unknown one the task does.
        """
        if isinstance(model_ref, Version | Live):
            model_ref = _version(model_ref).handle
        elif not isinstance(model_ref, ray.ObjectRef):
            kind = type(model_ref).__name__
            raise TypeError(f"model_ref is an ObjectRef, not a {kind}: ray_zerocopy.put gives one")
        if not isinstance(args, tuple | list):
            raise TypeError(f"args is a tuple of arguments, not a {type(args).__name__}: (x,)")
        if _is_private(method_name):
            raise AttributeError(f"{method_name!r} is private, so no task can call it")
        # In a list, Ray leaves the reference alone: loading is up to the worker's cache.
        count = self._options.get("num_returns")
        several = isinstance(count, int) and count > 1
        asked = ([model_ref], method_name, self._grad, several)
        keywords = {name: _light(value) for name, value in (kwargs or {}).items()}
        return self._task.remote(asked, *map(_light, args), **keywords)

    def lacks(self) -> list[tuple[str, float, float]]:
        """Tell what a task needs more of than is free here: (resource, needed, free)."""
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

    Models are found in attributes, slots, lists, dicts, tuples and sets, however deep, and each is
    stored once, in eval mode; where it stood now stands its `Shim`. The pipeline itself is not
    changed: what leads to a model is copied, all else is shared with the copy. A model by itself
    becomes a shim. Only an `nn.Module` (a TorchScript module is one) is a model, and what it holds
    goes with it: a part that two models share is stored with each. What closures hold is not found.
    What `publish` or `follow` gave counts as a model; of the latter, the current one runs.

    Args:
        pipeline: any object.
        method_names: the methods that can be called, where a model has them, besides `__call__`.
        attribute_names: attributes that a shim has from its model, if that has them; `config` is
            what transformers' pipelines ask of their models.
        grad: record autograd's graph in the task; the results carry none home.
        options: Ray's options for the tasks, such as `num_cpus=2`.

    Example:
        >>> fast = rewrite_pipeline(pipeline, method_names=("generate",), num_cpus=2)
        >>> fast(text)                                              # its models run in tasks
        >>> refs = [fast.model.remote(batch) for batch in batches]  # in many at a time

    """
    for names in (method_names, attribute_names):
        if isinstance(names, str):
            raise TypeError(f"names come in a tuple: ({names!r},) rather than {names!r}")
    if own := {"ref", "remote"}.intersection(method_names):
        raise ValueError(f"a shim has a {own.pop()!r} of its own: call_model reaches the model's")
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
    """A method of a model in the store: call it and wait, or take the reference of its result."""

    def __init__(self, ref: Any, name: str, task: CallModel) -> None:
        self.ref = ref
        self._name = name
        self._task = task

    def __reduce__(self) -> Any:
        # Ray's pickle of a reference names its owner as well; plain pickle would keep only the id.
        return method, (ray.cloudpickle.dumps(self.ref), self._name, self._task)

    def __deepcopy__(self, memo: object) -> Method:
        return self

    def __repr__(self) -> str:
        return f"<{self._name!r} of a model in tasks>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method in a task and wait for its result.

        A warning tells when the task waits for CPUs or other resources. An actor that holds them
        all waits for ever, unless the task needs none: `num_cpus=0`.
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
        """Warn of what a task waits for, if it does; whether it did."""
        lacking = [f"{need:g} {name} ({has:g} free)" for name, need, has in self._task.lacks()]
        if lacking:
            logger.warning(
                "%s waits for a task that needs %s. If the caller holds these itself, as actors, "
                "Tune trials and pools of Ray Data do, it waits for ever: with num_cpus=0 in "
                "rewrite_pipeline or call_model.options the task runs beside it",
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
    """Stands where a model stood; a call of it, or of a method it allows, runs as a Ray task.

    `shim(x)` waits for the result, `shim.remote(x)` and `shim.predict.remote(x)` give its
    reference, for many at a time or to `await`. `shim.ref` refers to the model. A shim is small,
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
            raise AttributeError(f"{self!r} has no {name!r}: public methods are in method_names")
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
    """Let tensors that Ray would put into the store lie there as a block, beside its own pickle.

    Measured, a task that returns 16 MB: 16 ms rather than 58; 120 kB: 9.0 rather than 11.4. At
    40 kB, which travel in the message, Ray's own way is the shorter by 0.8 ms.
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


def _call(call: tuple[list[Any], str, bool, bool], /, *args: Any, **kwargs: Any) -> Any:
    [ref], method_name, grad, several = call
    _use_assigned_cpus()
    with _models.use(ref) as model, torch.set_grad_enabled(grad):
        result = getattr(model, method_name)(*args, **kwargs)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    if several and isinstance(result, tuple | list):
        return [_light(part) for part in result]
    return result if several else _light(result)  # of another number, Ray tells


# Not as a decorator: a function that its name leads to is sent by name, and the cache is one.
_remote_call = ray.remote(_call)


def _use_assigned_cpus() -> None:
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    threads = max(1, int(cpus))
    if torch.get_num_threads() != threads:  # setting it clears caches of oneDNN
        torch.set_num_threads(threads)
