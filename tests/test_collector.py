"""The garbage collector does not run in a walk over a model, and keeps its settings."""

import contextlib
import gc
import os
import threading

import pytest
import ray_zerocopy as rzc
import torch
from ray_zerocopy.store import envelope
from ray_zerocopy.store.collector import quiet_collector


@pytest.fixture(autouse=True)
def as_before():
    threshold, enabled = gc.get_threshold(), gc.isenabled()
    yield
    gc.set_threshold(*threshold)
    (gc.enable if enabled else gc.disable)()


def collections():
    return [generation["collections"] for generation in gc.get_stats()]


def test_none_starts_inside_and_all_is_as_before_after():
    threshold = gc.get_threshold()
    with quiet_collector():
        before = collections()
        kept = [[] for _ in range(100_000)]
        assert collections() == before
    assert len(kept) == 100_000
    assert gc.get_threshold() == threshold
    assert gc.isenabled()


@contextlib.contextmanager
def thread_inside():
    """A thread is inside, until the end."""
    entered, leave = threading.Event(), threading.Event()

    def walk():
        with quiet_collector():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=walk)
    thread.start()
    entered.wait(10)
    yield
    leave.set()
    thread.join()


def test_threads_may_be_inside_at_once():
    threshold = gc.get_threshold()
    with thread_inside():
        with quiet_collector():
            pass
        assert gc.get_threshold() != threshold
    assert gc.get_threshold() == threshold


def test_a_child_forked_meanwhile_collects():
    threshold = gc.get_threshold()
    with thread_inside():
        if (child := os.fork()) == 0:
            as_ever = gc.get_threshold() == threshold
            with quiet_collector():
                pass
            os._exit(int(not (as_ever and gc.get_threshold() == threshold)))
    assert os.waitpid(child, 0)[1] == 0


def test_who_forks_inside_has_it_as_before_after():
    threshold = gc.get_threshold()
    with quiet_collector():
        child = os.fork()
    if child == 0:
        with quiet_collector():
            quiet = gc.get_threshold() != threshold
        os._exit(int(not quiet or gc.get_threshold() != threshold))
    assert os.waitpid(child, 0)[1] == 0
    assert gc.get_threshold() == threshold


def test_a_put_that_waits_for_its_base_holds_up_no_collection(cluster, monkeypatch):
    threshold, seen = gc.get_threshold(), []

    def without(*how):
        seen.append(gc.get_threshold())
        return real(*how)

    real, base = envelope.without, rzc.put(torch.ones(1000))
    monkeypatch.setattr(envelope, "without", without)
    rzc.put(torch.ones(1000), base=base)
    assert seen == [threshold]


def test_what_others_ask_meanwhile_stays():
    with quiet_collector():
        gc.disable()
    assert not gc.isenabled()
    gc.enable()
    with quiet_collector():
        gc.set_threshold(123, 4, 5)
    assert gc.get_threshold()[0] == 123
