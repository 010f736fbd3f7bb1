"""No process sees another's writes to its weights: neither now nor in a later load.

Tested for each way to make views. The same test with `isolation="shared"` has the opposite result,
which shows that it tests something.
"""

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import describe
from torch import nn
from ways import made_by


def write_in_place(model):
    with torch.no_grad():
        model.linear.weight.add_(1)


def write_a_buffer(model):
    model.cache[3] = 7


def run_batch_norm(model):
    model.norm(torch.randn(8, 16))


def renormalise_an_embedding(model):
    with torch.no_grad():
        model.embedding(torch.arange(4))


def take_an_optimizer_step(model):
    model.linear(torch.ones(2, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def write_through_numpy(model):
    model.cache.numpy()[:] = 7


def write_a_numpy_attribute(model):
    model.table[:] = 7


WRITES = {
    write.__name__: write
    for write in (
        *(write_in_place, write_a_buffer, run_batch_norm, renormalise_an_embedding),
        *(take_an_optimizer_step, write_through_numpy, write_a_numpy_attribute),
    )
}


class Model(nn.Module):
    """Weights larger than Ray's inline limit, and every way to change them as a side effect."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 4096), nn.BatchNorm1d(16)
        self.embedding = nn.Embedding(1024, 64, max_norm=0.5)
        self.register_buffer("cache", torch.zeros(1024))
        self.table = np.zeros(10_000)


class Worker:
    def load(self, refs, isolation, way):
        with made_by(way):
            self.model = rzc.get(refs[0], isolation=isolation)

    def write(self, kind):
        before = describe(self.model)
        WRITES[kind](self.model)
        return describe(self.model) != before

    def see(self):
        return describe(self.model)

    def see_anew(self, refs):
        return describe(ray.get(refs[0]))


@pytest.fixture(scope="module")
def workers(start):
    return start(Worker, 2)


def write_is_visible(workers, isolation, kind, way) -> bool:
    """Whether a write in one worker shows in another, in the driver, or in a later load in any."""
    torch.manual_seed(0)
    source = Model()
    ref, writer, other = rzc.put(source), *workers
    ray.get([worker.load.remote([ref], isolation, way) for worker in workers])
    driver = rzc.get(ref, isolation=isolation)

    assert ray.get(writer.write.remote(kind)), "the write did nothing"

    seen = [describe(driver), describe(ray.get(ref))]
    seen += ray.get([other.see.remote(), *(w.see_anew.remote([ref]) for w in workers)])
    return any(view != describe(source) for view in seen)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("isolation", ["private", "copy"])
def test_a_write_is_invisible_to_all_others(workers, isolation, kind, way):
    assert not write_is_visible(workers, isolation, kind, way)


@pytest.mark.parametrize("kind", [kind for kind in WRITES if kind != "write_a_numpy_attribute"])
def test_a_write_to_shared_pages_is_visible(workers, kind, way):
    assert write_is_visible(workers, "shared", kind, way)


def test_numpy_refuses_a_write_to_shared_pages(cluster):
    with pytest.raises(ValueError, match="read-only"):
        write_a_numpy_attribute(rzc.get(rzc.put(Model()), isolation="shared"))


def test_ray_get_isolates_by_default(way, cluster):
    ref = rzc.put(Model())
    expected = describe(ray.get(ref))
    write_in_place(ray.get(ref))
    assert describe(ray.get(ref)) == expected


@pytest.mark.parametrize("isolation", ["private", "copy"])
def test_two_loads_in_one_process_are_isolated(cluster, isolation, way):
    ref = rzc.put(Model())
    one, other = rzc.get(ref, isolation=isolation), rzc.get(ref, isolation=isolation)
    expected = describe(other)
    write_in_place(one)
    assert describe(other) == expected


def test_the_source_is_isolated_from_what_is_loaded(way, cluster):
    source = Model()
    expected = describe(source)
    write_in_place(rzc.get(rzc.put(source), isolation="shared"))
    assert describe(source) == expected


def test_what_is_written_first_by_the_source_stays_out(cluster):
    source = Model()
    ref, expected = rzc.put(source), describe(source)
    write_in_place(source)
    assert describe(ray.get(ref)) == expected
