"""One small Ray for the whole run, and models published in it."""

import os
from pathlib import Path

import pytest
import ray
import torch
from ray_zerocopy.objects import tensors

# Workers import what tests define by name, so they need this folder on their path, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # at 15 they wait for all
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch.set_num_threads(1)  # as in Ray's workers: how a sum is split decides its last bits


@pytest.fixture(scope="session")
def cluster():
    """A Ray of four logical CPUs and a store of 700 MB."""
    ray.init(
        address="local",  # and not whichever cluster the machine has
        num_cpus=4,
        object_store_memory=700_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def way(request):
    """The way in which this process and what `start` starts make views: torch's best, or a file's.

    A file says it by `pytest.mark.parametrize("way", ..., indirect=True, scope="module")`.
    """
    best, tensors.way = tensors.way, getattr(request, "param", tensors.way)
    yield tensors.way
    tensors.way = best


@pytest.fixture(scope="module")
def start(cluster, way):
    """Start actors: `start(Actor, 2)` gives two, gone at the end of the file."""
    actors = []

    def make_views(actor, way):
        tensors.way = way

    def start(cls, count=1):
        new = [ray.remote(cls).options(num_cpus=0).remote() for _ in range(count)]
        actors.extend(new)
        ray.get([actor.__ray_call__.remote(make_views, way) for actor in new])
        return new

    yield start
    for actor in actors:
        ray.kill(actor)
