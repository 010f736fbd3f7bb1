"""Compare rivals by medians: in one process, in turns, in shuffled order.

The speed of a shared machine changes by the second, so only measurements of the same second can be
compared. Each round times every rival once. Ratios are between medians.
"""

import os
import random
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
import subjects
import torch
from footprint import page_table_nbytes, trim, unique_set_size, with_peak

ROOT = Path(__file__).resolve().parent.parent
SLOW_RATIO = 8  # times the fastest: slower rivals skip four of five rounds
MIN_ROUNDS = 20


@contextmanager
def session(store_nbytes):
    """Start a Ray whose workers can import from benches/ and tests/.

    Ray gives its workers niceness 15. Here they have 0, because otherwise, on a busy machine, this
    process would be faster than its workers.
    """
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
    path = os.pathsep.join(str(ROOT / folder) for folder in ("benches", "tests"))
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=store_nbytes,
        include_dashboard=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def touch_store():
    """Write to the store's pages once, so that no rival pays the kernel for fresh ones.

    Afterwards all processes find the pages in memory, and this process has them mapped.
    """
    nbytes = ray.cluster_resources()["object_store_memory"]
    ray.put(np.zeros(int(nbytes * 0.9), np.uint8))
    settle()


def settle():
    """Wait until the raylet has freed dropped objects: it is told asynchronously."""
    time.sleep(0.05)


def silence():
    """Suppress the warnings about read-only arrays that rivals raise on a first load."""
    return warnings.catch_warnings(action="ignore")


def enlist(rivals, model):
    """Publish and load with every rival. Returns [(rival, handle)], and {rival: error}."""
    entries, refusals = [], {}
    for rival in rivals:
        try:
            handle = rival.publish(rival.prepare(model))
            with silence():
                check(model, rival.load(handle))
            entries.append((rival, handle))
        except Exception as error:  # any error of a rival is a row of the table
            refusals[rival.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return entries, refusals


def check(model, loaded):
    """Assert that every weight is equal to the bit. The floor returns a list, without names."""
    if isinstance(loaded, torch.nn.Module):
        state = loaded.state_dict()
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor, state[name]):
                raise ValueError(f"{name} is not what it was")


def time_loads(entries, seconds):
    """Seconds of each load, {name: [seconds]}. The garbage collector runs as it does for users."""
    with silence():
        for rival, handle in entries:
            rival.load(handle)
        return take_turns(entries, lambda rival, handle: rival.load(handle), seconds)


def time_publishes(rivals, model, seconds):
    """Seconds of each publish, {name: [seconds]}. Each object is freed before the next publish."""
    entries = [(rival, rival.prepare(model)) for rival in rivals]
    return take_turns(
        entries,
        lambda rival, ready: rival.publish(ready),
        seconds,
        before=settle,
        after=lambda rival, handle: rival.withdraw(handle),
    )


def timed(function, *arguments, **keywords):
    start = time.perf_counter()
    result = function(*arguments, **keywords)
    return time.perf_counter() - start, result


def nothing(*_):
    pass


def take_turns(entries, act, seconds, before=nothing, after=nothing, slow_ratio=SLOW_RATIO):
    """Time `act(rival, subject)` in turns; `before` and `after` are off the clock."""

    def turn(rival, subject):
        before()
        elapsed, result = timed(act, rival, subject)
        after(rival, result)
        return elapsed

    times, slow = {rival.name: [] for rival, _ in entries}, set()
    deadline = time.perf_counter() + seconds
    count = 0
    while count < MIN_ROUNDS or time.perf_counter() < deadline:
        for rival, subject in random.Random(count).sample(entries, len(entries)):
            if rival.name not in slow or count % 5 == 0:
                times[rival.name].append(turn(rival, subject))
        if count == 1:  # one sample may have met a full garbage collection
            best = {name: min(samples) for name, samples in times.items()}
            slow = {name for name in best if best[name] > slow_ratio * min(best.values())}
        count += 1
    return times


@contextmanager
def shared(rival, model):
    """Publish a model, and withdraw it at the end."""
    handle = rival.publish(rival.prepare(model))
    try:
        yield handle
    finally:
        rival.withdraw(handle)


def publish_growth(rival, model):
    """Peak growth of this process's private memory (RssAnon) in a publish, in bytes."""
    ready = rival.prepare(model)
    handle, growth = with_peak(lambda: rival.publish(ready))
    rival.withdraw(handle)
    return growth


@ray.remote(num_cpus=0)
class Worker:
    """A process that loads (each rival once before it is timed) or publishes."""

    def time_loads(self, entries, seconds):
        return time_loads(entries, seconds)

    def time_publishes(self, rivals, subject, seconds):
        model = subjects.build(subject)  # first, as in a process that only publishes
        touch_store()
        return time_publishes(rivals, model, seconds)

    def keep(self, entry):
        """Load, read every weight, and keep the model. Returns the seconds of the load."""
        rival, handle = entry
        with silence():
            rival.load(handle)  # imports are not counted
            self.before, self.page_table = unique_set_size(), page_table_nbytes()
            elapsed, self.kept = timed(rival.load, handle)
        for tensor in self.kept if isinstance(self.kept, list) else self.kept.state_dict().values():
            tensor.detach().max()
        return elapsed

    def page_table_growth(self):
        return page_table_nbytes() - self.page_table

    def growth(self):
        """Bytes of unique set size gained since the load began, without free heap."""
        return unique_set_size() - self.before

    def drop(self):
        self.kept = None
        trim()
