"""A loaded object that only cycles hold is freed within seconds; a held one stays.

This takes no full collection: other garbage is left to Python's own collections.
"""

import gc
import pickle
import time
import weakref

import numpy as np
import pytest
import ray_zerocopy as rzc
import torch
from fresh import run
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """A model that holds a bound method of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.act = self.relu

    def relu(self, x):
        return x.relu()

    def forward(self, x):
        return self.act(self.layer(x))


class Estimator:
    """An object in a cycle that is not a module."""

    def __init__(self):
        self.weights = np.ones(5000)
        self.itself = [self]


def linear():
    return nn.Linear(64, 64)


def hooked():
    net = linear()
    net.parent = [net]
    net.register_forward_hook(net.parent[0].extra_repr)
    return net


SOURCES = {
    "a bound method": Net,
    "a part": lambda: nn.Sequential(Net(), nn.ReLU()),
    "weight_norm": lambda: nn.Sequential(weight_norm(linear())),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(linear())),
    "parametrizations": lambda: nn.Sequential(parametrizations.weight_norm(linear())),
    "a hook": hooked,
    "fx": lambda: torch.fx.symbolic_trace(nn.Sequential(linear(), nn.ReLU())),
    "a dict of models": lambda: {"a": Net(), "b": [Net()]},
    "no module": Estimator,
    "a list of objects": lambda: [Estimator(), {"more": Estimator()}],
}


@pytest.fixture(autouse=True)
def no_collection_by_itself():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(obj):
    """Like a load from the store, but also returns the block."""
    return pickle.loads(pickle.dumps(rzc.Shared(obj), protocol=5))


def watched(loaded):
    """Weak references to the storages' tensors, to see that all are freed."""
    found = []
    for part in loaded.values() if isinstance(loaded, dict) else [loaded]:
        for inner in part if type(part) is list else [part]:
            inner = inner.get("more", inner) if isinstance(inner, dict) else inner
            found += inner.modules() if isinstance(inner, nn.Module) else [inner]
    return [weakref.ref(part) for part in found]


def goes(refs, seconds=10):
    deadline = time.monotonic() + seconds
    while any(ref() is not None for ref in refs) and time.monotonic() < deadline:
        time.sleep(0.05)
    return all(ref() is None for ref in refs)


@pytest.mark.parametrize("name", SOURCES)
def test_what_was_dropped_goes(name):
    loaded = load(SOURCES[name]())
    refs = watched(loaded)
    assert refs
    del loaded
    assert goes(refs)


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_next_load_finds_dropped_goes_at_once(name):
    source = SOURCES[name]()
    refs = watched(load(source))
    second = load(source)
    assert all(ref() is None for ref in refs)
    assert not goes(watched(second), seconds=0)


def test_what_is_put_into_a_cycle_later_goes():
    loaded = load(linear())
    refs = watched(loaded)
    loaded.later = {"itself": loaded, "too": loaded.extra_repr}
    del loaded
    assert goes(refs, seconds=20)


def test_what_somebody_holds_stays():
    source = nn.Sequential(Net(), Net())
    source[0].parents = [source]
    held = {
        "the model": load(source),
        "a part": load(source)[0],
        "of a dict": load({"a": source})["a"],
        "a dict": load({"a": source}),
        "a method": load(source)[1].act,
    }
    x = torch.randn(3, 64)
    time.sleep(2.5)
    for _ in range(3):
        load(linear())
    expected = source(x)
    for kind, part in held.items():
        model = part["a"] if kind == "a dict" else part
        model = model.parents[0] if kind == "a part" else model
        model = nn.Sequential(nn.Identity()) if kind == "a method" else model
        assert kind == "a method" or torch.equal(model(x), expected), kind
    assert torch.equal(held["a method"].__self__.layer.weight, source[1].layer.weight)


def test_nothing_else_is_collected():
    class Garbage:
        pass

    old = Garbage()
    old.itself, ref = old, weakref.ref(old)
    gc.freeze()
    gc.unfreeze()  # now they are in the oldest generation
    del old
    generations = []

    def note(phase, info):
        generations.append(info["generation"])

    gc.callbacks.append(note)
    try:
        loaded = load(Net())
        refs = watched(loaded)
        del loaded
        assert goes(refs)
    finally:
        gc.callbacks.remove(note)
    assert ref() is not None
    assert set(generations) == {0}


def test_models_in_cycles_as_arguments_leave_the_store():
    @run
    def models():
        import re
        import time

        import ray
        import ray_zerocopy as rzc
        import rays
        import torch
        from ray._private.internal_api import memory_summary
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(16 << 18))
                self.act = self.extra_repr

        @ray.remote
        def step(model):
            return float(model.weight[0])

        def mib(what):
            summary = memory_summary(address=address, stats_only=True)
            found = re.search(rf"{what}\D*(\d+) MiB", summary)
            return int(found[1]) if found else 0

        rays.connect(num_cpus=1, object_store_memory=160 * 2**20)
        address = ray.get_runtime_context().gcs_address
        for _ in range(30):
            ref = rzc.put(Net())
            ray.get(step.remote(ref))
            del ref
        deadline = time.monotonic() + 15
        while mib("Plasma memory usage") and time.monotonic() < deadline:
            time.sleep(0.5)
        assert mib("Plasma memory usage") == 0
        assert mib("Spilled") == mib("filesystem mmap usage") == 0
        ray.shutdown()
