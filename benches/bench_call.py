"""Calls as tasks, by pytest-benchmark: `pytest benches/bench_call.py --benchmark-only`.

The baseline is the sum of an empty task and a forward in the caller. On a busy machine use
`report.py`, where the ways take turns.
"""

import math
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import ray
import ray_zerocopy as rzc
import torch
from duel import take_turns
from models import bert_base
from ray_zerocopy.invoke import call_model


class Way(NamedTuple):
    """One way to run a model on `case`: from our `block`, or as a `plain` object of Ray."""

    name: str
    call: object


@ray.remote
def empty():
    pass


@ray.remote
def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)


TASK = Way("an empty task", lambda case, block, plain: ray.get(empty.remote()))
HOME = Way("a forward in the caller", lambda case, block, plain: case.run())
CALL = Way(
    "call_model",
    lambda case, block, plain: ray.get(call_model.remote(block, case.args, case.kwargs)),
)
LOADING = Way(
    "a task that loads from rzc.put",
    lambda case, block, plain: ray.get(forward.remote(block, case.kwargs)),
)
PLAIN = Way(
    "a task that loads from ray.put",
    lambda case, block, plain: ray.get(forward.remote(plain, case.kwargs)),
)
WAYS = (TASK, HOME, CALL, LOADING, PLAIN)


@contextmanager
def arguments():
    """Return the arguments of every way. The caller gets the threads of a task with one CPU."""
    case, threads = bert_base(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield case, rzc.put(case.model), ray.put(case.model)
    finally:
        torch.set_num_threads(threads)


def time_calls(seconds):
    """Seconds of each way, measured in turns: {name: [seconds]}."""
    with arguments() as taken:
        for way in WAYS:
            way.call(*taken)
        entries = [(way, taken) for way in WAYS]
        return take_turns(
            entries, lambda way, taken: way.call(*taken), seconds, slow_ratio=math.inf
        )


@pytest.fixture(scope="module")
def taken():
    with arguments() as taken:
        yield taken


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_call(benchmark, taken, way):
    benchmark.group = "call BERT-base"
    benchmark.pedantic(way.call, args=taken, rounds=10, warmup_rounds=2)
