"""Room in Ray's store: the part of an object that Ray writes, and our part."""

import pytest
import ray
import ray_zerocopy as rzc
import torch
from ray_zerocopy.store import envelope, ray_inside


def test_room_is_the_objects_own_memory_and_can_be_written(cluster):
    ref, loaded, memory, _ = ray_inside.put({"what": "Ray writes"}, lambda: 1_000_000)
    assert loaded == {"what": "Ray writes"}
    assert memory.nbytes >= 1_000_000
    assert not memory.readonly
    memory[-1_000_000:] = bytes([7]) * 1_000_000
    assert ray.get(ref) == {"what": "Ray writes"}
    assert ray_inside.way == "room"


def test_references_inside_stay_alive(cluster):
    ref = rzc.put([ray.put(torch.arange(3)), torch.ones(100_000)])
    inner, _ = ray.get(ref)
    assert ray.get(inner).tolist() == [0, 1, 2]


def test_what_was_never_written_is_refused(cluster):
    """Like a Ray that moves the object to disk just before the write."""
    anchored = envelope.Anchored(torch.ones(100_000))
    with envelope.reading(envelope.anchor):
        ref, anchor, *_ = ray_inside.put(anchored, lambda: anchored.block.nbytes)
    assert not any(memoryview(anchor)[:4])
    with pytest.raises(rzc.BlockError):
        rzc.get(ref)


@pytest.mark.parametrize("internals", ["put_object", "readonly", "size"])
def test_without_room_ray_writes_the_block(cluster, monkeypatch, internals):
    """A Ray whose private parts are unknown: the same block, put more slowly."""
    core = ray._private.worker.global_worker.core_worker

    class OtherCore:
        def __getattr__(self, name):
            if internals == "put_object" and name.startswith("put_"):
                raise AttributeError(f"no attribute {name}")
            return getattr(core, name)

        def get_objects(self, refs, timeout):
            ((found, *rest),) = core.get_objects(refs, timeout)
            memory = memoryview(found)
            return [(memory.toreadonly() if internals == "readonly" else memory[:-64], *rest)]

    class OtherWorker:
        core_worker = OtherCore()

        def __getattr__(self, name):
            return getattr(ray._private.worker.global_worker, name)

    class OtherModule:
        global_worker = OtherWorker()

    model = {"weight": torch.randn(1000, 100), "bias": torch.randn(10)}
    with monkeypatch.context() as patched:
        patched.setattr(ray_inside, "worker", OtherModule)
        patched.setattr(ray_inside, "way", "room")
        assert ray_inside.put(model, lambda: 64) is None
        ref = rzc.put(model)
        ways = rzc.inspect(ref).ways
    assert ways["put"] == ("ray.put" if internals == "put_object" else "room")
    loaded = ray.get(ref)
    assert all(torch.equal(loaded[name], model[name]) for name in model)
    assert (rzc.inspect(ref).where, rzc.inspect(ref).held) == ("store", "private")
