"""Picklable handles of shared models: they hold a reference, never weights."""

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
    """Handle of a stored model or pipeline: a few hundred bytes.

    Pass it as an argument to tasks, actors, `fn_constructor_kwargs` or `Deployment.bind`, or pickle
    it. Ray counts the references in wrappers that it sends itself. Ray cannot count references in
    plain pickles and in `bind` arguments: such a pickle keeps the block until the process that
    published it ends. `rzc.serve.keep` returns a handle for `bind`.

    Example:
        >>> wrapper = ModelWrapper.from_model(pipeline)
        >>> @ray.remote
        ... class Worker:
        ...     def __init__(self, wrapper):
        ...         self.pipeline = wrapper.load()
        >>> workers = [Worker.remote(wrapper) for _ in range(4)]

    """

    ref: ray.ObjectRef | Version | Live
    """The stored object (`ray.get` of it returns the same as `load`), or the published version."""
    mode: Mode = "actor"
    """`"actor"`: `load` returns the model. `"task"`: it returns a pipeline with models as tasks."""

    @classmethod
    def from_model(
        cls,
        model_or_pipeline: Any,
        mode: Mode = "actor",
        model_attr_names: Sequence[str] | None = None,
        method_names: Sequence[str] | None = None,
    ) -> Self:
        """Store a model or a whole pipeline of any class.

        The source does not change; loaded models are in eval mode.

        Args:
            model_or_pipeline: a module, or any object that holds modules in attributes, lists,
                dicts or other objects. A result of `publish` or `follow` also works: the wrapper
                then refers to it, in the mode it was published in.
            mode: `"actor"`: each process that loads it runs the models itself. `"task"`: calls of
                the models run as Ray tasks, see `rewrite_pipeline`.
            model_attr_names: the attributes of a pipeline that are models to share; default all.
                Other models stay as they are: actor mode does not switch them to eval mode, and in
                task mode the caller runs them.
            method_names: the models' methods that run as tasks, besides `__call__`. Actor mode
                ignores it: all methods work there.

        Raises:
            AttributeError: the pipeline has no attribute with a given name.
            TypeError: such an attribute is not a module.
            PublishError, StoreFullError, ClientError: as from `put`.

        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be 'actor' or 'task', not {mode!r}")
        if isinstance(model_or_pipeline, StandsForModel) and mode == "actor":
            published = model_or_pipeline
            return cls(published.handle if isinstance(published, Version) else published)
        models = list(_models(model_or_pipeline, model_attr_names))
        for model in models:
            cls._check(model)
        if mode == "task":
            return cls(put(_rewrite(model_or_pipeline, model_attr_names, method_names)), mode)
        training = [model for model in models if any(map(_trains, model.modules()))]
        return cls(put(_InEvalMode(model_or_pipeline, training) if training else model_or_pipeline))

    @classmethod
    def for_tasks(cls, model_or_pipeline: Any, method_names: Sequence[str] | None = None) -> Any:
        """Return the pipeline with its models' calls as tasks: task mode, loaded."""
        return cls.from_model(model_or_pipeline, mode="task", method_names=method_names).load()

    def load(self, **how: Any) -> Any:
        """Load a new model or pipeline over the shared block.

        In task mode it has shims in place of its models. `how`: `isolation`, `prefault`, `device`,
        `timeout`, as for `get`.
        """
        if isinstance(self.ref, Live):
            return load_published(self.ref.name, **how)
        if isinstance(self.ref, Version):
            return load_version(self.ref, **how)
        return get(self.ref, **how)

    def serialize(self) -> dict[str, Any]:
        """Return a dict for `deserialize`; it pickles like the wrapper."""
        return {"handle": _Handle(self.ref), "mode": self.mode}

    @classmethod
    def deserialize(cls, handle: _Handle, mode: Mode) -> Self:
        """Return the wrapper: `deserialize(**wrapper.serialize())`."""
        return cls(handle.ref, mode)

    def __reduce__(self) -> Any:
        kind = type(self)
        name: Any = kind.__name__ if kind in (ModelWrapper, JITModelWrapper) else kind
        return wrapper, (name, _Handle(self.ref), self.mode)

    @staticmethod
    def _check(model: torch.nn.Module) -> None:
        """Raise `TypeError` for a model that this wrapper does not accept."""


class JITModelWrapper(ModelWrapper):
    """A `ModelWrapper` that accepts only TorchScript models, traced or scripted."""

    @staticmethod
    def _check(model: torch.nn.Module) -> None:
        if not isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"{type(model).__name__} is not TorchScript: use ModelWrapper, or convert it "
                f"with torch.jit.script or torch.jit.trace"
            )


@named
def wrapper(kind: str | type[ModelWrapper], handle: _Handle, mode: Mode) -> ModelWrapper:
    """Unpickle a wrapper; `kind` is the name of a class here, or a subclass of one."""
    made: type[ModelWrapper] = globals()[kind] if isinstance(kind, str) else kind
    return made.deserialize(handle, mode)


def wrap(source: Any) -> ModelWrapper:
    """Return the wrapper of a model.

    `source` is a wrapper, a reference from `put`, a result of `publish` or `follow`, or a model or
    pipeline, which this call stores.
    """
    if isinstance(source, ModelWrapper):
        return source
    if isinstance(source, ray.ObjectRef):
        return ModelWrapper(source)
    return ModelWrapper.from_model(source)


def current(source: Any, **how: Any) -> Callable[[], Any]:
    """Return a function that returns the model: a `Live`'s current one, else one loaded here."""
    wrapped = wrap(source)
    if isinstance(wrapped.ref, Live):
        live = wrapped.ref.read(**how)
        live()
        return live
    loaded = wrapped.load(**how)
    return lambda: loaded


@dataclass(frozen=True)
class _Handle:
    """A reference that survives any pickle; plain pickle of an ObjectRef keeps only its id.

    Ray's pickler also writes the owner's address, and counts the reference if it can.
    """

    ref: Any

    def __reduce__(self) -> Any:
        return handle, (ray.cloudpickle.dumps(self.ref),)


@named
def handle(pickled: bytes) -> _Handle:
    """Unpickle a handle."""
    return _Handle(ray.cloudpickle.loads(pickled))


def _trains(part: torch.nn.Module) -> bool:
    return getattr(part, "training", False)  # a frozen TorchScript module has no mode


class _InEvalMode:
    """A pipeline whose models load in eval mode."""

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
    """Yield the named models of a pipeline, or all that its attributes lead to."""
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
            f"{type(pipeline).__name__} is a module and runs as a whole: use model_attr_names "
            f"only for pipelines that are not modules"
        )
    shims = rewrite_pipeline({name: getattr(pipeline, name) for name in names}, method_names)
    rewritten = copy.copy(pipeline)
    for name, shim in shims.items():
        setattr(rewritten, name, shim)
    return rewritten
