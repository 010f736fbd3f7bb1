"""One small Ray for the whole run, workers in it that tests share, and the ways of making views."""

import os
from pathlib import Path

import pytest
import ray
import torch
from hosts import Guest, Host
from ways import WAYS, made_by

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


@pytest.fixture(scope="session")
def hosts(cluster):
    """The workers that serve all tests, as many as one of them has needed so far."""
    return []


@pytest.fixture(scope="module")
def start(hosts):
    """Put objects into workers: `start(Reader, 2)` gives two, gone at the end of the file."""
    guests = []

    def start(cls, count=1):
        while len(hosts) < count:
            hosts.append(ray.remote(Host).options(num_cpus=0).remote())
        new = [Guest(host, cls) for host in hosts[:count]]
        guests.extend(new)
        return new

    yield start
    for guest in guests:
        guest.leave()


@pytest.fixture(params=WAYS)
def way(request):
    """How this process makes views; `made_by` tells others."""
    with made_by(request.param):
        yield request.param
