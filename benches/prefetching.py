"""Send a block to four other nodes on this machine: in waves, and pulled by all at once."""

import re
import time
from collections import Counter
from statistics import median
from urllib.request import urlopen

import numpy as np
import ray
import ray_zerocopy as rzc
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NODES, NBYTES, ROUNDS = 5, 256 << 20, 6
PUSHED = r'^ray_object_manager_bytes{.*Type="Pushed.*} (.*)$'


@ray.remote(num_cpus=0)
class Node:
    """A process on a node that gets the object."""

    def get(self, refs):
        return ray.get(refs[0]).nbytes


def time_sending():
    """{way: (median seconds, [bytes each node sent in a round, descending])}."""
    cluster = Cluster()
    try:
        for node in range(NODES):
            told = {} if node else {"_system_config": {"metrics_report_interval_ms": 500}}
            cluster.add_node(num_cpus=1, object_store_memory=1 << 30, **told)
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        others = [n["NodeID"] for n in ray.nodes()]
        others.remove(ray.get_runtime_context().get_node_id())
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in others]
        readers = [Node.options(scheduling_strategy=each).remote() for each in there]
        ray.get([reader.__ray_ready__.remote() for reader in readers])
        ways = {
            "`prefetch`": lambda ref: rzc.prefetch(ref, others),
            "all get it at once": lambda ref: ray.get([r.get.remote([ref]) for r in readers]),
        }
        return time_ways(ways)
    finally:
        ray.shutdown()
        cluster.shutdown()


def time_ways(ways):
    seconds, sent = {way: [] for way in ways}, {way: Counter() for way in ways}
    for turn in range(2 * ROUNDS + 2):
        way = list(ways)[turn % 2]
        ref, before = rzc.put(np.full(NBYTES, turn, np.uint8)), sent_nbytes()
        start_s = time.perf_counter()
        ways[way](ref)
        elapsed_s = time.perf_counter() - start_s
        if turn >= 2:  # the first turn of each way starts processes and touches pages
            seconds[way].append(elapsed_s)
            sent[way].update({node: n - before[node] for node, n in settled().items()})
        else:
            settled()
        del ref
    return {
        way: (median(seconds[way]), sorted((n / ROUNDS for n in sent[way].values()), reverse=True))
        for way in ways
    }


def settled():
    """Bytes that each node has sent, once Ray's agents have counted all."""
    before = sent_nbytes()
    while True:
        time.sleep(3)
        if (now := sent_nbytes()) == before:
            return now
        before = now


def sent_nbytes():
    """{node: bytes sent by its object manager, from Ray's metrics}."""
    told = {}
    for node in ray.nodes():
        with urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as answer:
            counted = re.findall(PUSHED, answer.read().decode(), re.M)
        told[node["NodeID"]] = sum(map(float, counted))
    return told
