"""A block reaches every node once, even if a node dies."""

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from ray_zerocopy.registry import broadcast
from ray_zerocopy.store import references


def test_where_it_lies_already_nothing_is_sent(cluster):
    ref = rzc.put(np.ones(1 << 20, np.uint8))
    assert rzc.prefetch(ref) == {node["NodeID"]: 0.0 for node in ray.nodes()}


def test_an_unknown_node_or_name_is_refused(cluster):
    ref = rzc.put(np.ones(1 << 20, np.uint8))
    with pytest.raises(ValueError, match="no live node"):
        rzc.prefetch(ref, ["f00"])
    with pytest.raises(rzc.UnknownVersionError):
        rzc.prefetch("nobody/published/this")


def test_a_node_that_has_died_meanwhile_gets_nothing(cluster):
    here = ray.get_runtime_context().get_node_id()
    ref = rzc.put(torch.ones(100_000))
    assert broadcast._send(ref, [here, "gone"], 5, "it") == {here: 0.0, "gone": None}
    with pytest.raises(ValueError, match="no live node has the id"):
        rzc.prefetch(ref, ["gone"])


def test_what_failed_has_no_bases(cluster):
    @ray.remote(max_retries=0)
    def fail():
        raise OSError

    assert references.bases_in(fail.remote()) == []
