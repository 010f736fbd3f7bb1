"""Calls as tasks, by pytest-benchmark: `pytest benches/bench_call.py --benchmark-only`.

`python benches/bench_call.py` has the ways take turns, which a busy machine needs, and prints what
a call costs beside what it cannot do without: an empty task, and a forward at home. Ray gives its
workers niceness 15; here they have none, or on a busy machine home would be the faster by that.
"""

import os
import random
import sys
from pathlib import Path
from statistics import median

import pytest
import ray
import ray_zerocopy as rzc
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from duel import session, silence, timed
from models import bert_base
from ray_zerocopy.invoke import call_model

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray spells it so
GIB = 1 << 30
ROUNDS = 40


@ray.remote
def empty():
    pass


@ray.remote
def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)


def an_empty_task(case, block, plain):
    return ray.get(empty.remote())


def a_forward_at_home(case, block, plain):
    return case.run()


def a_call(case, block, plain):
    return ray.get(call_model.remote(block, case.args, case.kwargs))


def a_task_that_loads(case, block, plain):
    return ray.get(forward.remote(block, case.kwargs))


def a_task_that_loads_by_ray(case, block, plain):
    return ray.get(forward.remote(plain, case.kwargs))


PARTS = (an_empty_task, a_forward_at_home)
WAYS = (*PARTS, a_call, a_task_that_loads, a_task_that_loads_by_ray)


def published(case):
    """The arguments of every way; threads as in a task of one CPU."""
    torch.set_num_threads(1)
    return case, rzc.put(case.model), ray.put(case.model)


@pytest.fixture(scope="module")
def arguments():
    with session(4 * GIB), silence():
        yield published(bert_base())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_call(benchmark, arguments, way):
    benchmark.group = "call BERT-base"
    benchmark.pedantic(way, args=arguments, rounds=10, warmup_rounds=2)


def race(case, ways=(*PARTS, a_call, a_task_that_loads), rounds=ROUNDS):
    """Median seconds of each way, {name: seconds}."""
    arguments = published(case)
    times = {way.__name__: [] for way in ways}
    for count in range(-2, rounds):
        for way in random.Random(count).sample(ways, len(ways)):
            elapsed, _ = timed(way, *arguments)
            if count >= 0:
                times[way.__name__].append(elapsed)
    return {name: median(seconds) for name, seconds in times.items()}


def main():
    with session(4 * GIB), silence():
        seconds = race(bert_base())
    parts = sum(seconds[way.__name__] for way in PARTS)
    print(f"BERT-base, two sequences of 7 tokens; medians of {ROUNDS} rounds in turns")
    for name, median_s in seconds.items():
        print(f"{name.replace('_', ' '):30}{1e3 * median_s:8.2f} ms{median_s / parts:8.2f} x parts")


if __name__ == "__main__":
    main()
