"""Replicas answer as a local model would, share one block, and load one model beside another."""

import asyncio
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from models import large, simple
from ray import serve
from ray_zerocopy.serve import Loading, Replica, app, load, multiplexed
from test_memory_footprint import WORKERS, Growing, assert_each_costs_nothing
from torch import nn

SMALL = {"ray_actor_options": {"num_cpus": 0.1}}
X = np.random.default_rng(0).random((3, 16), np.float32)


@pytest.fixture(scope="module")
def url(cluster):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def post(url, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
        return json.load(response)


def refusal(*args, **kwargs):
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(*args, **kwargs)
    return raised.value.code, json.load(raised.value)["error"]


def answer(model, x=X):
    with torch.no_grad():
        return model(torch.tensor(x)).numpy()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.01)


def with_pid(output):
    return {"y": output, "pid": [os.getpid()] * len(output)}


# --- replicas -------------------------------------------------------------------------------------


def test_replicas_answer_and_take_new_weights(url):
    old, new = simple().model, simple().model
    nn.init.ones_(new[0].weight)

    def ask():
        response = post(f"{url}/model", {"x": X.tolist()})
        answers.append(np.array(response["y"], np.float32))
        pids.add(response["pid"][0])

    def deploy(model):
        replicas = app(model, num_replicas=2, postprocess=with_pid, **SMALL)
        serve.run(replicas, name="model", route_prefix="/model")

    deploy(old)
    answers, pids = [], set()
    until(lambda: ask() or len(pids) == 2)
    assert all(np.allclose(y, answer(old), atol=1e-5) for y in answers)

    answers, before = [], frozenset(pids)
    replaced = threading.Event()

    def redeploy():
        deploy(new)
        replaced.set()

    with ThreadPoolExecutor() as pool:  # requests go on meanwhile, and each has its answer
        done = pool.submit(redeploy)
        until(lambda: ask() or replaced.is_set())
        done.result()
    kinds = [[np.allclose(y, answer(m), atol=1e-5) for m in (old, new)] for y in answers]
    assert all(sum(kind) == 1 for kind in kinds)

    answers, pids = [], set()
    until(lambda: ask() or len(pids) == 2)
    assert not pids & before
    assert all(np.allclose(y, answer(new), atol=1e-5) for y in answers)
    serve.delete("model")


def test_a_followed_model_changes_under_load(url):
    """Ten updates: every request is answered, each by one version, at last by the last."""

    def filled(value):
        model = nn.Linear(16, 4)
        for parameter in model.parameters():
            nn.init.constant_(parameter, float(value))
        return model

    rzc.publish("served", filled(0))
    replicas = app(rzc.follow("served"), num_replicas=2, **SMALL)
    serve.run(replicas, name="served", route_prefix="/served")
    done, answers = threading.Event(), []

    def ask():
        while not done.is_set():
            (value,) = set(np.ravel(post(f"{url}/served", {"x": [[1.0] * 16] * 3})["output"]) / 17)
            answers.append(value)
            time.sleep(0.02)  # or the replicas have no core left to load on

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask) for _ in range(3)]
        try:
            for value in range(1, 11):
                rzc.publish("served", filled(value))
                until(lambda value=value: value in answers[-20:])
            until(lambda: set(answers[-20:]) == {10})
        finally:
            done.set()
        for client in clients:
            client.result()
    assert set(answers) <= set(range(11))
    serve.delete("served")
    rzc.retire("served")


class Measured(Growing, Replica):
    """Tells its process and what that has grown by."""

    async def growth(self, batch):
        await self.predict(batch)
        await asyncio.sleep(0.2)  # so that those who ask together ask others, too
        return os.getpid(), self.loaded, self.grown()


def test_replicas_share_one_block(url):
    ref, batch, growths = rzc.put(large().model), {"x": large().args[0].numpy()}, {}
    for count in WORKERS:
        measured = serve.deployment(Measured, num_replicas=count, max_ongoing_requests=2, **SMALL)
        handle = serve.run(measured.bind(ref), name="measured", route_prefix="/measured")
        found = {}

        while len(found) < count:
            asked = [handle.growth.remote(batch) for _ in range(2 * count)]
            found.update((pid, growth) for pid, *growth in (each.result() for each in asked))
        growths[count] = [list(moment) for moment in zip(*found.values(), strict=True)]
    assert_each_costs_nothing("replica", "request", growths)
    serve.delete("measured")


# --- many models ----------------------------------------------------------------------------------


class Gate:
    def __init__(self):
        self.opened = asyncio.Event()

    async def open(self):
        self.opened.set()

    async def wait(self):
        await self.opened.wait()


@ray.remote(num_cpus=0)
def publish_late(gate):
    ray.get(gate.wait.remote())
    return rzc.Shared(simple().model)


def test_loading_one_model_does_not_block_another(url, start):
    (gate,) = start(Gate)
    quick, late = nn.Linear(16, 4), publish_late.remote(gate)
    models = {"quick": rzc.put(quick), "other": nn.Linear(16, 4), "late": late}
    serve.run(multiplexed(models, **SMALL), name="many", route_prefix="/many")

    def ask(name):
        return post(f"{url}/many", {"x": X.tolist()}, serve_multiplexed_model_id=name)["output"]

    with ThreadPoolExecutor() as pool:
        try:
            waiting = pool.submit(ask, "late")
            time.sleep(0.5)
            for _ in range(2):
                np.testing.assert_allclose(ask("quick"), answer(quick), atol=1e-5)
                np.testing.assert_allclose(ask("other"), answer(models["other"]), atol=1e-5)
            assert not waiting.done()
        finally:
            ray.get(gate.open.remote())
        np.testing.assert_allclose(waiting.result(), answer(simple().model), atol=1e-5)

    header = {"serve_multiplexed_model_id": "quick"}
    assert refusal(f"{url}/many", {"x": []}, serve_multiplexed_model_id="none") == (
        404,
        "no model 'none'; serve_multiplexed_model_id is one of ['quick', 'other', 'late']",
    )
    for body in (b"not JSON", [1, 2], {"x": [[1], [2, 3]]}):
        code, told = refusal(f"{url}/many", body, **header)
        assert code == 400
        assert "a JSON object of columns" in told
    serve.delete("many")


# --- loading --------------------------------------------------------------------------------------


def test_what_is_loading_is_made_once_however_many_wait():
    made = []

    def make(value):
        time.sleep(0.05)
        made.append(value)
        return made

    async def wait():
        loading = Loading(make, 1)
        gone = asyncio.ensure_future(asyncio.wait_for(loading, 0.01))
        together = await asyncio.gather(gone, loading, loading, return_exceptions=True)
        return [*together, await loading]

    gone, *others = asyncio.run(wait())
    assert isinstance(gone, TimeoutError)
    assert others == [[1]] * 3


def test_what_failed_to_load_is_tried_again():
    tries = iter([OSError("no"), "model"])

    def make():
        made = next(tries)
        if isinstance(made, Exception):
            raise made
        return made

    async def wait():
        loading = Loading(make)
        with pytest.raises(OSError, match="no"):
            await loading
        return [await loading, await loading]

    assert asyncio.run(wait()) == ["model", "model"]


def test_load_says_how(cluster):
    loaded = asyncio.run(load(rzc.put(simple().model), device="meta"))
    assert all(parameter.is_meta for parameter in loaded.parameters())
