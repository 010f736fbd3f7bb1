"""Handles on shared models, to keep and to pass about: they hold a reference, never weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import ray
import torch

from ray_zerocopy.calls.replacement import StandsForModel, leading_to_models
from ray_zerocopy.invoke import rewrite_pipeline
from ray_zerocopy.pickled import named
from ray_zerocopy.registry.follower import Live
from ray_zerocopy.registry.publication import load as load_published
from ray_zerocopy.registry.publication import load_version
from ray_zerocopy.registry.records import Version
from ray_zerocopy.store.references import get, put

Mode = Literal["actor", "task"]


@dataclass(frozen=True)
class ModelWrapper:
    """A model or pipeline in the store, as a handle of a few hundred bytes.

    It goes wherever an argument goes: to tasks, to actors' constructors, into
    `fn_constructor_kwargs` and `Deployment.bind`, and through plain `pickle`. Ray counts the
    references in wrappers that it carries itself. It cannot count those in plain pickles, nor in
    `bind`'s arguments: such a pickle keeps the block until the process that published it ends.
    `rzc.serve.keep` gives one for `bind`.

    Example:
        >>> wrapper = ModelWrapper.from_model(pipeline)
        >>> @ray.remote
        ... class Worker:
        ...     def __init__(self, wrapper):
        ...         self.pipeline = wrapper.load()
        >>> workers = [Worker.remote(wrapper) for _ in range(4)]

    """

    ref: ray.ObjectRef | Version | Live
    """What is stored, `ray.get` of it gives what `load` does; or what is published."""
    mode: Mode = "actor"
    """Whether `load` gives the model itself, or a pipeline whose models run as tasks."""

    @classmethod
    def from_model(
        cls,
        model_or_pipeline: Any,
        mode: Mode = "actor",
        model_attr_names: Sequence[str] | None = None,
        method_names: Sequence[str] | None = None,
    ) -> Self:
        """Store a model, or a pipeline of any class with its models and all else it holds.

        The source is not changed; what is loaded is in eval mode.

        Args:
            model_or_pipeline: a module, or any object that holds modules in attributes, lists,
                dicts or other objects; or what `publish` or `follow` gave, for which the wrapper
                then stands, in the mode it was published in.
            mode: `"actor"`: each process that loads it runs the models itself. `"task"`: calls of
                the models run as Ray tasks, see `rewrite_pipeline`.
            model_attr_names: the attributes of a pipeline that are models to be shared; all by
                default. Others stay as they are: in actor mode neither switched to eval mode nor
                looked at, in task mode run by the caller.
            method_names: the models' methods that run as tasks; `__call__` always does. Of no
                consequence in actor mode, where all methods are there.

        Raises:
            AttributeError: the pipeline has no attribute of a name given.
            TypeError: such an attribute is no module.
            PublishError, StoreFullError, ClientError: as from `put`.

        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode is 'actor' or 'task', not {mode!r}")
        if isinstance(model_or_pipeline, StandsForModel) and mode == "actor":
            published = model_or_pipeline
            return cls(published.handle if isinstance(published, Version) else published)
        models = list(_models(model_or_pipeline, model_attr_names))
        for model in models:
            cls._check(model)
        if mode == "task":
            return cls(put(_rewrite(model_or_pipeline, model_attr_names, method_names)), mode)
        training = [model for model in models if any(part.training for part in model.modules())]
        return cls(put(_InEvalMode(model_or_pipeline, training) if training else model_or_pipeline))

    @classmethod
    def for_tasks(cls, model_or_pipeline: Any, method_names: Sequence[str] | None = None) -> Any:
        """Give the pipeline with its models' calls running as tasks: task mode, loaded."""
        return cls.from_model(model_or_pipeline, mode="task", method_names=method_names).load()

    def load(self, **how: Any) -> Any:
        """Give the model or pipeline over the shared block, each time a new one.

        In task mode it holds shims for its models. `how` is `isolation`, `prefault`, `device` or
        `timeout`, as for `get`.
        """
        if isinstance(self.ref, Live):
            return load_published(self.ref.name, **how)
        if isinstance(self.ref, Version):
            return load_version(self.ref, **how)
        return get(self.ref, **how)

    def serialize(self) -> dict[str, Any]:
        """Take the wrapper apart into a dict for `deserialize`, which travels as wrappers do."""
        return {"handle": _Handle(self.ref), "mode": self.mode}

    @classmethod
    def deserialize(cls, handle: _Handle, mode: Mode) -> Self:
        """Give the wrapper again: `deserialize(**wrapper.serialize())`."""
        return cls(handle.ref, mode)

    def __reduce__(self) -> Any:
        kind = type(self)
        name: Any = kind.__name__ if kind in (ModelWrapper, JITModelWrapper) else kind
        return wrapper, (name, _Handle(self.ref), self.mode)

    @staticmethod
    def _check(model: torch.nn.Module) -> None:
        """Refuse models of another kind than this wrapper's."""


class JITModelWrapper(ModelWrapper):
    """A `ModelWrapper` for models that are TorchScript, traced or scripted, each one of them."""

    @staticmethod
    def _check(model: torch.nn.Module) -> None:
        if not isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"{type(model).__name__} is not TorchScript: share it with ModelWrapper, or give "
                f"torch.jit.script or torch.jit.trace of it"
            )


@named
def wrapper(kind: str | type[ModelWrapper], handle: _Handle, mode: Mode) -> ModelWrapper:
    """Unpickle a wrapper; `kind` is the name of a class here, or a class built on one."""
    made: type[ModelWrapper] = globals()[kind] if isinstance(kind, str) else kind
    return made.deserialize(handle, mode)


def wrap(source: Any) -> ModelWrapper:
    """Give the wrapper of a model by whatever means it is at hand.

    `source` is a wrapper, a reference that `put` gave, what `publish` or `follow` gave, or a model
    or pipeline itself, which is then stored.
    """
    if isinstance(source, ModelWrapper):
        return source
    if isinstance(source, ray.ObjectRef):
        return ModelWrapper(source)
    return ModelWrapper.from_model(source)


def current(source: Any, **how: Any) -> Callable[[], Any]:
    """Give what gives the model at each call: what is followed changes, all else is loaded once."""
    wrapped = wrap(source)
    if isinstance(wrapped.ref, Live):
        live = wrapped.ref.read(**how)
        live()
        return live
    loaded = wrapped.load(**how)
    return lambda: loaded


@dataclass(frozen=True)
class _Handle:
    """A reference that any pickle takes along whole; plain pickle of one keeps only its id.

    Ray's own pickler writes the owner's address as well, and counts the reference where it can.
    """

    ref: Any

    def __reduce__(self) -> Any:
        return handle, (ray.cloudpickle.dumps(self.ref),)


@named
def handle(pickled: bytes) -> _Handle:
    """Unpickle a handle."""
    return _Handle(ray.cloudpickle.loads(pickled))


class _InEvalMode:
    """A pipeline that comes out of the store with its models in eval mode."""

    def __init__(self, pipeline: Any, models: list[torch.nn.Module]) -> None:
        self.pipeline = pipeline
        self.models = models

    def __reduce__(self) -> Any:
        return in_eval_mode, (self.pipeline, self.models)


@named
def in_eval_mode(pipeline: Any, models: list[torch.nn.Module]) -> Any:
    """Unpickle a pipeline with its models in eval mode."""
    for model in models:
        model.eval()
    return pipeline


def _models(pipeline: Any, names: Sequence[str] | None) -> Iterator[torch.nn.Module]:
    """Give the models of a pipeline: those named, or all that hang on it."""
    if names is None:
        hanging = leading_to_models(pipeline).values()
        yield from (part for part in hanging if isinstance(part, torch.nn.Module))
        return
    for name in names:
        model = getattr(pipeline, name, None)
        if isinstance(model, torch.nn.Module):
            yield model
            continue
        kind, held = type(pipeline).__name__, getattr(pipeline, "__dict__", {})
        models = [name for name, value in held.items() if isinstance(value, torch.nn.Module)]
        instead = f"its models are {models}" if models else "it has no models of its own"
        if not hasattr(pipeline, name):
            raise AttributeError(f"{kind} has no attribute {name!r} to share: {instead}")
        raise TypeError(f"{kind}.{name} is a {type(model).__name__}, not a module: {instead}")


def _rewrite(pipeline: Any, names: Sequence[str] | None, methods: Sequence[str] | None) -> Any:
    method_names = methods or ()
    if names is None:
        return rewrite_pipeline(pipeline, method_names)
    if isinstance(pipeline, torch.nn.Module):
        raise ValueError(
            f"{type(pipeline).__name__} is a module, which runs as one: model_attr_names is for "
            f"pipelines of another class"
        )
    shims = rewrite_pipeline({name: getattr(pipeline, name) for name in names}, method_names)
    rewritten = copy.copy(pipeline)
    for name, shim in shims.items():
        setattr(rewritten, name, shim)
    return rewritten
