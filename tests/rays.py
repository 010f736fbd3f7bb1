"""Rays for tests: workers are forked from the template, and unused parts do not run."""

import socket

import ray
import template
from ray.cluster_utils import Cluster


def node(**how):
    """The arguments to start a node, the head or another."""
    template.start()
    return {
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
        "setup_worker_path": template.__file__,
        **how,
    }


def started(**how):
    """A cluster of one node: connect to it, and shut it down."""
    return Cluster(initialize_head=True, head_node_args=node(**how))


def connect(**how):
    """Make this process the driver of a cluster of one node, which ends with it."""
    cluster = started(**how)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
