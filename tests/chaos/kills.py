"""Kill publishers and loaders at random moments: the store and its objects stay intact.

    python tests/chaos/kills.py KILLS SEED

A worker repeats one action, and is killed at a random moment. Afterwards the store holds the same
objects, shared memory and the driver's descriptors and threads are as before, and every object with
a reference loads whole. The same seed kills in the same order.
"""

import collections
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import ray
import ray_zerocopy as rzc
import rays
import torch
from exact import assert_exact
from fresh import tell
from ray._private.internal_api import memory_summary

MIB = 2**20
SOON_S = 60
STORE = 300 * MIB
BUSY_S = 0.3  # about the longest of these actions, on a busy machine


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(1500, 1500) for _ in range(4)))  # 36 MB


class Worker:
    """Repeats one of these actions until it is killed."""

    def __init__(self, refs, folder):
        self.ref, self.folder, self.model = refs[0], folder, model()

    def pid(self):
        return os.getpid()

    def do(self, what):
        while True:
            getattr(self, what)()

    def put(self):
        rzc.put(self.model)

    def build(self):
        rzc.build(model)

    def save(self):
        rzc.save(self.ref, f"{self.folder}/new.rzc")

    def restore(self):
        rzc.restore(f"{self.folder}/model.rzc")

    def load(self):
        rzc.get(self.ref, prefault=False)[0](torch.ones(1500))

    def prefault(self):
        rzc.get(self.ref, prefault=True)

    def collapse(self):
        kept = ray.get(ray.put(rzc.Shared(self.model)))  # small pages, made huge a second later
        time.sleep(1.1)
        del kept


DOING = ("put", "build", "save", "restore", "load", "prefault", "collapse")
SHORT = ("put", "restore", "collapse")  # the suite runs only these: a worker takes seconds to start


class Kills:
    """A Ray with one object, its snapshot, and the state before the first kill."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.address = rays.connect(num_cpus=1, object_store_memory=STORE).address
        self.folder = tempfile.mkdtemp()
        self.source = model()
        self.ref = rzc.put(self.source)
        self.loaded = ray.get(self.ref)
        rzc.save(self.ref, f"{self.folder}/model.rzc")
        self.done = collections.Counter()
        self.kill("load")  # Ray keeps open what it opens for the first worker
        self.before = self.state() | {"threads": 0}  # the load's thread may still run

    def kill(self, what):
        worker = ray.remote(Worker).options(num_cpus=0).remote([self.ref], self.folder)
        pid = ray.get(worker.pid.remote())
        doing = worker.do.remote(what)
        time.sleep(self.random.uniform(0, 1.5 if what == "collapse" else BUSY_S))
        os.kill(pid, signal.SIGKILL)
        try:
            ray.get(doing, timeout=SOON_S)
        except ray.exceptions.ActorDiedError:
            self.done[what] += 1

    def state(self):
        """MiB in the store, names in shared memory, and this process's descriptors and threads."""
        summary = memory_summary(self.address, stats_only=True)
        descriptors = [told(os.readlink, path) for path in Path("/proc/self/fd").iterdir()]
        threads = [
            told(Path.read_text, path / "comm") for path in Path("/proc/self/task").iterdir()
        ]
        return {
            "store": int(re.search(r"usage (\d+) MiB", summary)[1]),
            "shared memory": sorted(name for name in os.listdir("/dev/shm") if "rzc" in name),
            "descriptors": sum("/dev/shm" in name or "rzc" in name for name in descriptors),
            "threads": sum(name.startswith(("rzc", "ray_zerocopy")) for name in threads),
        }

    def stands(self):
        deadline_s = time.monotonic() + SOON_S
        while (now := self.state()) != self.before:
            assert time.monotonic() < deadline_s, (now, self.before)
            time.sleep(0.1)
        assert_exact(self.source, self.loaded)
        assert_exact(self.source, ray.get(self.ref))
        left = {"model.rzc", "new.rzc"}
        for name in left & set(os.listdir(self.folder)):  # complete, or absent
            rzc.inspect(f"{self.folder}/{name}", verify=True)


def told(read, path):
    """The target of a descriptor, or the name of a thread; empty if it is gone."""
    try:
        return read(path)
    except OSError:
        return ""


def row(kills, what):
    def kill_and_look():
        kills.kill(what)
        kills.stands()

    return kill_and_look


def main(count, seed):
    kills = Kills(int(seed))
    for _ in range(int(count)):
        row(kills, kills.random.choice(DOING))()
    print(f"seed {seed}: the store, shared memory, descriptors and threads as before, all whole")
    for what, count in kills.done.most_common():
        print(f"{count:6} killed in {what}")
    ray.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        kills = Kills(0)
        tell({what: row(kills, what) for what in SHORT}, SHORT)
        ray.shutdown()
