"""Rays for tests: workers are forked from the template, and what no test looks at is left out."""

import ray
import template
from ray.cluster_utils import Cluster


def node(**how):
    """How a node is started, the head or another."""
    template.start()
    return {
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
        "setup_worker_path": template.__file__,
        **how,
    }


def started(**how):
    """A cluster of one node, to connect to and to shut down."""
    return Cluster(initialize_head=True, head_node_args=node(**how))


def connect(**how):
    """Be the driver of a cluster of one node, which ends with this process."""
    cluster = started(**how)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster
