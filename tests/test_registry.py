"""A name always refers to one whole version, whoever publishes, promotes or loads it."""

import asyncio
import gc
import os
import pickle
import random
import re
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from fresh import execute, run
from models import DIFFICULT, large, simple
from ray._private.internal_api import memory_summary
from ray_zerocopy.registry import catalog, client, follower, owner, publication
from ray_zerocopy.registry.records import Plan
from ray_zerocopy.store import envelope, ray_inside, references, snapshot
from ray_zerocopy.store.envelope import Parts, in_place, reading
from torch import nn


def filled(value, size=64):
    """A model whose every weight is its version's number."""
    model = nn.Linear(size, size)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(value))
    return model


def value_of(model):
    """The value of all weights. Fails if they differ."""
    (value,) = {value for p in model.parameters() for value in p.unique().tolist()}
    return int(value)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.02)


@pytest.fixture
def name(request, cluster):
    """A name for one test, deleted afterwards."""
    name = request.node.name.replace("[", "-").rstrip("]")
    yield name
    if name in rzc.published():
        rzc.retire(name)


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["simple", "tied_weights", "channels_last", "pipeline"])
def test_an_object_has_one_digest_wherever_it_lies(kind, cluster):
    """Taken from memory, from the object of `put`, and from Ray's copy of that."""
    model = simple().model if kind == "simple" else DIFFICULT[kind]().model

    def parts_of(ref):
        with reading(in_place):
            return ray.get(ref)

    stored = parts_of(rzc.put(model))
    copied = parts_of(ray.put(stored))
    assert Parts.of(model).digest() == stored.digest() == copied.digest()
    assert_exact(model, ray.get(ray.put(stored)))
    assert_exact(model, ray.get(ray.put(Parts.of(model))))


# --- publish and load -----------------------------------------------------------------------------


def test_what_is_published_is_loaded_everywhere(name, start):
    class Reader:
        def load(self, name):
            return rzc.load(name)

    model = large().model
    version = rzc.publish(name, model)
    assert_exact(model, rzc.load(name))
    assert_exact(model, ray.get(start(Reader)[0].load.remote(name)))
    assert_exact(model, ray.get(version.ref))
    assert (version.number, version.state, version.current) == (1, "live", True)
    assert (version.source, version.heals) == ("object", False)
    assert version.nbytes == rzc.inspect(version.ref).nbytes
    assert rzc.versions(name) == [version]
    assert name in rzc.published()
    assert all(p.is_meta for p in rzc.load(name, device="meta").parameters())


def test_a_loaded_model_shares_the_versions_block(name):
    version = rzc.publish(name, large().model)
    info = rzc.inspect(version.ref)
    assert (info.where, info.held) == ("store", "private")


def test_make_runs_in_the_cluster_and_heals(name):
    version = rzc.publish(name, make=lambda: filled(7))
    assert (version.source, version.heals) == ("make", True)
    assert value_of(rzc.load(name)) == 7


def test_make_runs_in_the_arena(name):
    """Tensors that a loader casts are in shared memory from the start, as in `build`."""

    def make():
        weight = torch.ones(5000).to(torch.float16)
        maps = Path("/proc/self/maps").read_text().splitlines()
        arenas = [line for line in maps if "memfd:ray-zerocopy" in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in arenas]
        lies_in_one = any(start <= weight.data_ptr() < end for start, end in spans)
        return {"weight": weight, "lies in one": lies_in_one}

    rzc.publish(name, make=make)
    assert rzc.load(name)["lies in one"]


def test_a_snapshot_is_published_by_its_path_or_on_the_way(name, tmp_path):
    model, path = filled(3), tmp_path / "model.rzc"
    saved = rzc.publish(name, model, snapshot=path)
    assert (saved.source, saved.heals) == ("object", True)
    assert_exact(model, rzc.load(name))
    assert rzc.publish(name, path=path) == saved
    version = rzc.publish(f"{name}/path", path=path)
    assert (version.source, version.heals) == ("path", True)
    assert_exact(model, rzc.load(f"{name}/path"))
    rzc.retire(f"{name}/path")
    with pytest.raises(rzc.CatalogError, match="nothing there"):
        rzc.publish(name, path=tmp_path / "nothing there")
    for wrong in ({}, {"obj": 1, "path": path}, {"path": path, "snapshot": path}):
        with pytest.raises(TypeError):
            rzc.publish(name, **wrong)


def test_a_snapshot_that_is_not_renamed_stays_where_it_is(name, tmp_path, monkeypatch):
    with pytest.raises(rzc.SaveError, match="is a folder"):
        rzc.publish(name, filled(1), snapshot=tmp_path)
    assert name not in rzc.published()

    def refuse(*_):
        raise rzc.SaveError("no permission")

    monkeypatch.setattr(snapshot, "move", refuse)
    with pytest.warns(rzc.SnapshotWarning, match=r"version 1 of .* is published, and its snapshot"):
        assert rzc.publish(name, filled(1), snapshot=tmp_path / "model.rzc").heals
    (there,) = tmp_path.iterdir()
    assert value_of(rzc.open(there)) == 1


def test_what_is_current_is_not_stored_again(name):
    model = filled(1)
    first = rzc.publish(name, model)
    assert rzc.publish(name, model) == first
    assert rzc.publish(name, make=lambda: rzc.load(name)).number in (1, 3)
    second = rzc.publish(name, make=lambda: filled(2))
    assert rzc.publish(name, make=lambda: filled(2)) == second


def test_what_is_current_heals_once_somebody_says_how(name):
    def make():
        return filled(1)

    first = rzc.publish(name, make())
    assert not first.heals
    same = rzc.publish(name, make=make)
    assert (same.number, same.heals, same.digest) == (first.number, True, first.digest)


def test_objects_are_copied_by_one_process(name):
    """If Ray ended the worker between versions, each version would take seconds of imports."""

    def copiers(owner):
        return {node: copier._actor_id.hex() for node, (copier, _) in owner._copiers.items()}

    seen = []
    for value in range(2):
        rzc.publish(name, filled(value))
        owner = ray.get_actor("owner", catalog.NAMESPACE)
        seen.append(ray.get(owner.__ray_call__.remote(copiers)))
        time.sleep(1.5)
    assert seen[0] == seen[1] != {}


def test_versions_move_forward_and_back(name):
    for value in (1, 2, 3, 4):
        rzc.publish(name, filled(value), keep=3)
    states = {version.number: version.state for version in rzc.versions(name)}
    assert states == {1: "retired", 2: "live", 3: "live", 4: "live"}
    assert rzc.promote(name, 2).current
    assert value_of(rzc.load(name)) == 2
    assert value_of(rzc.load(name, version=4)) == 4
    rzc.retire(name, 3)
    with pytest.raises(rzc.UnknownVersionError, match=r"version 3 of .* is retired"):
        rzc.load(name, version=3)
    with pytest.raises(rzc.UnknownVersionError, match=r"retired.*\[2, 4\]"):
        rzc.promote(name, 3)
    with pytest.raises(rzc.CatalogError, match="promote one of"):
        rzc.retire(name, 2)
    # The last current version stays, however old its number is.
    rzc.publish(name, filled(5), keep=2)
    live = [version.number for version in rzc.versions(name) if version.state == "live"]
    assert live == [2, 5]


def test_a_retired_name_is_free_and_its_numbers_are_not(name):
    rzc.publish(name, filled(1))
    rzc.retire(name)
    assert name not in rzc.published()
    for verb in (rzc.load, rzc.follow, rzc.retire):
        with pytest.raises(rzc.UnknownVersionError, match="nothing is published"):
            verb(name)
    assert rzc.publish(name, filled(1)).number == 2


def test_publishers_at_once_have_distinct_numbers(name):
    with ThreadPoolExecutor(8) as pool:
        published = list(
            pool.map(lambda value: rzc.publish(name, filled(value), keep=99), range(8))
        )
    assert sorted(version.number for version in published) == list(range(1, 9))
    for value, version in enumerate(published):
        assert value_of(rzc.load(name, version=version.number)) == value


@pytest.mark.parametrize("bad", ["", "a b", "ä", "a" * 129, "a\n", None, 3])
def test_a_name_is_plain(bad, cluster):
    for verb in (lambda name: rzc.publish(name, 1), rzc.load, rzc.follow, rzc.versions):
        with pytest.raises(ValueError, match="1 to 128 letters"):
            verb(bad)


def test_what_cannot_be_made_leaves_the_name_alone(name):
    def fails():
        raise OSError("no such checkpoint")

    rzc.publish(name, filled(1))
    held = bytes(2**20)
    for error, make in {
        rzc.CatalogError: fails,
        rzc.PublishError: lambda: len(held),
    }.items():
        with pytest.raises(error, match=r"no such checkpoint|1,048,576 at most"):
            rzc.publish(name, make=make)
    with pytest.raises(rzc.PublishError, match="lock"):
        rzc.publish(name, {"lock": threading.Lock()})
    assert value_of(rzc.load(name)) == 1
    assert [version.number for version in rzc.versions(name)] == [1]


def test_what_holds_nothing_is_refused(name):
    for nothing in ({"make": lambda: None}, {"make": lambda: {"a": 1}}, {"obj": [1]}):
        with pytest.raises(rzc.PublishError, match="nothing to share"):
            rzc.publish(name, **nothing)
    assert rzc.versions(name) == []


def test_what_ends_with_its_job_is_refused(name, tmp_path):
    """A reference or an actor inside would die with the publisher."""

    def held():
        return {"weight": torch.ones(3), "data": ray.put(1)}

    for holding in ({"make": held}, {"obj": held()}, {"obj": rzc.put(held())}):
        with pytest.raises(rzc.PublishError, match=r"holds an ObjectRef or an actor.* end with"):
            rzc.publish(name, **holding)
    with pytest.raises(rzc.PublishError, match=r"\['data'\] \(ObjectRef\)"):
        rzc.publish(name, held(), snapshot=tmp_path / "model")
    assert (rzc.versions(name), list(tmp_path.iterdir())) == ([], [])


def test_what_is_not_whole_is_refused(name, tmp_path):
    """A loader that failed quietly leaves tensors on the meta device."""

    def half():
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))

    for half_made in ({"make": half}, {"obj": half()}):
        with pytest.raises(rzc.PublishError, match=r"Sequential\.1\.weight.* lie on the meta"):
            rzc.publish(name, **half_made)
    with pytest.raises(rzc.PublishError, match="on the meta device"):
        rzc.publish(name, nn.Linear(3, 3, device="meta"), snapshot=tmp_path / "model")
    assert (rzc.versions(name), list(tmp_path.iterdir())) == ([], [])


def test_the_current_version_is_loaded_though_it_was_another_when_first_asked(name, monkeypatch):
    def once(ref, **how):
        monkeypatch.setattr(references, "get", real)
        rzc.publish(name, filled(2), keep=1)
        raise ray.exceptions.GetTimeoutError

    real = references.get
    rzc.publish(name, filled(1))
    monkeypatch.setattr(references, "get", once)
    assert value_of(rzc.load(name)) == 2


def test_a_load_that_met_a_loss_holds_no_reference(name, monkeypatch):
    """Without a garbage collection, which an idle worker never runs."""

    def once(ref, **how):
        monkeypatch.setattr(references, "get", real)
        raise ray.exceptions.WorkerCrashedError

    def noted(*args):
        version = find(*args)
        found.append(weakref.ref(version))
        return version

    real, find, found = references.get, publication.find, []
    rzc.publish(name, filled(1))
    monkeypatch.setattr(references, "get", once)
    monkeypatch.setattr(publication, "find", noted)
    gc.disable()
    try:
        assert value_of(rzc.load(name)) == 1
        assert [each() for each in found] == [None, None]
    finally:
        gc.enable()


def test_a_block_that_arrives_slowly_is_waited_for(name, monkeypatch):
    """Ray begins to copy it anew for each `ray.get`."""

    def get(ref, *, timeout):
        given.append(timeout)
        if timeout < 0.3:
            raise ray.exceptions.GetTimeoutError
        return real(ref, timeout=timeout)

    real, given = references.get, []
    rzc.publish(name, filled(1))
    monkeypatch.setattr(publication, "_SLICE_S", 0.05)
    monkeypatch.setattr(references, "get", get)
    assert value_of(rzc.load(name)) == 1
    assert given == pytest.approx([0.05, 0.2, 0.8])
    given.clear()
    monkeypatch.setattr(publication, "_SENT_A_SECOND", 10_000)  # a slice lasts as its bytes need
    assert value_of(rzc.load(name)) == 1
    assert given[0] > 1


def test_a_slow_write_holds_up_nobody_else(name):
    """While the GCS is slow, the catalog answers other requests."""

    def slow(self, name):
        kept, put = self._manifest._kept, self._manifest._kept.put

        def put_slowly(key, value):
            if key == name.encode():
                time.sleep(3)
            put(key, value)

        kept.put = put_slowly

    def undo(self):
        del self._manifest._kept.put

    rzc.publish(name, filled(1))
    handle = client.catalog()
    ray.get(handle.__ray_call__.remote(slow, name))
    with ThreadPoolExecutor() as pool:
        publishing = pool.submit(rzc.publish, name, filled(2))
        answers = 0
        while not publishing.done():
            answers += [v.number for v in rzc.versions(name) if v.state == "live"] == [1]
    assert answers > 1
    ray.get(handle.__ray_call__.remote(undo))
    assert publishing.result().number == 2


def test_an_object_is_written_once_where_the_owner_has_room(name, monkeypatch):
    """The publisher writes the block, and nobody copies it: it is never in the store twice."""

    def counted(*args):
        (written,) = [write(*args)]
        writes.append(written)
        return written

    write, writes = references.write, []
    monkeypatch.setattr(references, "write", counted)
    monkeypatch.setattr(references, "put", None)
    model = large().model
    version = rzc.publish(name, model)
    assert version.digest == writes[0].digest()
    assert len(writes) == 1
    assert_exact(model, rzc.load(name))
    assert rzc.inspect(version.ref, verify=True).nbytes == version.nbytes


def test_a_variant_is_published_over_its_base(name):
    trunk = [nn.Linear(512, 512) for _ in range(4)]
    heads = [nn.Sequential(*trunk, nn.Linear(512, classes)) for classes in (2, 400)]
    base = rzc.publish(f"{name}/base", nn.Sequential(*trunk))
    for head, given in zip(heads, (f"{name}/base", [base]), strict=True):
        version = rzc.publish(name, head, base=given)
        assert not version.heals
        assert rzc.inspect(version.ref).base_nbytes == sum(
            parameter.nbytes for layer in trunk for parameter in layer.parameters()
        )
        assert_exact(head, rzc.load(name))
        assert rzc.publish(name, head).number == version.number, "it has the digest of the whole"
    rzc.retire(f"{name}/base")
    assert_exact(heads[1], rzc.load(name))
    assert_exact(heads[0], rzc.load(name, version=1))


# --- the next version shares with the current one -------------------------------------------------


@pytest.fixture
def sharing(monkeypatch):
    """Small models share, too."""
    monkeypatch.setattr(publication, "_SHARED_NBYTES", 0)


def layers(count=8, size=256):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))


def change(model, *which):
    with torch.no_grad():
        for layer in which:
            model[layer].weight.add_(1)


def shared_nbytes(version):
    return rzc.inspect(version.ref, verify=True).base_nbytes


def test_the_next_version_stores_what_differs(name, sharing):
    model = layers()
    whole = rzc.publish(name, model)
    change(model, 2, 5)
    version = rzc.publish(name, model)
    assert version.nbytes < 0.3 * whole.nbytes
    assert version.digest == Parts.of(model).digest()
    assert_exact(model, rzc.load(name))
    assert_exact(layers(), rzc.load(name, version=1))
    change(model, 2, 3)  # layers of one size, of which another block has some
    third = rzc.publish(name, model)
    assert shared_nbytes(third) == 5 * 256 * 257 * 4 + 3 * 256 * 4
    assert [v.state for v in rzc.versions(name)] == ["retired", "live", "live"]
    assert_exact(model, rzc.load(name))
    assert rzc.publish(name, model).number == 3, "it is the same"


@pytest.mark.parametrize("how", ["all-differs", "little-is-the-same", "keep-1", "none", "small"])
def test_the_next_version_is_stored_whole_where_that_is_better(name, request, how):
    if how != "small":
        request.getfixturevalue("sharing")
    model = layers()
    rzc.publish(name, model)
    change(model, *{"all-differs": range(8), "little-is-the-same": range(7)}.get(how, [0]))
    more = {"keep-1": {"keep": 1}, "none": {"base": None}}.get(how, {})
    version = rzc.publish(name, model, **more)
    assert version.number == 2
    assert shared_nbytes(version) == 0
    assert_exact(model, rzc.load(name))


def test_a_chain_of_versions_takes_few_blocks(name, sharing):
    """However long: a load maps four at most, and each base has at least half of it in use."""
    model = layers(count=20, size=64)
    for step in range(20):
        change(model, step, (7 * step + 3) % 20)
        version = rzc.publish(name, model)
        info = rzc.inspect(version.ref, verify=True)
        assert len(set(info.blocks)) <= 4
        assert_exact(model, rzc.load(name))
    assert version.number == 20


def test_a_current_version_that_does_not_answer_is_not_shared(name, sharing, monkeypatch):
    model = layers()
    rzc.publish(name, model)
    change(model, 1)

    def lost(refs, timeout=None):
        raise rzc.BaseLostError("it is gone")

    monkeypatch.setattr(envelope, "fetch", lost)
    version = rzc.publish(name, model)
    monkeypatch.undo()
    assert shared_nbytes(version) == 0
    assert_exact(model, rzc.load(name))


def test_a_retired_base_is_listed_while_variants_hold_it(name, sharing):
    model = layers()
    base = rzc.publish(f"{name}/base", model)
    rzc.publish(name, nn.Sequential(*model, nn.Linear(256, 2)), base=base)
    assert [v.variants for v in rzc.versions(base.name)] == [1]
    rzc.retire(base.name)
    (held,) = rzc.versions(base.name)
    assert (held.state, held.variants, held.nbytes) == ("retired", 1, base.nbytes)
    with pytest.raises(rzc.UnknownVersionError):
        rzc.load(base.name)
    kill_catalog()
    assert [v.variants for v in rzc.versions(base.name)] == [1]
    rzc.retire(name)
    assert [v.variants for v in rzc.versions(base.name)] == [0]


def test_a_base_is_listed_however_many_versions_were_retired_since(name, sharing):
    model = layers()
    for _ in range(20):
        change(model, 0)
        rzc.publish(name, model)
    numbers = {v.number: v for v in rzc.versions(name)}
    assert (numbers[1].state, numbers[1].variants) == ("retired", 2)
    assert 2 not in numbers
    rzc.retire(name)
    assert not any(v.variants for v in rzc.versions(name))


def test_a_base_is_retired_in_the_middle_of_a_publication(name, monkeypatch):
    model = layers()
    base = rzc.publish(f"{name}/base", model)

    def retiring(*args):
        rzc.retire(f"{name}/base")
        gc.collect()
        return write(*args)

    write = references.write
    monkeypatch.setattr(references, "write", retiring)
    variant = nn.Sequential(*model, nn.Linear(256, 2))
    version = rzc.publish(name, variant, base=base.handle)
    del base
    assert shared_nbytes(version) == 8 * 256 * 257 * 4
    assert_exact(variant, rzc.load(name))


def kill_catalog():
    handle = ray.get_actor("catalog", catalog.NAMESPACE)
    os.kill(ray.get(handle.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


@pytest.mark.parametrize("source", ["make", "path", "snapshot"])
def test_a_variant_that_heals(name, tmp_path, source):
    def make():
        torch.manual_seed(0)
        trunk = [nn.Linear(256, 256) for _ in range(8)]
        return nn.Sequential(*trunk, nn.Linear(256, 2))

    base, variant = rzc.publish(f"{name}/base", layers()), make()
    rzc.save(variant, tmp_path / "saved.rzc")
    how = {
        "make": {"make": make},
        "path": {"path": tmp_path / "saved.rzc"},
        "snapshot": {"obj": variant, "snapshot": tmp_path / "snapshot.rzc"},
    }
    version = rzc.publish(name, base=base.name, **how[source])
    assert version.heals
    assert shared_nbytes(version) == 8 * 256 * 257 * 4
    assert version.digest == Parts.of(variant).digest()
    assert [v.variants for v in rzc.versions(base.name)] == [1]
    assert_exact(variant, rzc.load(name))
    rzc.retire(base.name)
    assert_exact(variant, rzc.load(name))


def test_a_base_is_published(name):
    ref = rzc.put(filled(1))
    with pytest.raises(TypeError, match="base is not for a reference"):
        rzc.publish(name, ref, base="bert")
    with pytest.raises(TypeError, match="base must be published"):
        rzc.publish(name, filled(1), base=[ref])
    for given in ({"obj": filled(1)}, {"make": dict}):
        with pytest.raises(rzc.UnknownVersionError):
            rzc.publish(name, base=f"{name}/nobody", **given)


@pytest.mark.parametrize("obstacle", ["another-Ray", "other-memory", "spilled"])
def test_without_room_an_object_is_copied(name, monkeypatch, obstacle):
    model = large().model
    digest = Parts.of(model).digest()
    if obstacle == "another-Ray":
        monkeypatch.setattr(ray_inside, "way", "ray.put")
    elif obstacle == "other-memory":
        monkeypatch.setattr(ray_inside, "room_in", lambda *args: None)
    else:
        monkeypatch.setattr(ray_inside, "is_spilled", lambda ref: True)
    version = rzc.publish(name, model)
    assert version.digest == digest
    assert_exact(model, rzc.load(name))
    assert [v.state for v in rzc.versions(name)] == ["live"]


def test_an_owner_that_is_killed_before_the_object_is_written_has_it_written_again(
    name, monkeypatch
):
    def killed_before(*args):
        monkeypatch.setattr(references, "write", write)
        owner = ray.get_actor("owner", catalog.NAMESPACE)
        os.kill(ray.get(owner.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        time.sleep(1)  # until that is noticed
        return write(*args)

    write = references.write
    monkeypatch.setattr(references, "write", killed_before)
    model = large().model
    assert rzc.publish(name, model).number == 1
    assert_exact(model, rzc.load(name))


def test_a_room_that_is_dropped_while_it_is_written_is_made_and_written_again(name, monkeypatch):
    """Else the version would be live, and nobody would hold its block."""

    def dropped_after(shared, ref, nbytes):
        monkeypatch.setattr(references, "write", write)
        parts = write(shared, ref, nbytes)
        (token,) = (token for token, room in held().items() if room == ref)
        assert client.ask("abandon", name, token)
        return parts

    def held():
        return ray.get(client.owner().held.remote())[1]

    write = references.write
    monkeypatch.setattr(references, "write", dropped_after)
    model = large().model
    version = rzc.publish(name, model)
    assert version.number == 1
    assert version.ref in held().values()
    assert_exact(model, rzc.load(name))


def test_a_version_that_was_forgotten_is_not_made_again(name):
    """Ray would, for a reference that is still held: `make` may give another model by now."""
    rzc.publish(name, filled(1))
    plan = Plan("make", ray.get_runtime_context().get_node_id(), b"not called")
    with pytest.raises(rzc.LostVersionError, match="retired long ago is lost"):
        owner._build._function("a token", name, plan, None, [], client.owner())


def test_memory_comes_back(name):
    def used():
        gc.collect()
        resources = ray.available_resources()
        return ray.cluster_resources()["object_store_memory"] - resources["object_store_memory"]

    before, size = used(), 2500  # 25 MB a version
    rzc.publish(name, filled(1, size))
    held = rzc.load(name)
    for value in range(2, 6):
        rzc.publish(name, filled(value, size), keep=1)
    assert value_of(held) == 1
    rzc.retire(name)
    del held
    until(lambda: used() < before + 25_000_000)


# --- follow ---------------------------------------------------------------------------------------


def test_live_changes_between_calls(name):
    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    kept = live()
    assert live() is kept
    rzc.publish(name, filled(2))
    until(lambda: value_of(live()) == 2)
    assert live.version.number == 2
    assert value_of(kept) == 1
    rzc.promote(name, 1)
    until(lambda: value_of(live()) == 1)
    rzc.retire(name)
    assert value_of(live()) == 1


def test_live_asks_nobody_while_nothing_changes(name, monkeypatch):
    rzc.publish(name, filled(1))
    live = rzc.follow(name)

    def asked(*args):
        raise AssertionError("a message")

    monkeypatch.setattr(client, "ask", asked)
    monkeypatch.setattr(ray, "get", asked)
    assert len({id(live()) for _ in range(1000)}) == 1


def test_live_lets_go_of_the_old_version(name):
    import weakref

    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    old = weakref.ref(live())
    rzc.publish(name, filled(2))
    until(lambda: old() is None)


def test_many_names_are_followed_in_one_call(name):
    names = [f"{name}/{index}" for index in range(5)]
    for each in names:
        rzc.publish(each, filled(1))
    lives = [rzc.follow(each) for each in names]
    for each in reversed(names):
        rzc.publish(each, filled(2))
    until(lambda: {value_of(live()) for live in lives} == {2})
    threads = [thread for thread in threading.enumerate() if thread.name == "ray_zerocopy.follow"]
    assert len(threads) == 1
    state = ray.get(client.catalog().state.remote())
    assert [state["names"][each]["followers"] for each in names] == [1] * 5
    for each in names:
        rzc.retire(each)


def test_a_follower_of_two_names_asks_once_and_waits(name, monkeypatch):
    """A follower does not ask again for messages it has heard."""

    def counted(*args):
        asked.append(args)
        return hear(*args)

    asked, hear = [], follower.Follower._hear
    monkeypatch.setattr(follower.Follower, "_hear", counted)
    names = [f"{name}/{index}" for index in range(2)]
    for each in names:
        rzc.publish(each, filled(1))
    lives = [rzc.follow(each) for each in names]
    time.sleep(1)
    asked.clear()
    time.sleep(2)
    assert not asked
    assert {value_of(live()) for live in lives} == {1}
    for each in names:
        rzc.retire(each)


def test_live_travels_by_name(name, start):
    class User:
        def __init__(self, live):
            self.live = live

        def value(self):
            return value_of(self.live())

    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    assert len(pickle.dumps(live)) < 200
    assert value_of(pickle.loads(pickle.dumps(live))()) == 1
    (user,) = [ray.remote(User).options(num_cpus=0).remote(live)]
    assert ray.get(user.value.remote()) == 1
    rzc.publish(name, filled(2))
    until(lambda: ray.get(user.value.remote()) == 2)
    ray.kill(user)


def test_threads_see_whole_versions_only(name):
    rzc.publish(name, filled(0))
    live, done, seen = rzc.follow(name), threading.Event(), set()

    def use():
        while not done.wait(0.001):
            seen.add(value_of(live()))

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        for value in range(1, 6):
            rzc.publish(name, filled(value))
        until(lambda: 5 in seen)
        done.set()
        for user in users:
            user.result()
    assert seen <= set(range(6))


def test_the_verbs_can_be_awaited(name):
    async def publish_and_follow():
        version = await rzc.aio.publish(name, filled(1))
        live = await rzc.aio.follow(name)
        loaded = await rzc.aio.load(name)
        return version.number, value_of(live()), value_of(loaded)

    assert asyncio.run(publish_and_follow()) == (1, 1, 1)


def test_a_second_live_comes_to_the_newest(name, monkeypatch):
    """Although its first load is slow, and the first live has the next version by then."""

    def slow(version, **how):
        loaded = real(version, **how)
        if threading.current_thread().name == "second":
            assert told.wait(60)
        return loaded

    real, told, second = follower.load_version, threading.Event(), []
    monkeypatch.setattr(follower, "load_version", slow)
    rzc.publish(name, filled(1))
    first = rzc.follow(name)
    thread = threading.Thread(target=lambda: second.append(rzc.follow(name)), name="second")
    thread.start()
    rzc.publish(name, filled(2))
    until(lambda: value_of(first()) == 2)
    told.set()
    thread.join()
    until(lambda: value_of(second[0]()) == 2)


def test_each_live_ends_on_the_newest_and_loads_nothing_twice(name, monkeypatch):
    """However long a load takes: versions that come faster are skipped, not queued."""

    def recorded(version, **how):
        loads[how["prefault"]].append(version.number)
        time.sleep(delays.uniform(0, 0.2))
        return real(version, **how)

    real, loads, delays = follower.load_version, {True: [], False: []}, random.Random(0)
    monkeypatch.setattr(follower, "load_version", recorded)
    rzc.publish(name, filled(0))
    lives = [rzc.follow(name, prefault=how) for how in loads]
    for value in range(1, 12):
        rzc.publish(name, filled(value))
    rzc.publish(name, filled(11))  # it already is
    until(lambda: {value_of(live()) for live in lives} == {11})
    time.sleep(1)
    for numbers in loads.values():
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == 12


def test_a_version_that_comes_at_the_thread_limit_is_loaded_later(name, monkeypatch):
    def none_left(what, *how):
        if what == "swap":
            monkeypatch.setattr(follower, "_in_thread", real)
            raise RuntimeError("can't start new thread")
        return real(what, *how)

    real = follower._in_thread
    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    monkeypatch.setattr(follower, "_in_thread", none_left)
    rzc.publish(name, filled(2))
    until(lambda: value_of(live()) == 2)


def test_who_follows_a_retired_name_asks_rarely(name, monkeypatch):
    def counted():
        asked.append(time.monotonic())
        return real()

    real, asked = client.catalog, []
    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    rzc.retire(name)
    follower._FOLLOWER._forget()  # as after a restart of the catalog
    monkeypatch.setattr(client, "catalog", counted)
    follower._FOLLOWER.wake()
    time.sleep(2)
    assert len(asked) <= 2
    assert value_of(live()) == 1


def test_a_version_that_does_not_load_is_tried_again(name, monkeypatch):
    def once(version, **how):
        if version.number == 2 and not failed:
            failed.append(version)
            raise MemoryError
        return real(version, **how)

    real, failed = follower.load_version, []
    monkeypatch.setattr(follower, "load_version", once)
    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    rzc.publish(name, filled(2))
    until(lambda: value_of(live()) == 2)
    assert failed


class Follows:
    """A follower in a worker."""

    def follow(self, name):
        self.live = rzc.follow(name)

    def value(self):
        return value_of(self.live())

    def forget(self):
        del self.live
        gc.collect()


def test_publishing_in_a_row_keeps_memory_bounded(name, start):
    """The store holds kept versions, the one being published, and those in use: no queue.

    Ray may drop unused versions at once, and they leave the store within a second.
    """

    def used():
        return int(re.search(r"usage (\d+) MiB", memory_summary(address, stats_only=True))[1])

    gc.collect()
    address = ray.get_runtime_context().gcs_address
    size, most, over = 2048, [], threading.Event()  # 16 MiB a version
    before = used()

    def watch():
        while not over.wait(0.05):
            most.append(used() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    rzc.publish(name, filled(0, size), keep=1)
    followers = start(Follows, 2)
    ray.get([each.follow.remote(name) for each in followers])
    for value in range(1, 6):
        time.sleep(1.2)
        rzc.publish(name, filled(value, size), keep=1)
    until(lambda: ray.get([each.value.remote() for each in followers]) == [5, 5])
    over.set()
    watching.join()
    current, written, before_it = 1, 1, 2
    assert max(most) <= 16 * (current + written + before_it) + 1
    until(lambda: used() - before <= 17)
    rzc.retire(name)
    ray.get([each.forget.remote() for each in followers])
    until(lambda: used() - before <= 1)


def test_a_follower_survives_whatever_is_raised(name, monkeypatch):
    def once(self):
        monkeypatch.setattr(follower.Follower, "_hear", real)
        raise KeyError("nobody expects this")

    real = follower.Follower._hear
    rzc.publish(name, filled(1))
    live = rzc.follow(name)
    monkeypatch.setattr(follower.Follower, "_hear", once)
    follower._FOLLOWER.wake()
    until(lambda: follower.Follower._hear is real)
    rzc.publish(name, filled(2))
    until(lambda: value_of(live()) == 2)


LEAVE = """
import gc, threading, time
import torch
for delay in (0.0, 0.1, 0.4, 0.9):
    live = rzc.follow(sys.argv[1])
    number = live.version.number
    rzc.publish(sys.argv[1], torch.nn.Linear(300, 300))
    while live.version.number == number:
        time.sleep(0.01)
    time.sleep(delay)
    ray.shutdown()
    try:
        live()
    except rzc.CatalogError as error:
        assert "has left" in str(error)
        print("has left")
    ray.init(sys.argv[2], log_to_driver=False)
    try:
        assert live()
    except rzc.CatalogError:
        raise SystemExit("the same cluster")
live = rzc.follow(sys.argv[1])
rzc.publish(sys.argv[1], torch.nn.Linear(300, 300))
"""


def test_a_follower_leaves_with_its_process(name):
    """By `ray.shutdown` or at exit, whenever a version has arrived: with status 0."""
    rzc.publish(name, filled(1))
    done = other_job(LEAVE, name, ray.get_runtime_context().gcs_address)
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, ["has left"] * 4), done.stderr


def test_a_call_through_follow_runs_though_its_version_is_retired(name, monkeypatch):
    """A caller that has not heard of the new version yet."""
    first, x = rzc.publish(name, filled(1)), torch.ones(1, 64)
    live = rzc.follow(name)
    monkeypatch.setattr(follower.Live, "offer", lambda *_: None)
    rzc.publish(name, filled(2), keep=1)
    assert live.version.number == 1
    assert ray.get(rzc.call_model.remote(live, (x,)))[0, 0] == 2 * 65
    with pytest.raises(rzc.UnknownVersionError, match=r"version 1 of .* is retired"):
        ray.get(rzc.call_model.remote(first, (x,)))


# --- the faces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["version", "live"])
def test_the_faces_take_what_is_published(name, kind):
    version, x = rzc.publish(name, filled(1)), torch.ones(1, 64)
    published = version if kind == "version" else rzc.follow(name)
    now = 2 if kind == "live" else 1
    wrapper = pickle.loads(pickle.dumps(rzc.ModelWrapper.from_model(published)))
    fast = rzc.rewrite_pipeline({"model": published})["model"]
    predictor = rzc.data.Predictor(published)
    assert ray.get(rzc.call_model.remote(published, (x,)))[0, 0] == fast(x)[0, 0] == 65

    rzc.publish(name, filled(2))
    if kind == "live":
        until(lambda: published.version.number == 2)
        until(lambda: value_of(predictor.model) == 2)
    assert value_of(wrapper.load()) == now
    assert value_of(predictor.model) == now
    assert ray.get(rzc.call_model.remote(published, (x,)))[0, 0] == 65 * now
    assert pickle.loads(pickle.dumps(fast))(x)[0, 0] == 65 * now


# --- across jobs ----------------------------------------------------------------------------------


def other_job(code, *args, env=None):
    """Run a script as a job of its own in the suite's Ray."""
    address = ray.get_runtime_context().gcs_address
    how = {"log_to_driver": False, **(env or {})}
    head = f"import ray, sys, ray_zerocopy as rzc; ray.init({address!r}, **{how!r})\n"
    return execute(head + code, *args)


def test_a_version_outlives_its_publisher(name):
    code = "import models; print(rzc.publish(sys.argv[1], models.simple().model).number)"
    done = other_job(code, name)
    assert done.stdout.strip() == "1", done.stderr
    assert_exact(simple().model, rzc.load(name))


def test_make_from_a_working_dir_is_told_at_publish(name, tmp_path):
    Path(tmp_path, "only_in_this_job.py").write_text("def make(): return [1]")
    code = """
import only_in_this_job
try:
    rzc.publish(sys.argv[1], make=only_in_this_job.make)
except rzc.PublishError as error:
    print(error)
"""
    code = f"sys.path.insert(0, {str(tmp_path)!r})\n{code}"
    done = other_job(code, name, env={"runtime_env": {"working_dir": str(tmp_path)}})
    assert "No module named 'only_in_this_job'" in done.stdout, done.stderr
    assert "register_pickle_by_value" in done.stdout
    assert name not in rzc.published()


def test_nothing_starts_before_the_first_publish_which_keeps_its_timeout():
    @run
    def fresh():
        import pytest
        import ray
        import ray_zerocopy as rzc
        import rays
        import torch
        from ray_zerocopy.registry import client

        rays.connect(num_cpus=1, object_store_memory=80_000_000)
        assert rzc.published() == rzc.versions("a") == []
        with pytest.raises(rzc.UnknownVersionError, match="nothing is published"):
            rzc.load("a")
        assert ray.util.list_named_actors(all_namespaces=True) == []

        with pytest.raises(rzc.CatalogError, match=r"not started in 0.1 s, and is still starting"):
            rzc.publish("a", torch.ones(3), timeout=0.1)
        assert rzc.publish("a", torch.ones(3)).number == 1
        live = rzc.follow("a")

        # A live belongs to its cluster.
        ray.shutdown()
        rays.connect(num_cpus=1, object_store_memory=80_000_000)
        with pytest.raises(rzc.CatalogError, match="a cluster that this process has left"):
            live()
        rzc.publish("a", torch.zeros(3))
        with pytest.raises(rzc.CatalogError, match="a cluster that this process has left"):
            live()
        assert torch.equal(rzc.follow("a")(), torch.zeros(3))
        assert torch.equal(rzc.load("a"), torch.zeros(3))
        assert client.is_running()


def test_the_actors_take_no_cpu_and_are_told_by_their_class(name):
    rzc.publish(name, filled(1))
    named = ray.util.list_named_actors(all_namespaces=True)
    ours = {each["name"] for each in named if each["namespace"] == catalog.NAMESPACE}
    assert ours - {"keeper"} == {"catalog", "owner"}  # other tests deploy with Serve
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
