"""Run a model in Ray tasks: one model in the store, as many calls at once as there are CPUs.

Run it with `python examples/tasks.py`.
"""

import os

import ray
import torch
from ray_zerocopy import ModelWrapper


class Scorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh())
        self.head = torch.nn.Linear(256, 1)

    def forward(self, x):
        return self.head(self.net(x)).sigmoid()

    def process(self):
        return os.getpid()


class Pipeline:
    """A model with preprocessing and postprocessing."""

    def __init__(self):
        self.model, self.threshold = Scorer(), 0.5

    def __call__(self, x):
        return self.model(x) > self.threshold


def main():
    pipeline, batches = Pipeline(), torch.randn(8, 32, 64)
    fast = ModelWrapper.for_tasks(pipeline, method_names=["process"])

    # The pipeline's code is unchanged: each call of its model runs as a task.
    assert torch.equal(fast(batches[0]), pipeline(batches[0]))

    # Many calls at once: `.remote` returns references.
    scores = ray.get([fast.model.remote(batch) for batch in batches])
    print(f"{sum(map(len, scores))} rows scored, mean {torch.cat(scores).mean():.3f}")

    # Other methods than `__call__`, named in `method_names`.
    print(f"here is process {os.getpid()}, the model ran in {fast.model.process()}")


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
