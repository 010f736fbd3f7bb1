"""One small Ray for the whole run, actors in it, and the ways to make views."""

import os
from pathlib import Path

import pytest
import ray
import rays
import torch
from ways import WAYS, made_by

# Workers import the tests' functions by name, so this folder must be on their path.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # at 15 they wait for all other processes
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch.set_num_threads(1)  # as in Ray's workers: it changes the last bits of a sum


@pytest.fixture(scope="session")
def cluster():
    """A Ray of four logical CPUs and a store of 700 MB; its address."""
    cluster = rays.started(num_cpus=4, object_store_memory=700_000_000)
    try:
        ray.init(cluster.address, log_to_driver=False)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def start(cluster):
    """Start actors: `start(Actor, 2)` gives two, gone at the end of the file."""
    actors = []

    def start(cls, count=1):
        new = [ray.remote(cls).options(num_cpus=0).remote() for _ in range(count)]
        actors.extend(new)
        return new

    yield start
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(params=WAYS)
def way(request):
    """How this process makes views; `made_by` tells others."""
    with made_by(request.param):
        yield request.param
