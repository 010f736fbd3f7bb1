"""Ray Serve: share one model among replicas, replace its weights, serve many models per replica.

Run it with `python examples/serve.py`.
"""

import json
import socket
import urllib.request

import ray
import ray_zerocopy as rzc
import torch
from ray import serve
from ray_zerocopy.serve import Loading, app

LIGHT = {"ray_actor_options": {"num_cpus": 0.1}}


@serve.deployment(**LIGHT)
class ManyModels:
    """A class of your own: with `Loading`, several models load at the same time."""

    def __init__(self, refs):
        self.refs = refs

    @serve.multiplexed(max_num_models_per_replica=100)
    async def model(self, name):
        return Loading(rzc.get, self.refs[name])

    async def __call__(self, request):
        model = await (await self.model(serve.get_multiplexed_model_id()))
        with torch.inference_mode():
            return model(torch.tensor(await request.json())).tolist()


def post(url, body, **headers):
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def linear(weight):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    return model


def main():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    url = f"http://127.0.0.1:{port}"

    # Two replicas share one block. Then replace the weights without downtime.
    for weight in (1.0, 2.0):
        serve.run(app(linear(weight), num_replicas=2, **LIGHT), name="one", route_prefix="/one")
        print(f"weights {weight}:", post(f"{url}/one", {"x": [[1.0, 2.0], [3.0, 4.0]]}))

    # One replica serves many models, and loads each at its first request.
    refs = {name: rzc.put(linear(weight)) for name, weight in {"a": 3.0, "b": 4.0}.items()}
    serve.run(ManyModels.bind(refs), name="many", route_prefix="/many")
    for name in refs:
        answer = post(f"{url}/many", [[1.0, 2.0]], serve_multiplexed_model_id=name)
        print(f"model {name}:", answer)
    serve.shutdown()


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
