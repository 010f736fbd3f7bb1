"""Actors that share one model, and the private memory of each.

Run it with `python examples/actors.py`.
"""

import os
from pathlib import Path

import ray
import torch
from ray_zerocopy import ModelWrapper


@ray.remote(num_cpus=0.5)
class Worker:
    def __init__(self, wrapper):
        before = private_memory()
        self.model = wrapper.load()
        self.cost = private_memory() - before

    def predict(self, x):
        with torch.inference_mode():
            return self.model(x)

    def report(self):
        return os.getpid(), self.cost


def private_memory():
    """Bytes of this process that no other process shares."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main():
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(16)])
    wrapper = ModelWrapper.from_model(model)  # stores the weights once
    workers = [Worker.remote(wrapper) for _ in range(2)]  # the wrapper is a few hundred bytes

    batches = torch.randn(6, 32, 1024)
    calls = [workers[i % 2].predict.remote(batch) for i, batch in enumerate(batches)]
    assert torch.allclose(torch.stack(ray.get(calls)), model.eval()(batches), atol=1e-5)

    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    print(f"the model: {nbytes / 2**20:.1f} MiB")
    for pid, cost in ray.get([worker.report.remote() for worker in workers]):
        print(f"process {pid}: loading it took {cost / 2**20:.1f} MiB of memory of its own")


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
