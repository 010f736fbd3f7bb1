"""A block reaches every node once, even if a node dies."""

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc


def test_where_it_lies_already_nothing_is_sent(cluster):
    ref = rzc.put(np.ones(1 << 20, np.uint8))
    assert rzc.prefetch(ref) == {node["NodeID"]: 0.0 for node in ray.nodes()}


def test_an_unknown_node_or_name_is_refused(cluster):
    ref = rzc.put(np.ones(1 << 20, np.uint8))
    with pytest.raises(ValueError, match="no live node"):
        rzc.prefetch(ref, ["f00"])
    with pytest.raises(rzc.UnknownVersionError):
        rzc.prefetch("nobody/published/this")
