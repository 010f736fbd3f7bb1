"""A worker that is new: from having the reference to the first output, each time in a new process.

A worker loads once, so this is what its user waits for. Imports are over before the clock starts.
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
    """A copy in private memory before the clock starts: how slow a first forward is by itself."""

    name = "a private copy, there before"

    def arrive(self, handle):
        self.model = super().load(handle)

    def load(self, _):
        return self.model


@dataclass
class First:
    """What a newcomer has to tell: seconds, and bytes by which its page table grew."""

    load: float
    output: float = np.nan
    """From the reference to the first output."""
    warm: float = np.nan
    """A forward later on."""
    page_table: float = np.nan


@ray.remote(num_cpus=0)
class Newcomer:
    """A process that has imported what it will need, and has loaded nothing."""

    def __init__(self, entry, kind):
        """`kind`, the class of the model, is imported by being an argument."""
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
        if not isinstance(model, torch.nn.Module):  # the floor's list
            return First(load)
        with torch.inference_mode():
            forward, _ = timed(model, **kwargs)
            page_table = page_table_nbytes() - before
            warm = median(timed(model, **kwargs)[0] for _ in range(7))
        return First(load, load + forward, warm, page_table)


def time_firsts(entries, kind, kwargs, rounds=MIN_ROUNDS):
    """{rival: the medians of what its newcomers tell}.

    Newcomers start two at a time, in shuffled order, and have their turns as soon as both have
    imported what they need: a worker does not wait for all others.
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
