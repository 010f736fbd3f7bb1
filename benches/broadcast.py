"""Simulate sending a block to 1,000 nodes: star, doubling waves, a chunked pipeline.

`python benches/broadcast.py` prints the tables of `docs/explanation/broadcast.md`. Each node has
one full-duplex link; transfers share the sender's link evenly. One node has a tenth of the speed,
and one dies halfway through its transfer.
"""

import math
import random

import simpy

NODES, NBYTES = 1000, 140e9
GBIT_S = (10, 25, 100)
TIMEOUT_S, START_S = 600.0, 0.05  # to give up a dead node; to start a task and a pull
CHUNK_NBYTES = 5 << 20  # Ray's object_manager_default_chunk_size


class Cluster:
    """The links of the nodes. Node 0 has the block, one other is slow, one dies."""

    def __init__(self, gbit_s, nodes=NODES, faults=True, seed=0):
        self.env = simpy.Environment()
        self.speed = [gbit_s * 1e9 / 8] * nodes
        self.slow, self.dying = (
            random.Random(seed).sample(range(1, nodes), 2) if faults else (-1, -1)
        )
        if faults:
            self.speed[self.slow] /= 10
        self.done_s = {0: 0.0}

    def seconds(self, sender, receiver, share):
        return NBYTES / min(self.speed[sender] / share, self.speed[receiver])


def star(cluster):
    """All nodes pull from node 0 at once and share its link."""
    count = len(cluster.speed) - 1
    for node in range(1, len(cluster.speed)):
        if node != cluster.dying:
            cluster.done_s[node] = cluster.seconds(0, node, count) + START_S
    return cluster.done_s


def waves(cluster, fan_out=1):
    """Each node with the block sends it to `fan_out` nodes at a time, not counting slow ones."""
    env, waiting = cluster.env, list(range(len(cluster.speed) - 1, 0, -1))

    def hold(node):
        places = simpy.Resource(env, fan_out)
        while waiting:
            with places.request() as place:
                yield place
                if not waiting:
                    return
                transfer = env.process(send(node, waiting.pop()))
                # a transfer that is much too slow continues, but frees its place
                usual_s = NBYTES / (cluster.speed[0] / fan_out)
                yield transfer | env.timeout(3 * usual_s + 2)

    def send(sender, receiver):
        seconds = START_S + cluster.seconds(sender, receiver, fan_out)
        if receiver == cluster.dying:
            yield env.timeout(seconds / 2 + TIMEOUT_S)
            return
        yield env.timeout(seconds)
        cluster.done_s[receiver] = env.now
        for _ in range(fan_out):
            env.process(hold(receiver))

    for _ in range(fan_out):
        env.process(hold(0))
    env.run()
    return cluster.done_s


def pipeline(cluster):
    """A chain: each node passes on every chunk. The slowest link limits all nodes after it."""
    end_s, speed = START_S, math.inf
    for node in range(1, len(cluster.speed)):
        if node == cluster.dying:
            end_s += TIMEOUT_S  # then its successor continues from its predecessor
            continue
        speed = min(speed, cluster.speed[node - 1], cluster.speed[node])
        end_s += CHUNK_NBYTES / speed + START_S
        cluster.done_s[node] = end_s + NBYTES / speed
    return cluster.done_s


WAYS = {
    "star (simultaneous cold gets)": star,
    "doubling waves": waves,
    "waves, two at a time": lambda cluster: waves(cluster, 2),
    "waves, four at a time": lambda cluster: waves(cluster, 4),
    "chunked pipeline": pipeline,
}


def main():
    for faults in (False, True):
        told = "one slow node and one that dies" if faults else "all nodes alike"
        print(
            f"\n{NODES:,} nodes, {NBYTES / 1e9:.0f} GB, {told}: "
            f"seconds until half, 99 %, all have it\n"
        )
        print("| | " + " | ".join(f"{gbit} Gbit/s" for gbit in GBIT_S) + " |")
        print("|---|" + "--:|" * len(GBIT_S))
        for name, way in WAYS.items():
            cells = []
            for gbit in GBIT_S:
                done = sorted(way(Cluster(gbit, faults=faults)).values())
                marks = (done[len(done) // 2], done[int(len(done) * 0.99)], done[-1])
                cells.append(", ".join(f"{mark:,.0f}" for mark in marks))
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
