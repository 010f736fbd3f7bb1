"""Between `enable` and `disable`, objects with tensors are stored as blocks, others as before."""

import functools
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from models import DIFFICULT, simple, transformer
from ray._private import serialization
from ray_zerocopy import _core, metrics
from ray_zerocopy.objects import skeleton
from torch import nn


@pytest.fixture
def enabled(cluster):
    rzc.enable()
    yield
    rzc.disable()


def wide(width=256):
    torch.manual_seed(0)
    return nn.Linear(width, width).eval()


def is_block(ref):
    try:
        return rzc.inspect(ref).held == "private"
    except rzc.NotABlockError:
        return False


@pytest.mark.parametrize(
    "value",
    [
        wide(),
        [wide(), wide()],
        {"model": wide(), "rate": 0.1},
        ("tuple", wide()),
        wide().state_dict(),
        torch.randn(200, 200),
        functools.partial(map, wide()),
    ],
    ids=["module", "list", "dict", "tuple", "state_dict", "tensor", "partial"],
)
def test_what_holds_tensors_is_put_as_a_block(value, enabled):
    ref = ray.put(value)
    assert is_block(ref)
    if not isinstance(value, functools.partial):
        assert_exact(value, ray.get(ref))


@pytest.mark.parametrize("name", DIFFICULT)
def test_what_is_hard_to_pickle_comes_back_exact(name, enabled):
    source = [DIFFICULT[name]().model, torch.zeros(200, 200)]
    assert_exact(source, ray.get(ray.put(source)))


def test_ties_between_the_parts_of_a_value_are_kept(enabled):
    model = transformer().model
    big = wide()
    loaded = ray.get(ray.put({"a": [model, big], "b": model.embed.weight, "c": {"d": big}}))
    assert loaded["b"] is loaded["a"][0].embed.weight
    assert loaded["c"]["d"] is loaded["a"][1]


def pickled(value):
    """The bytes that Ray's serializer writes for a value, in band and out of band."""
    buffers = []
    inband = serialization.pickle.dumps([value], protocol=5, buffer_callback=buffers.append)
    return inband, [bytes(buffer.raw()) for buffer in buffers]


@pytest.mark.parametrize(
    "value",
    [
        *(3, "text", None, {"a": "b"}, [1.5, "c"], np.arange(100_000), b"x" * 200_000),
        pd.DataFrame({"x": np.arange(1000), "y": ["text"] * 1000}),
        *(simple().model, torch.ones(3), {"t": torch.zeros(1000)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_small_or_holds_none_is_pickled_to_the_same_bytes(value, cluster):
    before = pickled(value)
    rzc.enable()
    try:
        assert pickled(value) == before
    finally:
        rzc.disable()


def test_a_model_is_stored_as_by_put(enabled, tmp_path):
    """For what takes the block as it is: snapshots, publications, Serve."""
    rzc.save(ray.put(wide()), tmp_path / "model.rzc")
    assert_exact(wide(), rzc.open(tmp_path / "model.rzc"))
    rzc.publish("automatic", ray.put(wide()))
    assert_exact(wide(), rzc.load("automatic"))
    rzc.retire("automatic")
    with pytest.raises(rzc.NotABlockError):
        rzc.save(ray.put({"a": wide(), "b": wide()}), tmp_path / "models.rzc")


@pytest.mark.parametrize("model", [simple().model, wide()], ids=["small", "large"])
def test_functions_and_classes_are_pickled_by_ray(model, enabled):
    """Up to Ray 2.49, it pickles them with the same serializer, and without buffers."""
    table = np.arange(100_000)
    pickled = serialization.pickle.dumps(lambda: (table, model))
    loaded, module = ray.cloudpickle.loads(pickled)()
    assert np.array_equal(loaded, table)
    assert_exact(model, module)


def test_a_tensor_on_another_device_stays_there(enabled, monkeypatch):
    """Simulated: this machine has no other device that has values."""
    sources = _core.Sources

    def one_elsewhere(to_host):
        to_host(torch.ones(1).untyped_storage())
        return sources(to_host)

    monkeypatch.setattr(skeleton._core, "Sources", one_elsewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rzc.HostCopyWarning)
        ref = ray.put({"here": wide(), "there": wide()})
    monkeypatch.undo()
    assert not is_block(ref)
    assert_exact(wide(), ray.get(ref)["there"])


def test_references_in_a_value_are_counted(enabled):
    value = {"model": wide(), "ref": ray.put(np.arange(100_000))}
    ref = ray.put(value)
    del value
    assert ray.get(ray.get(ref)["ref"]).sum() == np.arange(100_000).sum()


class Worker:
    def enable(self):
        rzc.enable()

    def run(self, model):
        return model(torch.ones(1, 256)).sum().item()

    def make(self):
        return wide()


def test_arguments_and_returns_are_blocks_and_readers_need_nothing(start, enabled):
    (worker,) = start(Worker)
    expected = wide()(torch.ones(1, 256)).sum().item()
    assert ray.get(worker.run.remote(wide())) == expected
    returned = worker.make.remote()
    assert not is_block(returned)  # this worker has not enabled it
    ray.get(worker.enable.remote())
    returned = worker.make.remote()
    assert is_block(returned)
    assert_exact(wide(), ray.get(returned))


def test_an_argument_is_mapped_and_takes_no_private_memory(start, enabled):
    class Reader:
        def private(self, model):
            return mapped_of_store(next(model.parameters()).data_ptr())

    (reader,) = start(Reader)
    assert ray.get(reader.private.remote(wide(1024)))


def test_only_narrows_it(cluster):
    rzc.enable(only=nn.Module)
    try:
        assert is_block(ray.put({"model": wide()}))
        assert not is_block(ray.put(torch.randn(200, 200)))
    finally:
        rzc.disable()


def test_disable_ends_it(enabled):
    rzc.disable()
    assert not is_block(ray.put(wide()))
    assert rzc.inspect(rzc.put(wide())).ways["enable"] == "off"
    rzc.enable()
    assert rzc.inspect(rzc.put(wide())).ways["enable"] == "on"


def test_a_model_stored_a_third_time_names_put(enabled):
    @ray.remote(num_cpus=0)
    def ignore(model):
        return None

    model = wide()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ray.get([ignore.remote(model), ignore.remote(model)])
    with pytest.warns(rzc.StoredAgainWarning, match=r"Linear has been stored 3 times.*put"):
        ray.get(ignore.remote(model))


def test_what_put_refuses_goes_the_way_of_ray_and_says_so(enabled):
    class Reduced:
        """Pickled by Ray, not by us: its reducer checks for our pickler."""

        def __reduce__(self):
            import sys

            frame = sys._getframe()
            while frame is not None:
                if frame.f_code.co_name == "split":
                    raise TypeError("not there")
                frame = frame.f_back
            return dict, ()

    with pytest.warns(rzc.NotABlockWarning, match="not there"):
        ref = ray.put([wide(), Reduced()])
    model, made = ray.get(ref)
    assert_exact(wide(), model)
    assert made == {}


def test_both_ways_are_counted(enabled, monkeypatch):
    counted = []
    monkeypatch.setattr(metrics, "record", lambda *what: counted.append(what))
    ray.put(wide())
    assert ("rzc_automatic", 1, "block") in counted


def test_a_ray_with_another_serializer_is_refused(cluster, monkeypatch):
    monkeypatch.delattr(serialization.SerializationContext, "_serialize_to_pickle5")
    with pytest.raises(rzc.VersionError, match=f"Ray {ray.__version__}"):
        rzc.enable()


def test_the_flag_of_ray_is_told_and_ours_wins(cluster, monkeypatch):
    monkeypatch.setattr(ray._private.ray_constants, "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", True)
    with pytest.warns(UserWarning, match="RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"):
        rzc.enable()
    try:
        assert is_block(ray.put(wide()))
    finally:
        rzc.disable()


# --- within other libraries -----------------------------------------------------------------------


class Score:
    """Ray Data holds it, and passes the model in `fn_constructor_args`."""

    def __init__(self, model):
        self.model = model
        weight = next(model.parameters())
        self.mapped = mapped_of_store(weight.data_ptr())

    def __call__(self, batch):
        with torch.no_grad():
            out = self.model(torch.as_tensor(batch["x"])).sum(1).numpy()
        return {"out": out, "mapped": np.full(len(out), self.mapped)}


def mapped_of_store(address):
    """Whether memory at an address is the store's file, mapped privately."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split(b"-"))
        if start <= address < end:
            return line.split()[1].endswith(b"p") and b"plasma" in line
    return False


def test_ray_data_gives_its_actors_the_block(enabled):
    model, x = wide(512), np.random.default_rng(0).standard_normal((64, 512)).astype("float32")
    rows = ray.data.from_numpy(x).rename_columns({"data": "x"})
    scored = rows.map_batches(
        Score, fn_constructor_args=(model,), compute=ray.data.ActorPoolStrategy(size=1)
    ).take_all()
    assert all(row["mapped"] for row in scored)
    expected = model(torch.as_tensor(x)).sum(1)
    assert torch.allclose(torch.tensor([row["out"] for row in scored]), expected)


def trial(config, model):
    from ray import tune

    mapped = mapped_of_store(next(model.parameters()).data_ptr())
    tune.report({"mapped": int(mapped), "out": model(torch.ones(1, 512)).sum().item()})


def test_ray_tune_gives_its_trials_the_block(enabled, tmp_path):
    from ray import tune

    model = wide(512)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, model=model), {"cpu": 1}),
        tune_config=tune.TuneConfig(num_samples=2),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    expected = model(torch.ones(1, 512)).sum().item()
    assert [(r.metrics["mapped"], r.metrics["out"]) for r in results] == [(1, expected)] * 2


def train_loop(config):
    model = config["model"]
    assert mapped_of_store(next(model.parameters()).data_ptr())
    assert model(torch.ones(1, 512)).sum().item() == config["expected"]


def test_ray_train_gives_its_workers_the_block(enabled, tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    model = wide(512)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"model": model, "expected": model(torch.ones(1, 512)).sum().item()},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(tmp_path)),
    )
    assert trainer.fit().error is None  # it raises what the loop does


def test_rllib_trains_as_before(enabled):
    """Its env runners get the learner's weights; RLlib sends them as arrays, which Ray maps."""
    from ray.rllib.algorithms.ppo import PPOConfig

    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5)
        .training(train_batch_size=200, minibatch_size=100, num_epochs=1)
    )
    algorithm = config.build_algo()
    algorithm.train()
    states = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: {**runner.module.state_dict()}, local_env_runner=False
    )
    learned = {**algorithm.get_module().state_dict()}
    assert len(states) == 2
    for state in states:
        assert_exact(learned, state)
    algorithm.stop()
