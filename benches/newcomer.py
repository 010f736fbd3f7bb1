"""A new worker: the time from the reference to the first output, each in a new process.

A worker loads once, so its user waits for this. All imports are done before the clock starts.
"""

import importlib
import random
from dataclasses import astuple, dataclass
from statistics import median

import numpy as np
import ray
import torch
from duel import MIN_ROUNDS, settle, silence, timed
from footprint import page_table_nbytes
from rivals import PlainRay


class AtHome(PlainRay):
    """A private copy, made before the clock starts: shows the cost of a first forward alone."""

    name = "a private copy, there before"

    def arrive(self, handle):
        self.model = super().load(handle)

    def load(self, _):
        return self.model


@dataclass
class First:
    """The result of a newcomer: seconds, and the growth of its page table in bytes."""

    load: float
    output: float = np.nan
    """From the reference to the first output."""
    warm: float = np.nan
    """A forward later on."""
    page_table: float = np.nan


@ray.remote(num_cpus=0)
class Newcomer:
    """A process that has done its imports, and has loaded nothing."""

    def __init__(self, entry, kind):
        """`kind`, the model's class, is an argument because that imports it."""
        self.rival, self.handle = entry
        torch.set_num_threads(1)
        for module in self.rival.needs:
            importlib.import_module(module)
        if isinstance(self.rival, AtHome):
            self.rival.arrive(self.handle)

    def first(self, kwargs):
        before = page_table_nbytes()
        with silence():
            load, model = timed(self.rival.load, self.handle)
        if not isinstance(model, torch.nn.Module):  # the floor returns a list
            return First(load)
        with torch.inference_mode():
            forward, _ = timed(model, **kwargs)
            page_table = page_table_nbytes() - before
            warm = median(timed(model, **kwargs)[0] for _ in range(7))
        return First(load, load + forward, warm, page_table)


def time_firsts(entries, kind, kwargs, rounds=MIN_ROUNDS):
    """{rival: medians over its newcomers}.

    Newcomers start two at a time, in shuffled order. Both run as soon as both have done their
    imports, because a real worker does not wait for all others.
    """
    told = {rival.name: [] for rival, _ in entries}
    for count in range(rounds):
        order = random.Random(count).sample(entries, len(entries))
        for pair in (order[at : at + 2] for at in range(0, len(order), 2)):
            newcomers = [Newcomer.remote(entry, kind) for entry in pair]
            ray.get([newcomer.__ray_ready__.remote() for newcomer in newcomers])
            settle()
            for (rival, _), newcomer in zip(pair, newcomers, strict=True):
                told[rival.name].append(ray.get(newcomer.first.remote(kwargs)))
                ray.kill(newcomer)
    return {
        name: First(*np.median([astuple(first) for first in firsts], axis=0))
        for name, firsts in told.items()
    }
