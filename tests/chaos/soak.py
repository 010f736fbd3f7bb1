"""Publish, promote, retire and load, while the processes behind it are killed at random.

    python tests/chaos/soak.py MINUTES SEED

Compares every answer with the model that was published under its name and number. The same seed
repeats the same run. Prints how often each action was done. Exit status 1 if an answer was wrong.
"""

import collections
import itertools
import random
import sys
import time

import ray
import ray_zerocopy as rzc
from losses import SOON_S, Stage, place

NAMES = ["a", "b/c", "d"]
HEALS = 0.8  # the share of publications that heal


class Soak:
    """A cluster, the versions published in it, and the possible next actions."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.stage = Stage()
        place(self.stage.nodes[0])
        self.values = {}  # by name and number: the value of all weights
        self.heals = {}
        self.fresh = itertools.count(1)
        self.done = collections.Counter()

    def step(self):
        actions = {self.publish: 6, self.load: 12, self.promote: 3, self.retire: 1}
        actions |= {self.kill_owner: 1, self.kill_catalog: 1, self.kill_reader: 1, self.lose: 0.5}
        (action,) = self.random.choices(list(actions), list(actions.values()))
        action()
        self.done[action.__name__] += 1

    def publish(self):
        node, name = self.random.choice(self.stage.nodes), self.random.choice(NAMES)
        value, heals = next(self.fresh), self.random.random() < HEALS
        number = self.stage.on(node, "publish", name, value, heals)
        assert (name, number) not in self.values, "a number was given twice"
        self.values[name, number], self.heals[name, number] = value, heals

    def live(self):
        versions = [version for name in NAMES for version in rzc.versions(name)]
        return [version for version in versions if version.state == "live"]

    def load(self):
        for version in self.random.sample(live := self.live(), min(2, len(live))):
            key = version.name, version.number
            node = self.random.choice(self.stage.nodes)
            try:
                value = self.stage.on(node, "load", *key)
            except rzc.LostVersionError:
                assert not self.heals[key], f"{key} heals, and was lost"
                self.done["lost, as it said"] += 1
                continue
            assert value == self.values[key], f"{key} has {value}, not {self.values[key]}"

    def promote(self):
        if live := self.live():
            version = self.random.choice(live)
            assert rzc.promote(version.name, version.number).current

    def retire(self):
        if live := [version for version in self.live() if not version.current]:
            version = self.random.choice(live)
            rzc.retire(version.name, version.number)

    def kill_owner(self):
        if self.live():
            self.stage.kill("owner")

    def kill_catalog(self):
        if self.live():
            self.stage.kill("catalog")

    def kill_reader(self):
        node = self.random.choice(self.stage.nodes)
        ray.kill(self.stage.readers[node])
        self.stage.read_on(node)

    def lose(self):
        self.stage.lose(self.random.choice(self.stage.nodes[1:]))
        self.stage.add_node()


def main(minutes, seed):
    soak = Soak(seed)
    deadline_s = time.monotonic() + 60 * float(minutes)
    slowest_s = 0.0
    while time.monotonic() < deadline_s:
        start_s = time.monotonic()
        soak.step()
        slowest_s = max(slowest_s, time.monotonic() - start_s)
        assert slowest_s < 2 * SOON_S
    soak.load()
    print(f"seed {seed}, {minutes} minutes, slowest step {slowest_s:.1f} s")
    for what, count in soak.done.most_common():
        print(f"{count:6} {what}")
    ray.shutdown()
    soak.stage.cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:3])
