"""A variant loads exactly as it was put, and stores only the tensors that its bases lack."""

import asyncio
import contextlib
import gc
import os
import time

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from fresh import run
from models import ARCHITECTURES, DIFFICULT, LAYOUTS, simple
from ray_zerocopy import _core
from ray_zerocopy.objects.skeleton import split
from ray_zerocopy.store import envelope
from safetensors.torch import load_file, save_file
from test_invoke import store_usage
from torch import nn
from ways import WAYS, made_by

SOURCES = {
    **{name: lambda factory=factory: factory().model for name, factory in DIFFICULT.items()},
    **{f"layout-{name}": factory for name, factory in LAYOUTS.items()},
    **{f"hf-{name}": lambda f=f: f().model for name, f in ARCHITECTURES.items()},
}


@pytest.fixture(scope="module")
def unrelated(cluster):
    torch.manual_seed(1)
    return rzc.put([simple().model, torch.zeros(99, 32), torch.randn(32), np.zeros(7)])


def change_one(obj):
    """Change a byte of a tensor. Returns whether it has one."""
    for tensor in split(obj).sources.tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
            storage = tensor.untyped_storage()
            at = tensor.storage_offset() * tensor.element_size()
            storage[at] = (storage[at] + 1) % 256
            return True
    return False


@pytest.mark.parametrize("name", SOURCES)
def test_a_variant_is_what_was_put(name, unrelated):
    whole = SOURCES[name]()
    base = rzc.put(whole)
    changed = SOURCES[name]()
    assert_exact(changed, ray.get(rzc.put(changed, base=unrelated)))
    assert_exact(changed, ray.get(rzc.put(changed, base=[unrelated, base])))
    if change_one(changed):
        ref = rzc.put(changed, base=base)
        for way in WAYS:
            with made_by(way):
                assert_exact(changed, ray.get(ref))
        assert_exact(changed, rzc.get(ref, isolation="copy"))
    assert_exact(whole, ray.get(base))


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)), nn.LayerNorm(256))


def with_head(seed=0, trunk=None):
    torch.manual_seed(100 + seed)
    return nn.Sequential(nn.Linear(256, 4), trunk or backbone())


@pytest.fixture
def base(cluster):
    return rzc.put(backbone())


def test_twenty_heads_take_little_more_than_their_backbone(base):
    heads = [with_head(seed) for seed in range(20)]
    refs = [rzc.put(head, base=base) for head in heads]
    whole, own = rzc.inspect(base).nbytes, sum(rzc.inspect(ref).nbytes for ref in refs)
    assert own < 20 * (heads[0][0].weight.nbytes + 4096)
    assert whole + own < 1.2 * whole
    for head, ref in zip(heads, refs, strict=True):
        assert_exact(head, ray.get(ref))
        info = rzc.inspect(ref, verify=True)
        assert info.base_nbytes == sum(tensor.nbytes for tensor in head[1].parameters())
        assert f"{info.base_nbytes:,} bytes of them in its base" in str(info)


def test_a_write_stays_with_its_object(base):
    ref = rzc.put(with_head(), base=base)
    one, other = ray.get(ref), ray.get(ref)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    assert_exact(with_head(), other)
    assert_exact(with_head(), ray.get(ref))
    assert_exact(backbone(), ray.get(base))


def test_storages_that_are_equal_stay_apart(cluster):
    base = rzc.put({"a": torch.zeros(5000), "b": torch.ones(5000)})
    tied = torch.ones(5000)
    source = {"x": torch.zeros(5000), "y": torch.zeros(5000), "z": tied, "part of z": tied[7:]}
    ref = rzc.put(source, base=base)
    assert rzc.inspect(ref).blocks.count(1) == 2
    loaded = ray.get(ref)
    assert_exact(source, loaded)
    loaded["x"][0], loaded["z"][9] = 1, 7
    assert loaded["y"][0] == 0
    assert loaded["part of z"][2] == 7


def test_a_chain_is_resolved_when_it_is_put(base):
    model = backbone()
    last, kept = base, [base]
    for step in range(10):
        model.add_module(f"step {step}", nn.Linear(256, 64))
        last = rzc.put(model, base=last)
        kept.append(last)
    info = rzc.inspect(last)
    assert info.nbytes < 2 * 256 * 64 * 4
    assert sorted(set(info.blocks)) == list(range(11))
    assert_exact(model, ray.get(last))


def settled_usage():
    """MiB in the store, once it has freed what earlier tests have dropped."""
    gc.collect()
    before, now = None, store_usage()
    while before != now:
        time.sleep(1)
        before, now = now, store_usage()
    return now


def test_a_variant_keeps_its_base_and_lets_it_go(cluster):
    trunk, before = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))), settled_usage()
    base = rzc.put(trunk)
    refs = [rzc.put(nn.Sequential(nn.Linear(2048, 2), trunk), base=base) for _ in range(2)]
    del base
    loaded = ray.get(refs.pop())
    assert torch.equal(loaded[1][3].weight, trunk[3].weight)
    refs.clear()
    assert torch.equal(loaded[1][3].weight, trunk[3].weight)
    assert store_usage() >= before + 64
    del loaded
    deadline = time.monotonic() + 60
    while store_usage() > before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Worker:
    def outputs(self, model, x):
        return model(x)

    def put(self):
        return [rzc.put(backbone())]


class Coroutines:
    async def outputs(self, refs, x):
        models = await asyncio.gather(*map(rzc.aio.get, refs))
        return [model(x) for model in models]


def test_a_variant_is_an_argument_of_tasks_and_actors(cluster):
    head, base = with_head(), rzc.put(backbone())
    head = nn.Sequential(head[1], head[0])
    x, ref = torch.randn(3, 256), rzc.put(head, base=base)
    task = ray.remote(num_cpus=0)(lambda model, x: model(x))
    worker = ray.remote(Worker).options(num_cpus=0).remote()
    coroutines = ray.remote(Coroutines).options(num_cpus=0).remote()
    outputs = ray.get([task.remote(ref, x) for _ in range(4)])
    outputs.append(ray.get(worker.outputs.remote(ref, x)))
    outputs += ray.get(coroutines.outputs.remote([ref] * 4, x))
    assert all(torch.equal(output, head(x)) for output in outputs)


def test_a_snapshot_of_a_variant_is_whole(base, tmp_path):
    ref = rzc.put(with_head(), base=base)
    rzc.save(ref, tmp_path / "head.rzc")
    assert_exact(with_head(), rzc.open(tmp_path / "head.rzc"))
    restored = rzc.restore(tmp_path / "head.rzc")
    assert rzc.inspect(restored).base_nbytes == 0
    again = rzc.put(rzc.open(tmp_path / "head.rzc"), base=base)
    assert rzc.inspect(again).base_nbytes > 0
    for each in (restored, again):
        assert_exact(with_head(), ray.get(each))


@pytest.fixture
def published(request, cluster):
    """A version of the backbone, deleted afterwards."""
    version = rzc.publish(request.node.name.replace("[", "-").rstrip("]"), backbone())
    yield version
    if version.name in rzc.published():
        rzc.retire(version.name)


@pytest.mark.parametrize("kind", ["name", "version", "handle", "list"])
def test_a_name_or_a_version_is_a_base(published, base, kind):
    given = {
        "name": published.name,
        "version": published,
        "handle": published.handle,
        "list": [base, published.name],
    }
    ref = rzc.put(with_head(), base=given[kind])
    assert rzc.inspect(ref).base_nbytes == sum(each.nbytes for each in backbone().parameters())
    rzc.retire(published.name)
    assert_exact(with_head(), ray.get(ref))
    if kind != "list":
        with pytest.raises(rzc.UnknownVersionError):
            rzc.put(with_head(), base=given[kind])


@pytest.mark.parametrize("cast", [False, True])
def test_build_stores_a_variant(base, cast):
    """With tensors in memory of their own, or in shared memory, as after a cast."""

    def make(seed):
        return with_head(seed).to(torch.float64).to(torch.float32) if cast else with_head(seed)

    ref = rzc.build(make, 3, base=base)
    assert rzc.inspect(ref, verify=True).base_nbytes == sum(
        each.nbytes for each in backbone().parameters()
    )
    assert rzc.inspect(ref).nbytes < 10_000
    assert_exact(with_head(3), ray.get(ref))


def test_build_takes_no_base_from_a_loader_that_has_one(base):
    def make(base):
        return {"base": base, "weight": torch.ones(5)}

    with pytest.raises(TypeError, match=r"base belongs to build, .*lambda"):
        rzc.build(make, base=base)
    assert ray.get(rzc.build(lambda: make(base=7), base=base))["base"] == 7
    assert ray.get(rzc.build(make, 7))["base"] == 7


@pytest.mark.parametrize("place", ["file", "url"])
def test_a_snapshot_is_restored_as_a_variant(base, published, tmp_path, place):
    path = str(tmp_path / "head.rzc") if place == "file" else "memory://variants/head.rzc"
    rzc.save(with_head(), path)
    for given in (base, published.name):
        ref = rzc.restore(path, base=given)
        info = rzc.inspect(ref, verify=True)
        assert info.base_nbytes == sum(each.nbytes for each in backbone().parameters())
        assert info.nbytes < 10_000
        assert_exact(with_head(), ray.get(ref))
    unlike = rzc.put(torch.randn(9))
    assert rzc.inspect(rzc.restore(path, base=unlike)).base_nbytes == 0


def test_a_damaged_snapshot_is_no_variant(base, tmp_path):
    rzc.save(with_head(), tmp_path / "head.rzc")
    with open(tmp_path / "head.rzc", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(rzc.BlockError, match=r"head\.rzc"):
        rzc.restore(tmp_path / "head.rzc", base=base)


def test_call_model_runs_a_variant(base):
    head = nn.Sequential(backbone(), nn.Linear(256, 4)).eval()
    ref, x = rzc.put(head, base=base), torch.randn(3, 256)
    assert rzc.inspect(ref).base_nbytes > 0
    with torch.no_grad():
        assert torch.equal(ray.get(rzc.call_model.remote(ref, (x,))), head(x))


@pytest.mark.parametrize("kind", ["script", "trace", "exported"])
def test_a_program_is_a_variant_of_the_model_that_it_was_made_of(base, kind):
    model, x = nn.Sequential(backbone(), nn.Linear(256, 4)).eval(), torch.randn(3, 256)
    if kind == "exported":
        program = torch.export.export(model, (x,))
    else:
        program = torch.jit.script(model) if kind == "script" else torch.jit.trace(model, x)
    ref = rzc.put(program, base=base)
    assert rzc.inspect(ref, verify=True).base_nbytes == sum(
        each.nbytes for each in backbone().parameters()
    )
    loaded = ray.get(ref)
    run = loaded.module() if kind == "exported" else loaded
    with torch.no_grad():
        assert torch.equal(run(x), model(x))


def test_arrays_are_variants_of_arrays_and_of_tensors(base):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.random((300, 40)),
        "y": rng.integers(0, 9, 5000),
        "z": rng.random(3000) > 0.5,
    }
    first = rzc.put(arrays)
    changed = {**arrays, "y": arrays["y"] + 1}
    changed["transposed"] = changed["x"].T
    ref = rzc.put(changed, base=first)
    assert rzc.inspect(ref, verify=True).base_nbytes == arrays["x"].nbytes + arrays["z"].nbytes
    loaded = ray.get(ref)
    assert_exact(changed, loaded)
    loaded["x"][0, 0] = 7
    assert loaded["transposed"][0, 0] == 7
    assert_exact(changed, ray.get(ref))
    weights = {name: value.numpy() for name, value in backbone().state_dict().items()}
    ref = rzc.put(weights, base=base)
    assert rzc.inspect(ref).nbytes < 10_000
    assert_exact(weights, ray.get(ref))


def test_what_finds_little_has_no_base(cluster):
    base = rzc.put({"one": torch.ones(10), "other": torch.randn(1000)})
    info = rzc.inspect(rzc.put([torch.ones(10), torch.randn(5000)], base=base))
    assert (info.base_nbytes, info.blocks) == (0, [])


def test_a_base_that_is_gone_is_told(cluster):
    worker = ray.remote(Worker).options(num_cpus=0).remote()
    (base,) = ray.get(worker.put.remote())
    ref = rzc.put(with_head(), base=base)
    held = [ray.get(ref)]
    ray.kill(worker)
    assert_exact(with_head(), held.pop())  # the variant keeps the base in the store
    deadline = time.monotonic() + 60
    with contextlib.suppress(rzc.BaseLostError):
        while time.monotonic() < deadline:
            rzc.get(ref)
    with pytest.raises(rzc.BaseLostError, match="put it again"):
        rzc.get(ref)
    with pytest.raises(rzc.BaseLostError, match="put it again"):
        rzc.put(with_head(), base=base)


def until_lost(base):
    deadline = time.monotonic() + 60
    with contextlib.suppress(ray.exceptions.OwnerDiedError, ray.exceptions.ObjectLostError):
        while time.monotonic() < deadline:
            rzc.get(base)
            gc.collect()
            time.sleep(0.1)
        pytest.fail("the base is still there")


def test_a_base_is_lost_during_a_load_and_after_it(cluster, monkeypatch):
    worker = ray.remote(Worker).options(num_cpus=0).remote()
    (base,) = ray.get(worker.put.remote())
    ref = rzc.put(with_head(), base=base)

    def killed_before(refs, timeout=None):
        monkeypatch.undo()
        ray.kill(worker)
        until_lost(base)
        return fetch(refs, timeout)

    fetch = envelope.fetch
    monkeypatch.setattr(envelope, "fetch", killed_before)  # the own block is mapped
    with pytest.raises(rzc.BaseLostError, match="put it again"):
        rzc.get(ref)

    worker = ray.remote(Worker).options(num_cpus=0).remote()
    loaded = rzc.get(rzc.put(with_head(), base=ray.get(worker.put.remote())))
    ray.kill(worker)
    filling = [rzc.put(torch.zeros(2**22)) for _ in range(8)]  # over memory that is free
    assert_exact(with_head(), loaded)
    del filling


def test_a_base_whose_making_fails_is_gone(cluster):
    @ray.remote(max_retries=0)
    def fail():
        raise OSError("the hub is down")

    with pytest.raises(rzc.BaseLostError, match="RayTaskError"):
        rzc.put(with_head(), base=fail.remote())


def test_the_timeout_of_a_load_is_also_for_its_bases(base, monkeypatch):
    def late(refs, timeout=None):
        given.append(timeout)
        raise ray.exceptions.GetTimeoutError

    given, ref = [], rzc.put(with_head(), base=base)
    monkeypatch.setattr(envelope, "fetch", late)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        rzc.get(ref, timeout=5)
    assert 0 < given[0] <= 5


def test_a_base_that_cannot_be_rebuilt_is_told_by_name(published, cluster):
    variant = rzc.publish(f"{published.name}/head", with_head(), base=published)
    assert rzc.inspect(variant.ref).base_nbytes > 0
    assert (published.heals, variant.heals) == (False, False)
    rzc.retire(variant.name)


def test_a_file_that_shrank_is_an_error(cluster, tmp_path):
    """An error, not a SIGBUS as from a comparison with the mapping."""
    path, weights = tmp_path / "weights", torch.randn(2**20)
    save_file({"weights": weights, "more": weights + 1}, path)
    base = rzc.put({"weights": weights, "more": weights + 1})
    mapped = load_file(path)
    assert rzc.inspect(rzc.put(mapped, base=base)).base_nbytes == 2 * weights.nbytes
    mapped["more"][5] = 7  # makes a private copy of a page, between pages of the file
    ref = rzc.put(mapped, base=base)
    assert rzc.inspect(ref).base_nbytes == weights.nbytes
    assert_exact(mapped, ray.get(ref))
    os.truncate(path, 10_000)
    with pytest.raises(rzc.PublishError, match="cannot be read: it has 10000 bytes now"):
        rzc.put(mapped, base=base)


def test_a_node_that_has_only_the_base_fetches_the_variant_and_another_both():
    @run
    def on_three_nodes():
        import ray
        import ray_zerocopy as rzc
        import torch
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=small)
        for name in ("one", "other"):
            cluster.add_node(resources={name: 1}, **small)
        ray.init(cluster.address)
        trunk = torch.arange(2**22, dtype=torch.float32)
        base = rzc.put(trunk)
        total = ray.remote(lambda weights: float(weights.double().sum()))
        expected = float(trunk.double().sum())
        assert ray.get(total.options(resources={"one": 1}).remote(base)) == expected
        ref = rzc.put({"trunk": trunk, "head": torch.ones(9)}, base=base)
        assert rzc.inspect(ref).nbytes < 10_000
        del base
        read = ray.remote(lambda model: float(model["trunk"].double().sum() + model["head"].sum()))
        for name in ("one", "other"):
            assert ray.get(read.options(resources={name: 1}).remote(ref)) == expected + 9
        ray.shutdown()
        cluster.shutdown()


def test_prefetch_sends_the_bases_too():
    @run
    def on_three_nodes():
        import ray
        import ray_zerocopy as rzc
        import torch
        from ray.cluster_utils import Cluster
        from ray_zerocopy.store.ray_inside import located

        small = {"num_cpus": 1, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=small)
        nodes = [cluster.add_node(**small).node_id for _ in range(2)]
        ray.init(cluster.address)
        here = ray.get_runtime_context().get_node_id()
        trunk, more = torch.arange(2**21, dtype=torch.float32), torch.rand(2**20)
        base = rzc.put(trunk)
        for head in (torch.ones(9), torch.ones(2**20)):  # one travels in a message
            chain = rzc.put({"trunk": trunk, "more": more, "head": head}, base=base)
            ref = rzc.put({"head": head + 1, "trunk": trunk, "more": more}, base=chain)
            assert set(rzc.inspect(ref).blocks) == {0, 1, 2}
            assert rzc.prefetch(ref, nodes[:1])[nodes[0]] is not None
            for each in (base, chain):
                assert set(located(each)[0]) >= {here, nodes[0]}
        assert rzc.prefetch(ref).keys() == {here, *nodes}
        for each in (base, chain, ref):
            assert set(located(each)[0]) == {here, *nodes}
        assert set(rzc.prefetch(ref).values()) == {0.0}
        ray.shutdown()
        cluster.shutdown()


def test_what_is_no_base_is_refused(cluster, base):
    with pytest.raises(rzc.NotABlockError, match="holds a dict"):
        rzc.put(with_head(), base=ray.put({}))
    with pytest.raises(TypeError, match="an ObjectRef from put"):
        rzc.put(with_head(), base=backbone())


def of_one_block(obj):
    """Table and block of an object."""
    _, (head, *segments) = rzc.Shared(obj).__reduce_ex__(5)
    return head["table"], [bytes(segment) for segment in segments]


def test_another_base_is_refused():
    """It has the same table but other bytes, so another header."""
    (table, meant), (_, other) = (of_one_block(torch.full((9,), value)) for value in (1.0, 2.0))
    _core.Block(table, meant, "copy", variant=(meant[0][:64], table))
    with pytest.raises(rzc.BlockError, match="another block than the variant was stored with"):
        _core.Block(table, other, "copy", variant=(meant[0][:64], table))


def test_views_beyond_the_base_are_refused():
    small, large = (of_one_block(torch.zeros(count)) for count in (9, 10))
    with pytest.raises(rzc.BlockError, match="view ends at byte 40, its span has 36"):
        _core.Block(small[0], small[1], "copy", variant=(small[1][0][:64], large[0]))


@pytest.mark.parametrize("numbers", [[0, 0], [0, 2], [1], []])
def test_numbers_that_nobody_gave_are_refused(numbers):
    block = _core.Block(*of_one_block([torch.zeros(9), torch.ones(9)]), "copy")
    with pytest.raises(rzc.BlockError, match="the list of tensor numbers"):
        _core.Gather.of_blocks([(block, numbers)])
