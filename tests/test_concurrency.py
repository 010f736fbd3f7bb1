"""Concurrent, after forks, on other threads, at exit: every load is whole, and nothing leaks.

Threads run for SECONDS: a few here, more if the environment variable is set.
"""

import asyncio
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import ray_zerocopy as rzc
import torch
from fresh import run
from test_store import resident_at, wait_until_gone
from torch.utils.data import DataLoader, Dataset

SECONDS, THREADS = float(os.environ.get("SECONDS", 4)), 16


def test_threads_put_get_drop_and_follow_at_once(cluster):
    """Each thread also loads the others' objects, in every way. The first one publishes."""
    rzc.publish("threads", torch.zeros(2**18))
    live, shared = rzc.follow("threads"), [rzc.put(torch.full((3, 2**18), -1.0))]
    until_s = time.monotonic() + SECONDS

    def go_on(thread):
        numbers, rounds = random.Random(thread), 0
        while time.monotonic() < until_s:
            value = float(1000 * rounds + thread)
            ref = rzc.put(torch.full((numbers.choice([1, 1000, 2**18]),), value))
            shared.append(ref)
            if len(shared) > 20:
                del shared[0]
            how = {"isolation": numbers.choice(["private", "shared", "copy"])}
            how["prefault"] = numbers.choice([True, False])
            assert bool((rzc.get(ref, **how) == value).all())
            other = rzc.get(numbers.choice(shared))
            assert other.min() == other.max()
            if thread == 0:
                rzc.publish("threads", torch.full((2**18,), value))
            followed = live()
            assert followed.min() == followed.max()
            rounds += 1
        return rounds

    with ThreadPoolExecutor(THREADS) as pool:
        assert min(pool.map(go_on, range(THREADS))) > 0
    assert live.version.number > 1
    rzc.retire("threads")
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("rzc") and name != "rzc.cycles"]


class Rows(Dataset):
    """Its items come from a model loaded before the fork of the workers."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return self.model[row].sum()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_workers_of_a_data_loader_read_a_loaded_model(cluster, context):
    """Forked workers have its pages. To spawned ones torch sends a copy in shared memory."""
    model = torch.randn(8, 2**18)
    loaded = ray.get(rzc.put(model))
    loader = DataLoader(Rows(loaded), num_workers=2, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), model.sum(1))
    assert torch.equal(loaded, model)


class Loader:
    """An actor of coroutines, several of which load at once."""

    async def sums(self, refs):
        return [float(each.sum()) for each in await asyncio.gather(*map(rzc.aio.get, refs))]


def test_the_coroutines_of_an_actor_load_at_once(cluster):
    loader = ray.remote(Loader).options(num_cpus=0).remote()
    refs = [rzc.put(torch.full((2**18,), float(value))) for value in range(8)]
    answers = ray.get([loader.sums.remote(refs) for _ in range(8)])
    assert answers == [[value * 2.0**18 for value in range(8)]] * 8


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_write_after_a_fork_stays_with_its_process(cluster):
    model = torch.randn(2**18)
    ref = rzc.put(model)
    loaded = rzc.get(ref, prefault=True)  # the prefault thread does not exist in the child

    def child():
        whole = torch.equal(loaded, model)
        loaded.zero_()
        os._exit(0 if whole and not loaded.any() else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(loaded, model)
    assert torch.equal(ray.get(ref), model)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_lets_go_of_pages_that_its_parent_was_filling(cluster):
    ref = ray.put(rzc.Shared(torch.zeros(2**24)))
    held = [rzc.get(ref)]  # its thread waits a second before it makes pages huge

    def child():
        held.clear()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert not held[0].any()


def test_the_last_tensor_goes_on_a_foreign_thread(cluster):
    held = [rzc.get(rzc.put(torch.ones(2**20)), prefault=True)]
    address = held[0].data_ptr()
    assert resident_at(address) is not None
    threading.Thread(target=held.clear).start()
    wait_until_gone(address)


def test_an_interpreter_ends_while_its_threads_are_at_work(cluster):
    def leave():
        import ray
        import ray_zerocopy as rzc
        import torch
        from ray_zerocopy.calls.cache import Cache

        ray.init()
        ref = ray.put(rzc.Shared(torch.zeros(2**24)))
        kept = [rzc.get(ref) for _ in range(2)]
        cache = Cache()
        with cache.use(ref) as used:
            kept.append(used)

    run(leave, address=cluster)
