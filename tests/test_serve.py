"""Replicas answer like a local model, share one block, and load several models."""

import asyncio
import json
import os
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
from rays import free_port
from test_memory_footprint import WORKERS, Growing, assert_each_costs_nothing
from torch import nn

SMALL = {"ray_actor_options": {"num_cpus": 0.1}}
X = np.random.default_rng(0).random((3, 16), np.float32)


@pytest.fixture(scope="module")
def url(cluster):
    port = free_port()
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

    with ThreadPoolExecutor() as pool:  # requests continue meanwhile, and each is answered
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
    """Ten updates: every request is answered by one version, the last requests by the last one."""

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
            time.sleep(0.02)  # else the replicas have no core left to load on

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
    """Reports its process and the growth of that."""

    async def growth(self, batch):
        await self.predict(batch)
        await asyncio.sleep(0.2)  # so that concurrent requests reach other replicas, too
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


# --- columns and requests -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployed(url):
    """Deploy an application under its own name. Returns its URL and handle."""
    names = []

    def deploy(application):
        names.append(f"app{len(names)}")
        path = f"/{names[-1]}"
        return f"{url}{path}", serve.run(application, name=names[-1], route_prefix=path)

    yield deploy
    for name in names:
        serve.delete(name)


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2).double()
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, left, right):
        return self.linear(left) / right.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"not JSON", "the body is not JSON: "),
        (b"[" * 100_000, "the body is not JSON: "),
        ([1, 2], "the body is a list, not a JSON object of columns"),
        ({"left": 1, "right": [1]}, "column 'left' is a int, not a list of rows"),
        ({"left": [[1.0, 2.0]], "right": []}, "columns have unequal numbers of rows: "),
        ({"left": [[1.0, 2.0]]}, "model refused 'left' (float64[1, 2]): TypeError: "),
        ({}, "model refused a batch without columns: TypeError: "),
        ({"left": [[1.0]], "right": [[1.0]]}, "model refused 'left' (float64[1, 1]), 'right' "),
        ({"left": ["a"], "right": [[1.0]]}, "model refused 'left' (<U1[1]), 'right' (float64[1"),
        ({"left": [[1.0, "a"]], "right": [[1]]}, "model refused 'left' (object[1]), 'right' "),
        ({"left": [[1.0], [1.0, 2.0]], "right": [1, 2]}, "column 'left' (object) holds rows of 1"),
        ({"left": [[1.0, None]], "right": [1]}, "column 'left' (object) holds None beside numbers"),
        ({"left": [[1.0, 2.0]], "right": [[1.0]], "more": [1]}, "model refused 'left' "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_clients_mistake_is_status_400_and_told(body, told, add):
    code, error = refusal(add[0], body)
    assert code == 400
    assert error.startswith(told), error


def test_replicas_answer_with_a_variant(deployed):
    torch.manual_seed(0)
    trunk = nn.Linear(512, 512).eval()
    head = nn.Sequential(nn.Linear(16, 512), trunk).eval()
    base = rzc.put(trunk)
    ref = rzc.put(head, base=base)
    assert rzc.inspect(ref).base_nbytes > 0
    url, handle = deployed(app(ref, **SMALL))
    del base, ref
    assert np.array_equal(handle.predict.remote({"input": X}).result()["output"], answer(head))
    assert np.allclose(post(url, {"input": X.tolist()})["output"], answer(head))


@pytest.fixture(scope="module")
def add(deployed):
    return deployed(app(Add(), **SMALL))


def test_a_float64_model_keeps_its_precision(add):
    assert post(add[0], {"left": [[0.1, 0.2]], "right": [[1.0]]}) == {"output": [[0.1, 0.2]]}
    left = np.array([[0.1, 0.2]])
    assert add[1].predict.remote({"left": left, "right": left * 0 + 0.5}).result()[
        "output"
    ].tolist() == [[0.1, 0.2]]


def test_null_stands_for_what_json_lacks(add):
    assert post(add[0], {"left": [[0.0, 1.0]], "right": [[0.0]]}) == {"output": [[None, None]]}


def test_a_handle_raises_what_http_answers(add):
    with pytest.raises(rzc.InputError, match=r"model refused 'left' \(float64\[1, 3\]\)"):
        add[1].predict.remote({"left": np.ones((1, 3)), "right": np.ones((1, 1))}).result()


class Recurrent(nn.Module):
    """Keeps the request in a buffer while it computes, like a cache of keys and values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 1))

    def forward(self, x):
        self.kept[:] = x
        time.sleep(0.01)
        return self.kept


def served_as(kind, model, **options):
    """The model alone, and as one of many."""
    if kind == "app":
        return app(model, **options)
    return multiplexed({"one": model, "other": model}, **options)


@pytest.mark.parametrize("kind", ["app", "multiplexed"])
def test_requests_at_once_are_not_mixed(kind, deployed):
    _, handle = deployed(served_as(kind, Recurrent(), max_ongoing_requests=100, **SMALL))
    handle = handle.options(multiplexed_model_id="one") if kind == "multiplexed" else handle
    asked = [handle.predict.remote({"x": np.full((1, 1), float(i))}) for i in range(75)]
    assert [each.result()["output"].item() for each in asked] == list(range(75))


shared = []


def note(batch):
    """A hook that counts concurrent calls, as a tokenizer of transformers would need to."""
    shared.append(None)
    time.sleep(0.01)
    return {"x": np.full((1, 1), float(len(shared)))}


def forget(output):
    shared.pop()
    return output


def most(kind, deployed, **options):
    how = {"preprocess": note, "postprocess": forget, "max_ongoing_requests": 100}
    _, handle = deployed(served_as(kind, nn.Identity(), **how, **options, **SMALL))
    names = ["one", "other"] if kind == "multiplexed" else [""]
    handles = [handle.options(multiplexed_model_id=name) for name in names]
    asked = [h.predict.remote({"x": np.ones((1, 1))}) for _ in range(20) for h in handles]
    return max(each.result()["output"].item() for each in asked)


@pytest.mark.parametrize("kind", ["app", "multiplexed"])
def test_one_request_runs_at_a_time_or_as_many_as_asked(kind, deployed):
    assert most(kind, deployed) == 1
    assert 1 < most(kind, deployed, max_ongoing_forwards=3) <= 3


def test_less_than_one_is_refused(cluster):
    for kind in ("app", "multiplexed"):
        with pytest.raises(ValueError, match="max_ongoing_forwards must be 1 or more, not 0"):
            served_as(kind, nn.Identity(), max_ongoing_forwards=0)


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


def test_loading_one_model_does_not_block_another(url, monkeypatch):
    monkeypatch.setattr(rzc.serve, "keep", rzc.serve.wrap)  # it waits for the late one
    gate = ray.remote(Gate).options(num_cpus=0).remote()
    quick, late = nn.Linear(16, 4), publish_late.remote(gate)
    models = {"quick": rzc.put(quick), "other": nn.Linear(16, 4), "late": late}
    handle = serve.run(multiplexed(models, **SMALL), name="many", route_prefix="/many")

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
    with pytest.raises(rzc.InputError, match="no model 'none'; serve_multiplexed_model_id is one"):
        handle.options(multiplexed_model_id="none").predict.remote({"x": X}).result()
    with pytest.raises(rzc.InputError, match="no model ''"):
        handle.predict.remote({"x": X}).result()
    code, told = refusal(f"{url}/many", {"x": [[1.0] * 3]}, **header)
    assert (code, told.startswith("model refused 'x' (float32[1, 3]): ")) == (400, True)
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
