"""A block reaches every node once, whatever becomes of one of them."""

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
from fresh import run


def test_where_it_lies_already_nothing_is_sent(cluster):
    ref = rzc.put(np.ones(1 << 20, np.uint8))
    assert rzc.prefetch(ref) == {node["NodeID"]: 0.0 for node in ray.nodes()}


def test_an_unknown_node_or_name_is_refused(cluster):
    ref = rzc.put(np.ones(1 << 20, np.uint8))
    with pytest.raises(ValueError, match="no live node"):
        rzc.prefetch(ref, ["f00"])
    with pytest.raises(rzc.UnknownVersionError):
        rzc.prefetch("nobody/published/this")


def test_five_nodes_are_sent_it_and_one_without_room_is_told():
    def scenario():
        import numpy as np
        import ray
        import ray_zerocopy as rzc
        from ray.cluster_utils import Cluster
        from ray.experimental import get_object_locations
        from ray_zerocopy.registry import catalog

        cluster = Cluster()
        for index in range(5):
            cluster.add_node(num_cpus=1, object_store_memory=(200 if index < 4 else 80) << 20)
        ray.init(cluster.address, log_to_driver=False)
        try:
            ref = rzc.put(np.arange(12 << 20, dtype=np.int64))  # 96 MiB
            seconds = rzc.prefetch(ref)
            small = [
                n["NodeID"] for n in ray.nodes() if n["Resources"]["object_store_memory"] < 90 << 20
            ]
            assert [node for node, took in seconds.items() if took is None] == small
            have = set(get_object_locations([ref])[ref]["node_ids"])
            assert have == set(seconds) - set(small)
            assert sorted(seconds.values(), key=lambda s: s or 0)[-1] > 0
            again = rzc.prefetch(ref, sorted(have))
            assert set(again.values()) == {0.0}
            assert ray.get(ref)[-1] == (12 << 20) - 1

            rzc.publish("five", np.ones(5))
            for name in ("catalog", "owner"):
                actor = ray.get_actor(name, catalog.NAMESPACE)
                where = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
                assert ray.get(where) == ray.get_runtime_context().get_node_id(), "not the head"
        finally:
            ray.shutdown()
            cluster.shutdown()

    run(scenario, timeout=300)
