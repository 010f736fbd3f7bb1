"""A model that Serve deploys stays exactly as long as its deployment. Memory is bytes of the store.

The driver deploys, repeatedly. `chaos/serve_command.py` uses the `serve` command.
"""

import gc
import time

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
from ray import serve
from ray_zerocopy.registry import deployments
from ray_zerocopy.registry.publication import state
from ray_zerocopy.serve import app, keep, multiplexed
from test_serve import SMALL, until
from test_serve import url as serving  # noqa: F401
from torch import nn

NBYTES = 2**24


def heavy(value=1.0):
    """A model of 16 MiB that returns its value."""
    model = nn.Linear(4, 2**20, bias=False)
    nn.init.constant_(model.weight, value / 4)
    return model


HEAVY = {"postprocess": lambda y: y[:, :1], **SMALL}


def used():
    gc.collect()
    total, free = ray.cluster_resources(), ray.available_resources()
    return total["object_store_memory"] - free["object_store_memory"]


def kept():
    return [name for name in rzc.published() if name.startswith("serve/")]


def value_of(handle):
    return handle.predict.remote({"x": np.ones((1, 4), "float32")}).result()["output"].item()


LOOK_S = 0.3


def look_often():
    """Make the keeper check every 0.3 s instead of every 3 s."""

    def often(_, seconds=LOOK_S):
        deployments._LOOK_S = seconds

    ray.get(ray.get_actor("keeper", "ray_zerocopy").__ray_call__.remote(often))


@pytest.fixture(scope="module")
def keeper(serving):  # noqa: F811
    keep(rzc.put(nn.Linear(2, 2)))
    look_often()
    hurry()


@pytest.fixture
def keeps(keeper):
    """Wait until the store has this many models more than before."""
    until(lambda: not kept(), 120)
    before = used()

    def keeps(count, borrowed=0):
        until(lambda: len(kept()) == count, 120)
        until(lambda: abs(used() - before - (count + borrowed) * NBYTES) < NBYTES / 4, 120)

    yield keeps
    keeps(0)
    until(lambda: not [name for name in state()["names"] if name.startswith("serve/")])


def hurry():
    """Make the keeper stop waiting for deployments of the models that it keeps now."""

    def forget_how_long(keeper):
        keeper._until_s = dict.fromkeys(keeper._until_s, 0.0)

    ray.get(ray.get_actor("keeper", "ray_zerocopy").__ray_call__.remote(forget_how_long))


def in_both(kind, value):
    models = {"a": heavy(value), "b": heavy(value)}
    return app(models["a"], **HEAVY) if kind == "app" else multiplexed(models, **HEAVY)


@pytest.mark.parametrize(("kind", "count"), [("app", 1), ("multiplexed", 2)])
def test_an_application_keeps_its_models_while_it_is_deployed(kind, count, keeps):
    for value in range(4):
        handle = serve.run(in_both(kind, float(value)), name="heavy", route_prefix="/heavy")
        handle = handle.options(multiplexed_model_id="b") if kind == "multiplexed" else handle
        until(lambda: value_of(handle) == value, 120)  # noqa: B023
    keeps(count)
    serve.delete("heavy")
    keeps(0)


def test_a_reference_is_the_drivers_and_what_is_deployed_the_clusters(keeps):
    ref = rzc.put(heavy())
    application = app(ref, **HEAVY)
    keeps(1, borrowed=1)
    handle = serve.run(application, name="heavy", route_prefix="/heavy")
    del ref, application
    keeps(1)
    assert value_of(handle) == 1
    serve.delete("heavy")


def test_a_model_that_is_retired_by_hand_does_not_keep_the_others(keeps):
    keep(rzc.put(heavy(1.0)))
    keep(rzc.put(heavy(2.0)))
    until(lambda: len(kept()) == 2, 120)
    rzc.retire(sorted(kept())[0])
    hurry()
    keeps(0)


def test_an_application_is_deployed_whenever_it_is_wanted(keeps):
    """Also if the cluster has freed its model, but this process has not."""
    application = app(heavy(), **HEAVY)
    keeps(1)
    hurry()
    keeps(0, borrowed=1)
    for _ in range(2):
        handle = serve.run(application, name="heavy", route_prefix="/heavy")
        assert value_of(handle) == 1
        keeps(1)
        serve.delete("heavy")
        keeps(0, borrowed=1)
    del application


def test_a_model_that_is_never_deployed_goes(keeps):
    application = app(heavy(), **HEAVY)
    keeps(1)
    del application
    hurry()
    keeps(0)


def has_restarted():
    try:
        look_often()
    except ray.exceptions.RayActorError:
        return False
    return True


def test_a_deployment_keeps_its_model_though_the_keeper_dies(keeps):
    application = app(heavy(), **HEAVY)
    handle = serve.run(application, name="heavy", route_prefix="/heavy")
    del application
    ray.kill(ray.get_actor("keeper", "ray_zerocopy"), no_restart=False)
    until(has_restarted)
    time.sleep(3 + 4 * LOOK_S)  # of the first look, and three more
    keeps(1)
    assert value_of(handle) == 1
    serve.delete("heavy")
    keeps(0)


def test_a_deployment_without_a_replica_keeps_its_model(keeps):
    few = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
    application = app(heavy(), autoscaling_config=few, **HEAVY)
    handle = serve.run(application, name="heavy", route_prefix="/heavy")
    del application
    hurry()
    time.sleep(4 * LOOK_S)  # of three looks
    keeps(1)
    assert value_of(handle) == 1
    serve.delete("heavy")


def test_a_replica_loads_what_is_let_go_after_its_start(keeps):
    """Like a deployment that is being replaced by one with other models."""
    handle = serve.run(multiplexed({"a": heavy()}, **HEAVY), name="heavy", route_prefix="/heavy")
    (name,) = kept()
    rzc.retire(name)
    assert value_of(handle.options(multiplexed_model_id="a")) == 1
    serve.delete("heavy")


@serve.deployment(**SMALL)
class Mine:
    def __init__(self, wrapper):
        self.model = wrapper.load()

    def __call__(self):
        return self.model.weight[0, 0].item() * 4


def test_a_deployment_of_ones_own_keeps_its_model(keeps):
    handle = serve.run(Mine.bind(keep(heavy())), name="heavy", route_prefix="/heavy")
    keeps(1)
    assert handle.remote().result() == 1
    serve.delete("heavy")


def test_what_is_published_is_bound_as_it_is(keeps):
    version = rzc.publish("bound", heavy())
    assert keep(version).ref == version.handle
    live = rzc.follow("bound")
    assert keep(live).ref is live
    assert kept() == []
    del live, version
    rzc.retire("bound")
