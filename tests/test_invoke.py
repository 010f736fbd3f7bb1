"""A call in a task returns what a local call returns, and does not change the pipeline.

Also: which calls are allowed, how a call runs in its worker, how it fails, and what it leaves.
"""

import asyncio
import collections
import functools
import logging
import os
import pickle
import re
import threading
import time
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact, assert_same_description, describe
from models import ARCHITECTURES, DIFFICULT, large, simple, transformer
from ray._private.internal_api import memory_summary
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray_zerocopy import invoke
from ray_zerocopy.invoke import Shim, call_model, rewrite_pipeline
from ray_zerocopy.rewrite import extract_tensors
from torch import nn

CASES = {
    "simple": simple,
    **{name: DIFFICULT[name] for name in ("tied_weights", "lstm", "bfloat16", "weight_norm")},
    **{f"hf-{name}": ARCHITECTURES[name] for name in ("bert", "gpt2", "t5", "resnet")},
}
STORES = {"put": rzc.put, "extract_tensors": lambda model: ray.put(extract_tensors(model))}


class Scaler(nn.Module):
    """Two layers and methods of every kind."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.config = SimpleNamespace(labels=["no", "yes"])
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=1.0):
        return self.norm(self.linear(x)) * scale

    def predict(self, x, *, top=1, **others):
        values, indices = self(x).topk(top)
        return {"best": [(values, indices)], "others": others, "top": top}

    def count(self):
        """(process, number of calls in it so far)."""
        self.calls += 1
        return os.getpid(), int(self.calls)

    def surroundings(self):
        return torch.is_grad_enabled(), torch.get_num_threads(), self.training

    def differentiate(self, x):
        x = x.clone().requires_grad_()
        self(x).sum().backward()
        return x.grad

    def output_with_graph(self, x):
        return self.linear(x)

    def fail(self, key):
        raise KeyError(key)

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def time_out(self, why):
        raise ray.exceptions.GetTimeoutError(why)

    def die_once(self, marker):
        if not os.path.exists(marker):
            open(marker, "x").close()
            os._exit(1)
        return "alive"

    def repeat(self, x, times):
        return x.expand(times, *x.shape).contiguous()

    def sparsify(self, x):
        return x.to_sparse()

    def _secret(self):
        return "secret"


METHODS = (
    *("predict", "count", "surroundings", "differentiate", "output_with_graph"),
    *("fail", "time_out", "die_once", "repeat", "sparsify"),
)


@pytest.fixture(scope="module")
def scaler(cluster):
    torch.manual_seed(0)
    model = Scaler()
    model(torch.randn(4, 8))  # in train mode, so that the running statistics are no round numbers
    return model.eval()


@pytest.fixture(scope="module")
def shim(scaler):
    return rewrite_pipeline(scaler, METHODS)


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 8)


def home(model, *args, method="__call__", **kwargs):
    with torch.no_grad():
        return getattr(model, method)(*args, **kwargs)


# --- a call returns what it returns locally -------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", CASES)
def test_call_model_gives_what_the_model_gives(name, store, cluster):
    case = CASES[name]()
    case.model.eval()
    ref = STORES[store](case.model)
    for _ in range(2):  # the second call finds the model in the cache
        called = ray.get(call_model.remote(ref, case.args, case.kwargs))
        assert_same_description(describe(case.run()), describe(called))


def test_methods_take_and_return_what_they_take_and_return_at_home(scaler, shim, x):
    expected = home(scaler, x, method="predict", top=2, method_name="a", call=1, self_="b")
    arguments = {"top": 2, "method_name": "a", "call": 1, "self_": "b"}
    assert_exact(expected, shim.predict(x, **arguments))
    assert_exact(expected, ray.get(shim.predict.remote(x, **arguments)))
    assert_exact(expected, ray.get(call_model.remote(shim.ref, (x,), arguments, "predict")))
    assert_exact(home(scaler, x, scale=2.0), shim(x, scale=2.0))
    assert_exact(home(scaler, x, 2.0), ray.get(call_model.remote(shim.ref, [x, 2.0])))


def test_a_pipeline_can_be_called_as_well(cluster, scaler, x):
    ref = rzc.put(Pipeline(scaler))
    assert_exact(home(Pipeline(scaler), x), ray.get(call_model.remote(ref, (x,))))


class Scored(NamedTuple):
    """A pipeline that is a tuple of two."""

    model: nn.Module
    labels: list

    def __call__(self, x):
        return [self.labels[best] for best in self.model(x).argmax(1).tolist()]


def test_a_pipeline_that_is_a_tuple_is_called_as_itself(cluster, scaler, x):
    scored = Scored(scaler, list("abcdefgh"))
    assert ray.get(call_model.remote(rzc.put(scored), (x,))) == home(scored, x)


def test_what_extract_tensors_gave_may_be_taken_apart_and_put_together(cluster, scaler, x):
    skeleton, tensors = extract_tensors(scaler)
    ref = ray.put((skeleton, tensors))
    assert_exact(home(scaler, x), ray.get(call_model.remote(ref, (x,))))


def test_plain_arrays_serve_as_the_tensors_of_a_pair(cluster, scaler, x):
    skeleton, tensors = extract_tensors(scaler)
    ref = ray.put((skeleton, tensors[:]))
    assert_exact(home(scaler, x), ray.get(call_model.remote(ref, (x,))))


@pytest.mark.parametrize("times", [1, 100, 10_000])
def test_what_is_large_travels_exactly(shim, x, times):
    """10 kB and 1 MB: within the message, and through the store."""
    large = x.repeat(times, 40).t()
    assert_exact(large[None].contiguous(), shim.repeat(large, 1))
    assert_exact(torch.ones(times, 8), shim.repeat(torch.ones(8), times))


def test_sparse_tensors_travel_exactly(shim):
    for size in (3, 300):
        dense = torch.eye(size)
        assert_exact(dense.to_sparse(), shim.sparsify(dense))


def test_references_among_the_arguments_are_replaced(scaler, shim, x):
    first = shim.remote(ray.put(x), scale=ray.put(2.0))
    assert_exact(home(scaler, home(scaler, x, 2.0)), shim(first))


def test_calls_fan_out(scaler, shim, x):
    refs = [shim.remote(x, scale=float(scale)) for scale in range(8)]
    assert_exact([home(scaler, x, float(scale)) for scale in range(8)], ray.get(refs))


# --- how it runs in the worker --------------------------------------------------------------------


def test_a_worker_keeps_the_model_and_what_a_call_changes_in_it(scaler, shim):
    counts = collections.defaultdict(list)
    for process, calls in ray.get([shim.count.remote() for _ in range(20)]):
        counts[process].append(calls)
    for calls in counts.values():
        assert sorted(calls) == list(range(1, len(calls) + 1))
    assert scaler.calls == ray.get(shim.ref).calls == 0


def test_it_runs_without_autograd_unless_asked(scaler, shim, x):
    assert shim.surroundings()[0] is False
    with pytest.raises(RuntimeError, match="does not require grad"):
        shim.differentiate(x)

    asked = rewrite_pipeline(scaler, METHODS, grad=True)
    assert_exact(scaler.differentiate(x), asked.differentiate(x))
    asked = call_model.options(grad=True)
    assert_exact(
        scaler.differentiate(x),
        ray.get(asked.remote(shim.ref, (x,), method_name="differentiate")),
    )


@pytest.mark.parametrize("rows", [1, 10_000])
def test_results_leave_their_graph_behind(scaler, rows):
    x = torch.randn(rows, 8)
    result = rewrite_pipeline(scaler, METHODS, grad=True).output_with_graph(x)
    assert_exact(scaler.linear(x).detach(), result.detach())
    assert result.is_leaf


@pytest.mark.parametrize(("num_cpus", "threads"), [(0, 1), (0.5, 1), (1, 1), (2, 2), (3, 3)])
def test_threads_follow_cpus(scaler, shim, num_cpus, threads):
    asked = call_model.options(num_cpus=num_cpus)
    calls = [asked.remote(shim.ref, method_name="surroundings") for _ in range(3)]
    assert {found for _, found, _ in ray.get(calls)} == {threads}
    fast = rewrite_pipeline(scaler, METHODS, num_cpus=num_cpus)
    assert fast.surroundings()[1] == threads


def test_a_rewritten_model_is_in_eval_mode_and_its_source_stays_in_its_own(cluster, x):
    model = Scaler().train()
    fast = rewrite_pipeline(model, ("surroundings",))
    assert fast.surroundings()[2] is False
    assert all(part.training for part in model.modules())
    assert not any(part.training for part in ray.get(fast.ref).modules())
    assert_exact(home(model.eval(), x), fast(x))


# --- allowed calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward", "state_dict", "linear", "nothing", "_secret", "eval"])
def test_a_shim_has_no_other_names(scaler, name):
    allowed = (*METHODS, "_secret", "nothing")  # a private name, an unknown one
    with pytest.raises(AttributeError, match=name):
        getattr(rewrite_pipeline(scaler, allowed), name)


def test_call_works_without_being_named(scaler, shim, x):
    only_call = rewrite_pipeline(scaler)
    assert_exact(home(scaler, x), only_call(x))
    assert_exact(home(scaler, x), shim(x))
    with pytest.raises(AttributeError, match="predict"):
        only_call.predict  # noqa: B018


@pytest.mark.parametrize("name", ["_secret", "__reduce__", "nothing"])
def test_call_model_refuses_private_and_unknown_names(shim, name):
    with pytest.raises(AttributeError, match=name):
        ray.get(call_model.remote(shim.ref, method_name=name))


def test_a_shim_carries_the_config_and_other_attributes_that_are_asked_for(scaler):
    shim = rewrite_pipeline(scaler, attribute_names=("config", "training", "absent"))
    assert shim.config is scaler.config
    assert shim.training is False
    with pytest.raises(AttributeError, match="absent"):
        shim.absent  # noqa: B018


def test_misuse_is_told_apart(shim, scaler, x):
    with pytest.raises(TypeError, match=r"not a Scaler: use ray_zerocopy\.put"):
        call_model.remote(scaler, (x,))
    with pytest.raises(TypeError, match=r"not a Tensor: \(x,\)"):
        call_model.remote(shim.ref, x)
    with pytest.raises(TypeError, match="'predict'"):
        rewrite_pipeline(scaler, "predict")
    with pytest.raises(ValueError, match="remote"):
        rewrite_pipeline(scaler, ("remote",))


# --- how it fails ---------------------------------------------------------------------------------


def test_an_exception_reaches_the_caller_as_itself(shim):
    with pytest.raises(KeyError, match="the key") as caught:
        shim.fail("the key")
    assert "test_invoke.py" in str(caught.value)
    assert "in fail" in str(caught.value)


def test_a_model_that_could_not_be_made_fails_the_call_as_itself(cluster):
    @ray.remote
    def publish():
        raise LookupError("no checkpoint")

    with pytest.raises(LookupError, match="no checkpoint"):
        ray.get(call_model.remote(publish.remote()))


def test_the_call_of_a_worker_that_died_is_made_again(shim, scaler, tmp_path):
    assert shim.die_once(str(tmp_path / "one")) == "alive"
    once = rewrite_pipeline(scaler, METHODS, max_retries=0)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        once.die_once(str(tmp_path / "other"))


# --- how long it waits ----------------------------------------------------------------------------


class Holding:
    """An actor that holds CPUs and calls a shim."""

    def ask(self, method, x):
        """Return its messages while it waits, and the result if that comes first."""
        told, results = [], []
        logger = logging.getLogger("ray_zerocopy.invoke")
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())
        logger.addHandler(handler)
        threading.Thread(target=lambda: results.append(method(x)), daemon=True).start()
        until_s = time.monotonic() + 60
        while not (told or results) and time.monotonic() < until_s:
            time.sleep(0.05)
        logger.removeHandler(handler)
        return told, results


def in_a_group(cpus):
    """Options of an actor whose tasks run in its placement group, like those of a Tune trial."""
    group = placement_group([{"CPU": cpus}])
    ray.get(group.ready())
    return group, {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_capture_child_tasks=True
        )
    }


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("holds all", "needs 1 CPU (0 free)"),
        ("holds its group", "needs 1 CPU (0 free)"),
        ("holds half", "needs 3 CPU (2 free)"),
        ("no such thing", "needs 1 gold (0 free)"),
    ],
)
def test_a_call_that_waits_for_resources_says_so_and_the_way_out(kind, told, shim, scaler, x):
    cpus = {"holds all": 4, "holds half": 2}.get(kind, 1)
    options = {"holds half": {"num_cpus": 3}, "no such thing": {"resources": {"gold": 1}}}
    method = rewrite_pipeline(scaler, METHODS, **options.get(kind, {}))
    group, how = in_a_group(1) if kind == "holds its group" else (None, {})
    actor = ray.remote(Holding).options(num_cpus=cpus, **how).remote()
    try:
        said, results = ray.get(actor.ask.remote(method, x))
        assert results == []
        assert len(said) == 1
        assert f"{method!r} waits for a task that {told}" in said[0]
        assert "num_cpus=0" in said[0]
        if kind.startswith("holds"):
            free = rewrite_pipeline(scaler, METHODS, num_cpus=0)
            said, results = ray.get(actor.ask.remote(free, x))
            assert said == []
            assert_exact([home(scaler, x)], results)
    finally:
        ray.kill(actor)
        if group:
            remove_placement_group(group)


def test_a_call_that_takes_long_says_nothing(scaler, caplog, monkeypatch):
    monkeypatch.setattr(invoke, "_PATIENCE_S", 0.1)
    assert rewrite_pipeline(scaler, ("sleep",)).sleep(1.0) == 1.0
    assert caplog.messages == []


def test_an_error_of_the_model_that_is_a_timeout_is_the_models(shim):
    with pytest.raises(ray.exceptions.GetTimeoutError, match="mine"):
        shim.time_out("mine")


# --- where models hang ----------------------------------------------------------------------------


class Pipeline:
    def __init__(self, model):
        self.model, self.scale = model, 2.0

    def __call__(self, x):
        return self.model(x) * self.scale


class Slotted:
    __slots__ = ("__model", "unset")

    def __init__(self, model):
        self.__model = model

    def model(self):
        return self.__model


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    model: Any
    name: str = "frozen"


@dataclass
class Stage:
    model: Any = None
    parent: Any = None
    log: list = field(default_factory=list)


class Registry(dict):
    """A dict with an attribute that refuses to be pickled."""

    def __reduce_ex__(self, protocol):
        raise TypeError("not me")

    def __copy__(self):
        new = Registry(self)
        vars(new).update(vars(self))
        return new


class Closed:
    """Drops a part when it is copied or pickled by its own methods."""

    def __init__(self, model):
        self.model, self.cache = model, {"kept": 1}

    def __getstate__(self):
        return {"model": self.model}


class Guarded:
    """An attribute that a property hides."""

    def __init__(self, model):
        self.__dict__["model"] = model

    @property
    def model(self):
        return self.__dict__["model"]


def in_registry(model):
    registry = Registry(a=1)
    registry.model = model
    return registry


HANGS = {
    "attribute": (lambda m: SimpleNamespace(model=m), lambda p: p.model),
    "private attribute": (lambda m: SimpleNamespace(_m=m), lambda p: p._m),
    "mangled attribute": (Slotted, lambda p: p.model()),
    "nested object": (lambda m: SimpleNamespace(a=Pipeline(m)), lambda p: p.a.model),
    "list": (lambda m: SimpleNamespace(a=[1, [m]]), lambda p: p.a[1][0]),
    "dict": (lambda m: SimpleNamespace(a={"b": {3: m}}), lambda p: p.a["b"][3]),
    "tuple": (lambda m: SimpleNamespace(a=(1, (m,))), lambda p: p.a[1][0]),
    "named tuple": (lambda m: Pair(1, m), lambda p: p.second),
    "set": (lambda m: SimpleNamespace(a={1, m}), lambda p: next(x for x in p.a if x != 1)),
    "frozen set": (lambda m: frozenset([m]), lambda p: next(iter(p))),
    "deque": (lambda m: collections.deque([1, m], maxlen=2), lambda p: p[1]),
    "defaultdict": (lambda m: collections.defaultdict(list, a=m), lambda p: p["a"]),
    "ordered dict": (lambda m: collections.OrderedDict(a=1, b=m), lambda p: p["b"]),
    "user dict": (lambda m: collections.UserDict(a=m), lambda p: p["a"]),
    "dict with attributes": (in_registry, lambda p: p.model),
    "frozen dataclass": (Frozen, lambda p: p.model),
    "custom state": (Closed, lambda p: p.model),
    "behind a property": (Guarded, lambda p: p.model),
    "partial": (lambda m: functools.partial(print, m, sep=m), lambda p: p.keywords["sep"]),
    "bound method of a part": (lambda m: [Pipeline(m).__call__], lambda p: p[0].__self__.model),
    "nothing": (lambda m: m, lambda p: p),
}


@pytest.mark.parametrize("where", HANGS)
def test_models_are_found_wherever_they_hang(where, scaler, x):
    hang, find = HANGS[where]
    pipeline = hang(scaler)
    fast = rewrite_pipeline(pipeline)
    assert type(find(fast)) is Shim
    assert find(pipeline) is scaler
    assert type(fast) is (Shim if where == "nothing" else type(pipeline))
    assert_exact(home(scaler, x), find(fast)(x))


def test_all_but_models_is_shared_with_the_pipeline(scaler):
    pipeline = SimpleNamespace(
        model=scaler,
        parts=[Pipeline(scaler), ["kept"]],
        table={"a": object()},
        tensor=torch.ones(2),
    )
    before = dict(vars(pipeline)), list(pipeline.parts), dict(vars(pipeline.parts[0]))
    fast = rewrite_pipeline(pipeline)
    assert (vars(pipeline), pipeline.parts, vars(pipeline.parts[0])) == before
    assert fast is not pipeline
    assert fast.parts is not pipeline.parts
    assert fast.parts[1] is pipeline.parts[1]
    assert fast.table is pipeline.table
    assert fast.tensor is pipeline.tensor
    assert fast.parts[0].scale == 2.0


def test_the_source_is_exactly_what_it_was(cluster):
    pipeline = Stage([transformer().model, simple().model.train()], log=["a"])
    before = describe(pipeline)
    rewrite_pipeline(pipeline)
    assert_same_description(before, describe(pipeline))


def test_what_a_class_does_not_pickle_is_kept(scaler):
    assert rewrite_pipeline(Closed(scaler)).cache == {"kept": 1}
    assert rewrite_pipeline(Guarded(scaler)).model is not scaler


def test_what_was_one_object_stays_one(scaler):
    shared = [scaler]
    fast = rewrite_pipeline(SimpleNamespace(a=scaler, b={"c": scaler}, d=shared, e=(shared,)))
    assert fast.a is fast.b["c"] is fast.d[0]
    assert fast.d is fast.e[0]


def test_cycles_close_within_the_copy(scaler):
    whole = Stage()
    whole.model = Pair(Stage(scaler, parent=whole), Stage(None, parent=(whole, "up")))
    fast = rewrite_pipeline(whole)
    assert fast.model.first.parent is fast
    assert fast.model.second.parent[0] is fast
    assert type(fast.model.first.model) is Shim
    assert whole.model.first.parent is whole


def test_a_scripted_model_is_a_model(cluster, x):
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout()))
    fast = rewrite_pipeline(Pipeline(scripted))
    assert type(fast.model) is Shim
    assert_exact(home(Pipeline(scripted.eval()), x), fast(x))


def test_a_tuple_in_a_cycle_is_made_once(scaler):
    stage = Stage(scaler)
    stage.parent = pair = (stage, scaler)
    fast = rewrite_pipeline(pair)
    assert fast[0].parent is fast
    assert fast[1] is fast[0].model


def test_a_method_of_a_model_becomes_the_shims(scaler, x):
    fast = rewrite_pipeline([scaler.predict, scaler], ("predict",))
    assert_exact(home(scaler, x, method="predict"), fast[0](x))
    with pytest.raises(AttributeError, match="predict"):
        rewrite_pipeline([scaler.predict])


def test_a_method_of_the_pipeline_is_bound_to_the_copy(scaler):
    pipeline = Pipeline(scaler)
    pipeline.step = pipeline.__call__
    fast = rewrite_pipeline(pipeline)
    assert fast.step.__self__ is fast
    assert pipeline.step.__self__ is pipeline


def test_a_pipeline_without_models_is_copied(cluster):
    pipeline = SimpleNamespace(a=[1])
    fast = rewrite_pipeline(pipeline)
    assert fast is not pipeline
    assert fast.a is pipeline.a


def test_rewriting_again_changes_nothing(scaler):
    fast = rewrite_pipeline(Pipeline(scaler))
    assert rewrite_pipeline(fast).model is fast.model


def test_a_rewritten_pipeline_carries_no_weights(cluster):
    fast = rewrite_pipeline(Pipeline(large().model))
    assert len(pickle.dumps(fast)) < 5_000


def test_a_pipeline_of_transformers_runs_in_tasks(cluster):
    import tokenizers
    import transformers

    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    pipeline = transformers.pipeline(
        "text-classification",
        model=transformers.BertForSequenceClassification(transformers.BertConfig(**size)).eval(),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ),
        device="cpu",
    )
    fast = rewrite_pipeline(pipeline, ("forward",))
    texts = ["good", "bad bad"]
    assert type(fast.model) is Shim
    assert fast(texts) == pipeline(texts)


# --- shims elsewhere ------------------------------------------------------------------------------


class Elsewhere:
    def __init__(self, pipeline=None):
        self.pipeline = pipeline

    def run(self, x, pipeline=None):
        return (pipeline or self.pipeline)(x)


class Asynchronous:
    def __init__(self, pipeline):
        self.model = pipeline.model

    async def run(self, x):
        outputs = [self.model.remote(x), self.model.predict.remote(x, top=2)]
        return await self.model.remote(x), await asyncio.gather(*outputs)


@pytest.fixture
def fast(scaler):
    return rewrite_pipeline(Pipeline(scaler), ("predict",))


def test_shims_work_in_tasks(fast, scaler, x):
    run = ray.remote(lambda x, pipeline: pipeline(x))
    assert_exact(home(Pipeline(scaler), x), ray.get(run.remote(x, fast)))
    assert_exact(home(Pipeline(scaler), x), ray.get(run.remote(x, ray.put(fast))))


def test_shims_work_in_actors_and_outlive_the_drivers(scaler, start, x):
    (actor,) = start(Elsewhere)
    fast = rewrite_pipeline(Pipeline(scaler))
    assert_exact(home(Pipeline(scaler), x), ray.get(actor.run.remote(x, fast)))
    holder = ray.remote(num_cpus=0)(Elsewhere).remote(fast)
    ray.get(holder.run.remote(x))
    del fast
    assert_exact(home(Pipeline(scaler), x), ray.get(holder.run.remote(x)))
    ray.kill(holder)


def test_shims_can_be_awaited(fast, scaler, x):
    actor = ray.remote(num_cpus=0)(Asynchronous).remote(fast)
    one, several = ray.get(actor.run.remote(x))
    assert_exact(home(scaler, x), one)
    assert_exact([home(scaler, x), home(scaler, x, method="predict", top=2)], several)
    ray.kill(actor)


def test_shims_pickle_plainly(fast, scaler, x):
    again = pickle.loads(pickle.dumps(fast))
    assert_exact(home(Pipeline(scaler), x), again(x))
    assert_exact(home(scaler, x, method="predict"), again.model.predict(x))
    assert repr(again.model) == "<Scaler in tasks, with __call__, predict>"
    with pytest.raises(AttributeError):
        again.model.forward  # noqa: B018


# --- what it leaves behind ------------------------------------------------------------------------


def store_usage() -> int:
    """MiB used in the object store, including objects that a worker keeps."""
    address = ray.get_runtime_context().gcs_address
    return int(re.search(r"usage (\d+) MiB", memory_summary(address, stats_only=True))[1])


def test_the_store_has_its_memory_back_in_ten_seconds(cluster):
    case = large()
    fast = rewrite_pipeline(Pipeline(case.model))
    ray.get([fast.model.remote(*case.args) for _ in range(8)])
    taken = store_usage()
    dropped = time.monotonic()
    del fast
    while (left := store_usage()) > taken - 64 and time.monotonic() < dropped + 10:
        time.sleep(0.2)
    assert left <= taken - 64
