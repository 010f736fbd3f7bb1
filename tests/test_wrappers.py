"""A wrapper loads its model, in eval mode, in any process and after any pickle."""

import os
import pickle
import time

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from models import DIFFICULT, Pipeline, large, simple
from ray_zerocopy.wrappers import JITModelWrapper, ModelWrapper, wrap
from test_memory_footprint import places
from torch import nn

SOURCES = ["pipeline", "slotted_pipeline", "dataclass_of_models", "dict_of_models", "tied_weights"]


class Dropping(nn.Module):
    """Its output tells whether it is in train mode, and its process."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout()

    def forward(self, x):
        return self.dropout(self.linear(x)), self.training

    def where(self):
        return os.getpid()

    def twice(self, x):
        return 2 * self.linear(x)


class Labelled:
    """A pipeline with two models, one of them nested, and other objects."""

    def __init__(self):
        self.encoder, self.heads = Dropping(), {"label": [Dropping()]}
        self.labels, self.threshold = ["a", "b"], 0.5

    def __call__(self, x):
        hidden, training = self.encoder(x)
        return self.heads["label"][0](hidden)[0], training


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, wrapper):
        self.loaded = wrapper.load()

    def call(self, x):
        with torch.no_grad():
            return self.loaded(x)

    def places(self):
        return places(self.loaded)


@ray.remote(num_cpus=0)
def run(handle, call, *args):
    """Load a wrapper in another process, in any form, and call the model."""
    if isinstance(handle, bytes):
        handle = pickle.loads(handle)
    if isinstance(handle, dict):
        handle = ModelWrapper.deserialize(**handle)
    with torch.no_grad():
        return call(handle.load(), *args)


def modules(obj):
    return [obj.encoder, *obj.heads["label"]]


# --- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_loaded_is_the_source(name, cluster):
    case = DIFFICULT[name]()
    loaded = ModelWrapper.from_model(case.model).load()
    assert_exact(case.run(), case.run(loaded))


def test_actors_share_one_block(cluster):
    case = large()
    wrapper = ModelWrapper.from_model(case.model)
    workers = [Worker.remote(wrapper) for _ in range(2)]
    here = places(wrapper.load())
    assert ray.get([worker.places.remote() for worker in workers]) == [here, here]
    assert_exact(case.run(), ray.get(workers[0].call.remote(*case.args)))


def test_what_is_loaded_is_in_eval_mode_and_the_source_is_as_it_was(cluster):
    pipeline = Labelled()
    pipeline.encoder.dropout.eval()
    loaded = ModelWrapper.from_model(pipeline).load()
    assert not any(part.training for model in modules(loaded) for part in model.modules())
    assert pipeline.encoder.training
    assert not pipeline.encoder.dropout.training
    assert pipeline.heads["label"][0].training
    assert not ModelWrapper.from_model(Dropping()).load().training


def test_a_reference_of_it_loads_the_same(cluster):
    wrapper = ModelWrapper.from_model(Labelled())
    assert not ray.get(wrapper.ref).encoder.training
    assert rzc.inspect(wrapper.ref).tensors


def test_what_is_no_model_is_kept(cluster):
    loaded = ModelWrapper.from_model(Labelled()).load()
    assert type(loaded) is Labelled
    assert (loaded.labels, loaded.threshold) == (["a", "b"], 0.5)


def test_load_says_how(cluster):
    wrapper = ModelWrapper.from_model(simple().model)
    assert all(parameter.is_meta for parameter in wrapper.load(device="meta").parameters())
    copied = wrapper.load(isolation="copy")
    assert {inode for _, inode, _ in places(copied)} == {0}


# --- tasks ----------------------------------------------------------------------------------------


def test_in_task_mode_models_run_elsewhere_in_eval_mode(cluster):
    pipeline, x = Labelled(), torch.randn(2, 8)
    fast = ModelWrapper.from_model(pipeline, mode="task", method_names=["where", "twice"]).load()
    output, training = fast(x)
    assert not training
    assert pipeline.encoder.training
    with torch.no_grad():
        for model in modules(pipeline):
            model.eval()
        assert_exact(pipeline(x)[0], output)
        assert_exact(pipeline.encoder.twice(x), fast.encoder.twice(x))
    assert fast.encoder.where() != os.getpid()
    assert fast.labels == pipeline.labels


def test_for_tasks_is_the_same_in_one_step(cluster):
    case = simple()
    assert_exact(case.run(), ModelWrapper.for_tasks(case.model)(*case.args))
    fast = ModelWrapper.for_tasks(Labelled(), method_names=["where"])
    assert fast.heads["label"][0].where() != os.getpid()


# --- names ----------------------------------------------------------------------------------------


def test_only_named_attributes_run_as_tasks(cluster):
    pipeline = Labelled()
    pipeline.local = Dropping()
    wrapper = ModelWrapper.from_model(
        pipeline, mode="task", model_attr_names=["encoder"], method_names=["where"]
    )
    fast = wrapper.load()
    assert fast.encoder.where() != os.getpid()
    assert fast.local.where() == os.getpid()
    assert isinstance(pipeline.encoder, Dropping)


def test_only_named_attributes_are_switched(cluster):
    loaded = ModelWrapper.from_model(Labelled(), model_attr_names=["encoder"]).load()
    assert not loaded.encoder.training
    assert loaded.heads["label"][0].training


@pytest.mark.parametrize("mode", ["actor", "task"])
def test_a_wrong_name_is_named(mode, cluster):
    with pytest.raises(AttributeError, match=r"Labelled has no attribute 'encodr'.*\['encoder'\]"):
        ModelWrapper.from_model(Labelled(), mode=mode, model_attr_names=["encodr"])
    with pytest.raises(TypeError, match=r"Labelled\.labels is a list, not a module"):
        ModelWrapper.from_model(Labelled(), mode=mode, model_attr_names=["encoder", "labels"])


def test_a_module_runs_as_one(cluster):
    with pytest.raises(ValueError, match="Dropping is a module"):
        ModelWrapper.from_model(Dropping(), mode="task", model_attr_names=["linear"])


def test_a_wrong_mode_is_refused(cluster):
    with pytest.raises(ValueError, match="'actor' or 'task', not 'thread'"):
        ModelWrapper.from_model(Dropping(), mode="thread")


# --- the handle -----------------------------------------------------------------------------------

WAYS = {
    "through Ray": lambda wrapper: wrapper,
    "plain pickle": pickle.dumps,
    "Ray's pickle": ray.cloudpickle.dumps,
    "a dict": ModelWrapper.serialize,
    "a pickled dict": lambda wrapper: pickle.dumps(wrapper.serialize()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["actor", "task"])
def test_it_travels_by_every_way(mode, way, cluster):
    case = DIFFICULT["pipeline"]()
    wrapper = ModelWrapper.from_model(case.model, mode=mode)
    assert_exact(case.run(), ray.get(run.remote(WAYS[way](wrapper), case.call, *case.args)))


@pytest.mark.parametrize("mode", ["actor", "task"])
def test_it_is_small(mode, cluster):
    huge = nn.utils.skip_init(nn.Linear, 10_000, 10_000, bias=False)
    pipeline = Pipeline(huge, simple().model)
    pipeline.vocabulary = {f"token {index}": index for index in range(100_000)}
    wrapper = ModelWrapper.from_model(pipeline, mode=mode)
    nbytes = len(pickle.dumps(wrapper))
    mb = huge.weight.nbytes / 1e6
    print(f"\nA wrapper of {mb:.0f} MB in {mode} mode pickles to {nbytes} bytes")
    assert mb == 400
    assert nbytes < 1000
    assert wrapper.load().vocabulary == pipeline.vocabulary


def test_pickles_give_equal_wrappers_of_the_same_class(cluster):
    for cls in ModelWrapper, JITModelWrapper:
        wrapper = cls(rzc.put(simple().model))
        assert pickle.loads(pickle.dumps(wrapper)) == wrapper
        assert type(pickle.loads(pickle.dumps(wrapper))) is cls
        assert cls.deserialize(**wrapper.serialize()) == wrapper


def test_it_is_not_callable(cluster):
    with pytest.raises(TypeError, match="not callable"):
        ModelWrapper.from_model(simple().model)(1)


def is_held(object_id):
    """Whether this process, which owns the object, knows of any reference to it."""
    core_worker = ray._private.worker.global_worker.core_worker
    return object_id.encode() in core_worker.get_all_reference_counts()


@pytest.mark.parametrize("way", ["through Ray", "a dict"])
def test_a_wrapper_that_ray_carries_lets_the_block_go(way, cluster):
    wrapper = ModelWrapper.from_model(simple().model)
    object_id = wrapper.ref.hex()
    assert ray.get(run.remote(WAYS[way](wrapper), type)) is nn.Sequential
    assert is_held(object_id)
    del wrapper
    deadline = time.monotonic() + 10
    while is_held(object_id):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_plain_pickle_keeps_the_block(cluster):
    case = large()
    wrapper = ModelWrapper.from_model(case.model)
    object_id, pickled = wrapper.ref.hex(), pickle.dumps(wrapper)
    del wrapper
    time.sleep(0.5)
    assert is_held(object_id)
    assert_exact(case.run(), ray.get(run.remote(pickled, case.call, *case.args)))


def test_wrap_takes_whatever_is_at_hand(cluster):
    case = simple()
    wrapper = ModelWrapper.from_model(case.model)
    assert wrap(wrapper) is wrapper
    for source in (wrapper.ref, case.model):
        assert_exact(case.run(), case.run(wrap(source).load()))


# --- TorchScript ----------------------------------------------------------------------------------


def test_a_module_that_is_not_torchscript_is_refused(cluster):
    with pytest.raises(TypeError, match="Dropping is not TorchScript: use ModelWrapper"):
        JITModelWrapper.from_model(Labelled())


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_torchscript_is_shared(cluster):
    case = DIFFICULT["pipeline"]()
    encoder, head = case.model.encoder, case.model.head
    scripted = Pipeline(torch.jit.script(encoder), torch.jit.trace(head, case.args))
    wrapper = JITModelWrapper.from_model(scripted)
    loaded = wrapper.load()
    assert isinstance(loaded.encoder, torch.jit.ScriptModule)
    assert places(loaded.encoder) == places(wrapper.load().encoder)
    assert_exact(case.run(), case.run(loaded))
    assert_exact(case.run(), ray.get(run.remote(pickle.dumps(wrapper), case.call, *case.args)))
    assert_exact(case.run(), case.run(JITModelWrapper.for_tasks(scripted)))


def test_a_frozen_script_is_wrapped(cluster):
    """It has no `training`."""
    model = nn.Linear(3, 3).eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    x = torch.ones(1, 3)
    assert torch.equal(JITModelWrapper.from_model(frozen).load()(x), model(x))
