"""Where a block may lie, how long it lives, and which values are refused."""

import gc
import pickle
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from fresh import run
from models import large, simple
from ray_zerocopy.store.envelope import Shared
from torch import nn

# --- inspect --------------------------------------------------------------------------------------


def test_inspect_tells_what_is_stored_and_where(cluster):
    model = large().model
    ref = rzc.put(model)
    info = rzc.inspect(ref)
    used = sum(p.nbytes for p in model.parameters())
    assert info.nbytes - info.padding == used == sum(nbytes for _, nbytes in info.spans)
    assert info.padding < 4096 * (len(info.spans) + 1)
    assert [t.shape for t in info.tensors] == [tuple(p.shape) for p in model.parameters()]
    assert [t.stride for t in info.tensors] == [p.stride() for p in model.parameters()]
    assert info.dtypes == {"float32": len(list(model.parameters()))}
    assert all(offset % 64 == 0 for offset, _ in info.spans)
    assert (info.where, info.held, info.fallback) == ("store", "private", None)
    assert f"{info.nbytes:,}" in str(info)
    assert info.file.startswith("/dev/shm/")


@pytest.mark.parametrize("publish", [rzc.put, lambda model: ray.put(Shared(model))])
def test_inspect_verifies_on_demand(cluster, publish):
    model = simple().model
    ref = publish(model)
    unverified, verified = rzc.inspect(ref), rzc.inspect(ref, verify=True)
    assert (unverified.verified, verified.verified) == (False, True)
    assert len(verified.checksums) == len(verified.spans)
    shared = rzc.get(ref, isolation="shared")
    with torch.no_grad():
        next(shared.parameters()).flatten()[0] += 1
    with pytest.raises(rzc.BlockError, match=r"span 0 \(tensor 0, float32 .* is damaged"):
        rzc.inspect(ref, verify=True)
    rzc.inspect(ref)


def test_inspect_refuses_what_put_did_not_store(cluster):
    with pytest.raises(rzc.NotABlockError, match="list"):
        rzc.inspect(ray.put([1, 2]))


def test_a_used_part_of_a_storage_costs_that_part(cluster):
    flat = torch.randn(1_000_000)
    info = rzc.inspect(rzc.put({"slice": flat[500_000:500_100]}))
    assert info.nbytes < 4096


def test_a_shared_storage_is_laid_out_once(cluster):
    flat = torch.randn(100_000)
    info = rzc.inspect(rzc.put([flat, flat[:10], flat.view(100, 1000).t()]))
    assert len(info.spans) == 1
    assert len(info.tensors) == 3


# --- where a block may lie ------------------------------------------------------------------------


def test_a_store_in_another_directory_is_no_disk():
    def elsewhere():
        import tempfile

        import ray
        import ray_zerocopy as rzc
        import rays
        import torch

        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            rays.connect(num_cpus=1, object_store_memory=2**27, plasma_directory=folder)
            info = rzc.inspect(rzc.put(torch.randn(10, 2**18)))
            assert info.file.startswith(folder)
            assert (info.where, info.held) == ("store", "private")
            ray.shutdown()

    run(elsewhere)


def test_importing_everything_imports_no_face():
    def importing():
        import sys

        exec("from ray_zerocopy import *", names := {})
        assert {"put", "publish"} <= set(names)
        assert not {"ray.serve", "ray.data"} & set(sys.modules)

    run(importing)


# --- how long it lives ----------------------------------------------------------------------------


def test_dropping_the_last_reference_gives_the_store_back(cluster):
    for _ in range(20):  # 1.3 GB through a store of 0.7
        ref = rzc.put(large().model)
        loaded = ray.get(ref)
        assert rzc.inspect(ref).where == "store"
        del ref, loaded


def test_one_tensor_keeps_the_block(cluster):
    weight = ray.get(rzc.put(large().model))[0].weight
    expected = large().model[0].weight
    for i in range(12):
        rzc.put(torch.full((16 * 2**20,), float(i)))
    assert torch.equal(weight, expected)


def test_a_second_store_in_one_process_is_not_mistaken_for_the_first():
    """`put` starts the first Ray if there is none, as `ray.put` does."""

    @run
    def put_twice():
        import ray
        import ray_zerocopy as rzc
        import rays
        import torch

        assert not ray.is_initialized()
        assert torch.equal(rzc.get(rzc.put(torch.ones(2**20))), torch.ones(2**20))
        assert ray.is_initialized()
        ray.shutdown()
        rays.connect(num_cpus=1, object_store_memory=100 * 2**20)
        ref = rzc.put(torch.zeros(2**20))
        assert rzc.inspect(ref).held == "private"
        assert torch.equal(ray.get(ref), torch.zeros(2**20))
        ray.shutdown()


# --- how it is loaded -----------------------------------------------------------------------------


def test_prefault_changes_nothing_but_the_page_table(cluster):
    model = large().model
    ref = rzc.put(model)
    assert_exact(model, rzc.get(ref, prefault=True))
    assert_exact(model, rzc.get(ref, prefault=True, isolation="shared"))


def test_prefault_fills_the_page_table_while_the_caller_goes_on(cluster):
    ref = ray.put(Shared(torch.zeros(16, 2**20)))  # `put` would make its pages huge and unmap them
    first_touched = rzc.get(ref, prefault=False)
    assert resident(first_touched) < first_touched.nbytes / 100
    filled = rzc.get(ref, prefault=True)
    deadline = time.monotonic() + 30
    while resident(filled) < 0.9 * filled.nbytes:  # making pages huge takes some out again
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_dropped_while_prefault_fills_its_pages_is_gone(cluster):
    ref = rzc.put(torch.zeros(16, 2**20))
    for _ in range(100):
        address = rzc.get(ref, prefault=True).data_ptr()
    wait_until_gone(address)


def wait_until_gone(address):
    deadline = time.monotonic() + 30
    while resident_at(address) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def resident(tensor):
    return resident_at(tensor.data_ptr())


def resident_at(address):
    """Bytes in memory of the private file mapping that holds this address; None if none does."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, end = (int(bound, 16) for bound in name.split("-"))
            found = start <= address < end and values[0].endswith("p") and values[3] != "0"
        elif found and name == "Rss:":
            return int(values[0]) * 1024
    return None


def test_another_device_takes_every_tensor_along(cluster):
    flat = torch.randn(10)
    ref = rzc.put({"model": simple().model, "views": [flat[:5], flat[5:]]})
    loaded = rzc.get(ref, device="meta")
    assert all(parameter.is_meta for parameter in loaded["model"].parameters())
    assert all(view.is_meta for view in loaded["views"])


def test_plain_pickle_of_an_envelope_gives_the_object(cluster):
    model = simple().model
    assert_exact(model, pickle.loads(pickle.dumps(rzc.Shared(model))))


# --- what is refused ------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.layers[1].extra = {"deep": [1, held]}


def test_what_does_not_pickle_is_named(cluster):
    path = r"Holder\.layers\.1\.extra\['deep'\]\[1\] \(lock\)"
    with pytest.raises(rzc.PublishError, match=path):
        rzc.put(Holder(threading.Lock()))


def test_a_reference_is_not_put_again(cluster):
    with pytest.raises(TypeError, match="ObjectRef already"):
        rzc.put(ray.put(1))


def test_an_unknown_isolation_is_refused(cluster):
    with pytest.raises(ValueError, match="'private', 'shared' or 'copy', not 'mine'"):
        rzc.get(rzc.put(simple().model), isolation="mine")


def test_ray_client_is_told_what_to_do_instead(cluster):
    def client():
        import pytest
        import ray
        import ray_zerocopy as rzc
        from ray.util.client.server import server
        from rays import free_port

        port = free_port()
        ray.init()
        serving = server.serve("127.0.0.1", port)
        ray.util.connect(f"127.0.0.1:{port}")
        with pytest.raises(rzc.ClientError, match="inside a task or actor"):
            rzc.put([1])
        for asked in (rzc.get, rzc.prefetch, rzc.inspect):
            with pytest.raises(rzc.ClientError):
                asked(None)
        ray.util.disconnect()
        serving.stop(0)
        ray.shutdown()

    run(client, address=cluster)


# --- the cyclic collector -------------------------------------------------------------------------


def test_a_loaded_model_is_old_to_the_collector_and_young_garbage_is_gone(cluster):
    ref = rzc.put(simple().model)
    gc.collect()  # else an automatic collection moves garbage to older generations
    garbage = nn.ReLU()
    garbage.itself = garbage
    alive = weakref.ref(garbage)
    del garbage
    model = rzc.get(ref)
    assert alive() is None
    assert gc.isenabled()
    assert any(old is model for old in gc.get_objects(generation=2))


def _refused(model):
    model.lock = threading.Lock()
    with pytest.raises(rzc.PublishError):
        rzc.put(model)


@pytest.mark.parametrize("publish", [rzc.put, lambda model: ray.put(Shared(model)), _refused])
def test_a_source_goes_with_its_last_name(cluster, publish):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model.array = np.zeros(10_000)  # travels out of band
    alive = [weakref.ref(part) for part in (model, model[0].weight, model[1].running_mean)]
    gc.disable()
    try:
        published = publish(model)
        del model
        assert [part() for part in alive] == [None, None, None]
    finally:
        gc.enable()
    del published


def test_a_loaded_model_goes_with_its_last_name(cluster):
    ref = rzc.put(simple().model)
    gc.disable()
    try:
        for isolation in ("private", "shared", "copy"):
            model = rzc.get(ref, isolation=isolation, prefault=True)
            alive = weakref.ref(model), weakref.ref(next(model.parameters()))
            del model
            assert [part() for part in alive] == [None, None]
    finally:
        gc.enable()


def test_what_someone_froze_stays_frozen(cluster):
    ref = rzc.put(simple().model)
    frozen = []
    gc.freeze()
    try:
        rzc.get(ref)
        assert all(seen is not frozen for seen in gc.get_objects())
    finally:
        gc.unfreeze()
