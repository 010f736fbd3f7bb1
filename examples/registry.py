"""Publish a model under a name, follow it, and replace its weights while replicas run.

Run it with `python examples/registry.py`.
"""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray
import ray_zerocopy as rzc
import torch
from ray import serve


def linear(weight):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    return model


@ray.remote(num_cpus=0)
class User:
    """Answers with the current version."""

    def __init__(self, live):
        self.live = live

    def predict(self, x):
        model = self.live()  # once per request: an attribute read
        return self.live.version.number, model(torch.tensor(x)).item()


def wait_for(user, number):
    while ray.get(user.predict.remote([1.0, 1.0]))[0] != number:
        time.sleep(0.01)


def serve_under_load():
    """Send requests to replicas while versions change: every request is answered."""
    replicas = rzc.serve.app(
        rzc.follow("examples/linear"), num_replicas=2, ray_actor_options={"num_cpus": 0.1}
    )
    handle = serve.run(replicas, name="linear", route_prefix=None)
    batch, answers = {"x": np.ones((1, 2), np.float32)}, []
    with ThreadPoolExecutor() as pool:
        for weight in (3.0, 4.0):
            make = functools.partial(linear, weight)
            new = pool.submit(rzc.publish, "examples/linear", make=make, keep=4)
            while not (new.done() and new.result() and answers[-8:] == [2 * weight] * 8):
                responses = [handle.predict.remote(batch) for _ in range(4)]
                answers += [response.result()["output"].item() for response in responses]
    print(f"{len(answers)} requests answered by {sorted(set(answers))}, one version each")
    serve.shutdown()


def main():
    # The cluster calls `make`, and calls it again if the block is lost.
    version = rzc.publish("examples/linear", make=lambda: linear(1.0))
    print(f"published {version.name} {version.number}, heals: {version.heals}")

    user = User.remote(rzc.follow("examples/linear"))
    print("version, answer:", ray.get(user.predict.remote([1.0, 2.0])))

    # Followers get the new weights without a restart.
    number = rzc.publish("examples/linear", make=lambda: linear(2.0)).number
    wait_for(user, number)
    print("version, answer:", ray.get(user.predict.remote([1.0, 2.0])))

    # Go back in one step: the cluster keeps the last two versions.
    rzc.promote("examples/linear", version.number)
    wait_for(user, version.number)
    print("version, answer:", ray.get(user.predict.remote([1.0, 2.0])))

    serve_under_load()

    for each in rzc.versions("examples/linear"):
        print(each.number, each.state, "current" if each.current else "", f"{each.nbytes:,} bytes")
    rzc.retire("examples/linear")


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
