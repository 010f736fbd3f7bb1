"""Many followers of one name: how long after a publish each of them serves the new version.

A process takes 300 MB, so at most 20 processes run, with several followers each. Every follower has
its own long poll and its own load, as in a process of its own.
"""

import os
import pickle
import time
from statistics import median
from unittest.mock import patch

import psutil
import ray
import ray_zerocopy as rzc
import subjects
from ray_zerocopy.registry import catalog, follower

SETTLE_S = 2.0  # for the last swaps, and the garbage collection after them
PATIENCE_S = 120.0


@ray.remote(num_cpus=0)
class Crowd:
    """A process with followers of a name."""

    def __init__(self, name, count):
        self.lives = [self.follow(name) for _ in range(count)]

    def follow(self, name):
        with patch.object(follower, "_FOLLOWER", follower.Follower()):
            return rzc.follow(name)

    def when(self, number):
        """When each follower first served this version, by the machine's monotonic clock."""
        waiting, seen_s = list(self.lives), []
        deadline_s = time.monotonic() + PATIENCE_S
        while waiting and time.monotonic() < deadline_s:
            behind = [live for live in waiting if live.version.number < number]
            seen_s += [time.monotonic()] * (len(waiting) - len(behind))
            waiting = behind
            time.sleep(0.005)
        return seen_s


def time_updates(processes, each, rounds=10):
    """Publish repeatedly: (seconds until half have it, until all have it, of the catalog's CPU).

    Medians, in seconds since `publish` returned.
    """
    name, count = f"followed/{processes}x{each}", processes * each
    number = rzc.publish(name, weights(0)).number
    crowds = [Crowd.remote(name, each) for _ in range(processes)]
    ray.get([crowd.__ray_ready__.remote() for crowd in crowds])
    decider, halves_s, all_s, cpu_s = process("catalog"), [], [], []
    for _ in range(rounds):
        asked = [crowd.when.remote(number + 1) for crowd in crowds]
        time.sleep(SETTLE_S)
        before_s = sum(decider.cpu_times()[:2])
        number = rzc.publish(name, weights(number)).number
        start_s = time.monotonic()
        seen_s = sorted(at - start_s for told in ray.get(asked) for at in told)
        assert len(seen_s) == count, "a follower is not told"
        halves_s.append(median(seen_s))
        all_s.append(seen_s[-1])
        cpu_s.append(sum(decider.cpu_times()[:2]) - before_s)
    for crowd in crowds:
        ray.kill(crowd)
    rzc.retire(name)
    return median(halves_s), median(all_s), median(cpu_s)


def weights(value):
    """A new model of 32 MiB."""
    model = subjects.linears(8, 1024)
    next(model.parameters()).data.fill_(value)
    return model


def process(name):
    actor = ray.get_actor(name, catalog.NAMESPACE)
    return psutil.Process(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def message_nbytes():
    """Bytes of a follower's request and of the reply, pickled, without Ray's envelope."""
    name = rzc.publish("followed/message", weights(0)).name
    asked = "0" * 32, [name]
    actor = ray.get_actor("catalog", catalog.NAMESPACE)
    told = ray.get(actor.follow.remote(*asked))[name]
    return len(pickle.dumps(asked)), len(ray.cloudpickle.dumps(told))


def time_live(count=100_000):
    """Seconds that `live()` takes while nothing changes."""
    rzc.publish("followed/still", weights(0))
    live = rzc.follow("followed/still")
    start_s = time.perf_counter()
    for _ in range(count):
        live()
    return (time.perf_counter() - start_s) / count
