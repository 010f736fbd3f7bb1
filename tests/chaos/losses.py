"""Every row of the table of losses, one after the other, in one cluster that loses nodes.

    head        driver, in the end alone
    b           publisher; catalog and owner ─ killed, then lost
    c           publisher; no disk ─────────── lost before
    d           ─────────────────────────────── joins between, is lost after

`test_losses.py` runs this in a separate interpreter. It reports each row as soon as it is done.
"""

import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
import ray_zerocopy as rzc
import rays
import torch
from fresh import tell
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_zerocopy.registry import catalog
from ray_zerocopy.registry.owner import Owner

STORE = 150 * 2**20
SOON_S = 90  # the longest wait, on a busy machine
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
QUICK |= {"health_check_failure_threshold": 3}
QUICK |= {"health_check_timeout_ms": 10_000}  # killed nodes refuse at once; others may be busy
QUICK |= {"num_workers_soft_limit": 4}  # idle workers stay, as each has imported torch


def filled(value, size=1500):
    model = torch.nn.Linear(size, size)  # 9 MB
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float(value))
    return model


def value_of(model):
    (value,) = {value for p in model.parameters() for value in p.unique().tolist()}
    return int(value)


def until(condition):
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, "this takes too long"
        time.sleep(0.1)


class Reader:
    """An actor on a node that publishes, loads, and keeps its models."""

    def __init__(self):
        self.views = {}

    def publish(self, name, value, heals):
        how = {"make": lambda: filled(value)} if heals else {"obj": filled(value)}
        return rzc.publish(name, **how).number

    def publish_what_is_full(self, name, heals):
        how = {"make": lambda: torch.ones(2**26)} if heals else {"obj": torch.ones(2**26)}
        refused(rzc.StoreFullError, "no room", lambda: rzc.publish(name, **how))

    def hold(self, name):
        self.views[name] = rzc.load(name, timeout=SOON_S)
        return value_of(self.views[name])

    def held(self, name):
        return value_of(self.views[name])

    def forget(self):
        self.views.clear()

    def inspect(self, refs):
        return rzc.inspect(refs[0])

    def value(self, refs):
        return value_of(ray.get(refs[0]))

    def load(self, name, number=None):
        return value_of(rzc.load(name, version=number, timeout=SOON_S))


class Stage:
    """The cluster, a reader on each of its nodes, and ways to break it."""

    def __init__(self):
        self.cluster = Cluster()
        self.nodes, self.readers = [], {}
        head = self._start(_system_config=QUICK)
        ray.init(self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.read_on(head)
        self.add_node()
        self.add_node(disk=False)

    def _start(self, **options):
        how = rays.node(num_cpus=1, object_store_memory=STORE, **options)
        node = self.cluster.add_node(**how)
        self.nodes.append(node)
        return node

    def add_node(self, *, disk=True):
        with pytest.MonkeyPatch.context() as patch:
            if not disk:
                patch.setenv("RAY_local_fs_capacity_threshold", "0.0001")
            self.read_on(self._start())

    def read_on(self, node):
        where = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        self.readers[node] = (
            ray.remote(Reader).options(num_cpus=0, scheduling_strategy=where).remote()
        )

    def lose(self, node):
        self.nodes.remove(node)
        del self.readers[node]
        self.cluster.remove_node(node, allow_graceful=False)

    def on(self, node, method, *args):
        return ray.get(getattr(self.readers[node], method).remote(*args), timeout=2 * SOON_S)

    def everywhere(self, method, *args):
        calls = [getattr(reader, method).remote(*args) for reader in self.readers.values()]
        return set(ray.get(calls, timeout=2 * SOON_S))

    def used(self):
        """Bytes in the store of each node that Ray may not evict."""
        where = [(n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]]
        stats = [node_stats(*each, include_memory_info=False).store_stats for each in where]
        return [each.object_store_bytes_primary_copy for each in stats]

    def kill(self, name):
        actor = ray.get_actor(name, catalog.NAMESPACE)
        deadline_s = time.monotonic() + SOON_S
        while True:
            try:
                pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=SOON_S)
                break
            except ray.exceptions.RayActorError:  # killed before, and not restarted yet
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)


def place(node):
    """Make the cluster's actors run on this node, until it is lost."""
    where = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
    anywhere = catalog.ACTOR | {"resources": {}, "memory": 1}  # soft needs a resource
    for name, kind in (("owner", Owner), ("catalog", catalog.Catalog)):
        actor = ray.remote(kind).options(name=name, scheduling_strategy=where, **anywhere).remote()
        assert runs_on(actor) == node.node_id


def runs_on(actor):
    asked = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    return ray.get(asked, timeout=catalog.START_S)


def nodes_of(name):
    """The ids of the nodes that have the block of a name."""
    ref = rzc.versions(name)[-1].ref
    return ray.experimental.get_object_locations([ref])[ref]["node_ids"]


def refused(error, told, action):
    """The action raises an error of ours that says what to do."""
    with pytest.raises(error, match=told):
        action()


# --- before anything is lost ----------------------------------------------------------------------


def nothing_starts_before_the_first_publish(stage):
    assert rzc.published() == rzc.versions("a") == []
    refused(rzc.UnknownVersionError, "nothing is published", lambda: rzc.load("a"))
    assert ray.util.list_named_actors(all_namespaces=True) == []


def actors_start_on_the_head(stage):
    """Ray places actors without resources anywhere. Move them where the rows need them."""
    rzc.publish("first", filled(1))
    for name in ("catalog", "owner"):
        actor = ray.get_actor(name, catalog.NAMESPACE)
        assert runs_on(actor) == ray.get_runtime_context().get_node_id()
        ray.kill(actor)
    until(lambda: not ray.util.list_named_actors(all_namespaces=True))
    place(stage.nodes[1])
    rzc.retire("first")


def fetched_from_another_node(stage):
    ref = rzc.put(filled(1))
    here, there = rzc.inspect(ref), stage.on(stage.nodes[1], "inspect", [ref])
    assert (here.where, there.where, there.held) == ("store", "store", "private")
    assert here.inode != there.inode
    assert stage.on(stage.nodes[1], "value", [ref]) == 1


def sent_to_every_node_but_one_without_room(stage):
    small = stage.cluster.add_node(**rays.node(num_cpus=1, object_store_memory=80 * 2**20))
    ref = rzc.put(torch.ones(24 * 2**20))  # 96 MiB
    seconds = rzc.prefetch(ref)
    assert set(seconds) == {node.node_id for node in (*stage.nodes, small)}
    assert [node for node, took in seconds.items() if took is None] == [small.node_id]
    have = set(ray.experimental.get_object_locations([ref])[ref]["node_ids"])
    assert have == {node.node_id for node in stage.nodes}
    assert max(seconds[node] for node in have) > 0
    assert set(rzc.prefetch(ref, sorted(have)).values()) == {0.0}
    assert bool((ray.get(ref) == 1).all())
    stage.cluster.remove_node(small)


# --- the rows -------------------------------------------------------------------------------------


def driver(address):
    """Publish repeatedly until killed: an object, and a model that takes long to make."""
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    rzc.publish("driver", filled(1))
    slow = {"make": lambda: time.sleep(10) or torch.ones(1)}
    threading.Thread(target=rzc.publish, args=["torn"], kwargs=slow).start()
    for value in itertools.count(1):
        rzc.publish("torn", filled(value))


def driver_dead(stage):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import losses; losses.driver(sys.argv[2])"
    here = os.path.dirname(os.path.abspath(__file__))
    args = [sys.executable, "-W", "ignore", "-c", code, here, stage.cluster.address]
    with subprocess.Popen(args) as publisher:
        try:
            until(lambda: {"staging", "live"} <= {v.state for v in rzc.versions("torn")})
        finally:
            publisher.kill()
    assert stage.everywhere("load", "driver") == {1}


def store_without_room(stage):
    without_disk = stage.nodes[2]
    stage.on(without_disk, "publish", "full", 1, True)
    for heals in (True, False):
        stage.on(without_disk, "publish_what_is_full", "full", heals)
    assert stage.everywhere("load", "full") == {1}
    rzc.retire("full")


def publisher_killed(stage):
    """The driver dies in the middle of its work: `driver` died a while ago."""
    until(lambda: "staging" not in {v.state for v in rzc.versions("torn")})
    for version in rzc.versions("torn"):
        if version.state == "live":
            assert len(stage.everywhere("load", "torn", version.number)) == 1
    rzc.retire("driver")
    rzc.retire("torn")


KINDS = {"make": 1, "object": 2}


def _published(stage):
    """Healing and other versions, in use on all nodes."""
    _, b, c = stage.nodes
    stage.on(b, "publish", "make", KINDS["make"], True)
    stage.on(c, "publish", "object", KINDS["object"], False)
    assert [nodes_of(name) for name in KINDS] == [[b.node_id], [c.node_id]]
    rzc.publish("random", make=lambda: torch.seed() and torch.nn.Linear(1500, 1500))
    _hold(stage)


def _hold(stage):
    for name, value in KINDS.items():
        assert stage.everywhere("hold", name) == {value}


def _stands(stage):
    for name, value in KINDS.items():
        assert stage.everywhere("held", name) == {value}
    _hold(stage)


def owner_killed(stage):
    """Twice, so that views in use are older than the last generation."""
    _published(stage)
    stage.kill("owner")
    until(lambda: [version.generation for version in rzc.versions("object")] == [1])
    stage.kill("owner")
    _stands(stage)


def make_that_gives_another_model(stage):
    """A new owner makes it, not the first one."""
    until(lambda: not rzc.versions("random")[0].heals)
    refused(rzc.LostVersionError, "another model", lambda: rzc.load("random", timeout=SOON_S))
    rzc.retire("random")


def catalog_killed(stage):
    stage.kill("catalog")
    _stands(stage)


def both_killed(stage):
    stage.kill("owner")
    stage.kill("catalog")
    _stands(stage)
    assert stage.on(stage.nodes[1], "publish", "make", 3, True) == 2
    assert stage.everywhere("load", "make") == {3}


def memory_is_returned(stage):
    """The stores of all nodes are empty when names are retired and views dropped."""
    assert sum(stage.used()) > 0
    for name in rzc.published():
        rzc.retire(name)
    stage.everywhere("forget")
    until(lambda: max(stage.used()) == 0)


def too_large_for_a_store(stage):
    """Ray keeps it on the node's disk, and maps it from there."""
    version = rzc.publish("large", make=lambda: filled(1, 7000))  # 187 MB
    assert rzc.inspect(version.ref).where == "disk"
    assert value_of(rzc.load("large")) == 1
    rzc.retire("large")


def spilled(stage):
    rzc.publish("spilled", make=lambda: filled(1))
    filling = [ray.put(torch.ones(2**22).numpy()) for _ in range(16)]
    assert stage.everywhere("load", "spilled") == {1}
    del filling
    rzc.retire("spilled")


def block_lost_with_a_copy_elsewhere(stage):
    _, b, c = stage.nodes
    stage.on(c, "publish", "copied", 1, False)
    stage.on(c, "publish", "healed", 2, True)
    stage.on(c, "publish", "unhealed", 3, False)
    stage.on(b, "publish", "moved", 4, True)
    assert nodes_of("unhealed") == [c.node_id]
    assert stage.everywhere("hold", "moved") == {4}
    stage.on(b, "hold", "copied")
    stage.lose(c)
    assert stage.everywhere("load", "copied") == {1}


def block_lost_without_a_copy(stage):
    assert stage.everywhere("load", "healed") == {2}
    refused(rzc.LostVersionError, "publish it again", lambda: rzc.load("unhealed", timeout=SOON_S))
    stage.add_node()
    assert stage.everywhere("load", "copied") == {1}


def owners_node_lost_then_another(stage):
    _, b, d = stage.nodes
    assert stage.on(d, "hold", "moved") == 4
    stage.lose(b)
    assert stage.everywhere("held", "moved") == {4}
    assert stage.everywhere("load", "moved") == {4}
    stage.lose(d)
    assert stage.everywhere("held", "moved") == {4}
    assert stage.everywhere("load", "moved") == {4}
    assert stage.everywhere("load", "healed") == {2}


ROWS = {
    row.__name__: row
    for row in (
        nothing_starts_before_the_first_publish,
        actors_start_on_the_head,
        fetched_from_another_node,
        sent_to_every_node_but_one_without_room,
        driver_dead,
        store_without_room,
        publisher_killed,
        owner_killed,
        make_that_gives_another_model,
        catalog_killed,
        both_killed,
        memory_is_returned,
        too_large_for_a_store,
        spilled,
        block_lost_with_a_copy_elsewhere,
        block_lost_without_a_copy,
        owners_node_lost_then_another,
    )
}


def main():
    stage = Stage()
    tell({name: functools.partial(row, stage) for name, row in ROWS.items()}, ROWS)
    ray.shutdown()
    stage.cluster.shutdown()


if __name__ == "__main__":
    main()
