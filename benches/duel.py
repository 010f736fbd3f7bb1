"""Rivals against each other: in one process, in turns, in shuffled order, judged by medians.

A machine that others use too changes its speed by the second. Only what is measured within the same
second can be compared, so every round times each rival once, and ratios are between medians.
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
SLOW_RATIO = 8  # times the fastest; what takes longer sits out four rounds of five
MIN_ROUNDS = 20


@contextmanager
def session(store_nbytes):
    """A Ray of our own whose workers find what lies in benches/ and tests/.

    Ray gives its workers niceness 15; here they have none, or on a busy machine what runs in this
    process would be the faster by that.
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
    """Write to the store's pages once, so that nobody later pays the kernel for fresh ones.

    What this spares is for all to find pages, and for this process to find them mapped.
    """
    nbytes = ray.cluster_resources()["object_store_memory"]
    ray.put(np.zeros(int(nbytes * 0.9), np.uint8))
    settle()


def settle():
    """Let the raylet take back what was dropped; it hears of it asynchronously."""
    time.sleep(0.05)


def silence():
    """Without the warnings that rivals raise on a first load, about arrays that are read-only."""
    return warnings.catch_warnings(action="ignore")


def enlist(rivals, model):
    """Publish and load with every rival: who can, as (rival, handle), and why others cannot."""
    entries, refusals = [], {}
    for rival in rivals:
        try:
            handle = rival.publish(rival.prepare(model))
            with silence():
                check(model, rival.load(handle))
            entries.append((rival, handle))
        except Exception as error:  # whatever a rival raises is a row of the table
            refusals[rival.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return entries, refusals


def check(model, loaded):
    """Every weight is what it was, to the bit; the floor returns a list, without names to go by."""
    if isinstance(loaded, torch.nn.Module):
        state = loaded.state_dict()
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor, state[name]):
                raise ValueError(f"{name} is not what it was")


def time_loads(entries, seconds):
    """Seconds of each load, {name: [seconds]}; the collector runs as users have it."""
    with silence():
        for rival, handle in entries:
            rival.load(handle)
        return take_turns(entries, lambda rival, handle: rival.load(handle), seconds)


def time_publishes(rivals, model, seconds):
    """Seconds of each publish, {name: [seconds]}; what is published goes before the next begins."""
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
    """A model's handle, for as long as it is wanted."""
    handle = rival.publish(rival.prepare(model))
    try:
        yield handle
    finally:
        rival.withdraw(handle)


def publish_growth(rival, model):
    """By how many bytes private memory (RssAnon) of this process grows, at most, in a publish."""
    ready = rival.prepare(model)
    handle, growth = with_peak(lambda: rival.publish(ready))
    rival.withdraw(handle)
    return growth


@ray.remote(num_cpus=0)
class Worker:
    """A process that loads, each rival once before a clock starts, or one that publishes."""

    def time_loads(self, entries, seconds):
        return time_loads(entries, seconds)

    def time_publishes(self, rivals, subject, seconds):
        model = subjects.build(subject)  # first, as in a process that does nothing else
        touch_store()
        return time_publishes(rivals, model, seconds)

    def keep(self, entry):
        """Load, read every weight, and keep what was loaded; gives the load's seconds."""
        rival, handle = entry
        with silence():
            rival.load(handle)  # what is imported on the way is not counted
            self.before, self.page_table = unique_set_size(), page_table_nbytes()
            elapsed, self.kept = timed(rival.load, handle)
        for tensor in self.kept if isinstance(self.kept, list) else self.kept.state_dict().values():
            tensor.detach().max()
        return elapsed

    def page_table_growth(self):
        return page_table_nbytes() - self.page_table

    def growth(self):
        """Bytes of unique set size gained since just before the load; free heap is not counted."""
        return unique_set_size() - self.before

    def drop(self):
        self.kept = None
        trim()
