"""Mapped models keep their bytes until the process drops them. Then the store gets its memory back.

    connection   closed by `ray.shutdown()`, or with the raylet
    object       spilled, its references gone
    children     forked ones that drop models, or see models that the parent has dropped

`test_pins.py` runs this in a separate interpreter.
"""

import gc
import multiprocessing
import os
import sys
import threading
import time
import warnings

import numpy as np
import psutil
import ray
import ray_zerocopy as rzc
import torch
from fresh import run, tell
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from ray_zerocopy import _core
from ray_zerocopy.store import ray_inside

MIB, SOON_S = 2**20, 90
STORE = 100 * MIB
MODEL = {"weight": torch.randn(3 * MIB), "array": np.arange(MIB), "bias": torch.randn(3)}  # 20 MiB
FORK = multiprocessing.get_context("fork")

torch.set_num_threads(1)  # a forked child has only one


def connect():
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


def until(condition):
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, "this takes too long"
        time.sleep(0.1)


def is_whole(model):
    tensors = (torch.equal(model[name], MODEL[name]) for name in ("weight", "bias"))
    return all(tensors) and np.array_equal(model["array"], MODEL["array"])


def used_nbytes():
    (node,) = (node for node in ray.nodes() if node["Alive"])
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)
    return stats.store_stats.object_store_bytes_used


def fill():
    """Fill the store's free memory, and more, with other data."""
    for _ in range(STORE // (4 * MIB)):
        ray.put(np.full(4 * MIB, 7, np.uint8))
    held = [ray.put(np.full(4 * MIB, 7, np.uint8)) for _ in range(STORE // (4 * MIB))]
    del held


def loaded():
    """A model held in each way that keeps store memory. Nothing else holds the object."""
    ref = rzc.put(MODEL)
    plain, shared, one = ray.get(ref), rzc.get(ref, isolation="shared"), ray.get(ref)
    derived = {  # only these parts of the loaded model are kept
        "weight": torch.from_dlpack(one["weight"]),
        "array": one["array"][:],
        "bias": torch.from_numpy(one["bias"].numpy()),
    }
    return [plain, shared, derived]


def everything_is_free():
    gc.collect()
    until(lambda: used_nbytes() == 0)


# --- the connection -------------------------------------------------------------------------------


def shut_down():
    models = loaded()
    ray.shutdown()
    assert all(map(is_whole, models))
    connect()
    fill()
    assert all(map(is_whole, models))
    models.clear()
    everything_is_free()


def shut_down_with_models_of_two_connections():
    first = loaded()
    ray.shutdown()
    connect()
    second = loaded()
    ray.shutdown()
    connect()
    first.clear()
    fill()
    assert all(map(is_whole, second))
    second.clear()
    everything_is_free()


def shut_down_while_an_object_is_written():
    room = ray_inside.put({"what": "Ray writes"}, lambda: 20 * MIB)
    ray.shutdown()
    connect()
    others = [ray.put(np.full(4 * MIB, 7, np.uint8)) for _ in range(STORE // (4 * MIB) - 6)]
    room.memory[-20 * MIB :] = bytes(20 * MIB)
    assert all((ray.get(other) == 7).all() for other in others)
    del room, others
    everything_is_free()


def no_connection_is_found():
    """With another Ray inside: a load copies in time, or is refused."""
    ref = rzc.put(MODEL)
    known, ray_inside.connection = ray_inside.connection, lambda: _core.Connection(None)
    try:
        model, info = ray.get(ref), rzc.inspect(ref)
        other = rzc.get(rzc.put(MODEL))  # Ray writes the block
    finally:
        ray_inside.connection = known
    assert (info.held, info.fallback) == ("copied", "this process has no connection to Ray's store")
    del ref
    ray.shutdown()
    connect()
    fill()
    assert is_whole(model)
    assert is_whole(other)
    everything_is_free()


# --- the object -----------------------------------------------------------------------------------


def spilled():
    refs = [rzc.put(MODEL) for _ in range(3)]
    models = [ray.get(ref) for ref in refs]
    others = [ray.put(np.full(4 * MIB, 7, np.uint8)) for _ in range(STORE // (4 * MIB))]
    assert all(map(is_whole, models))
    models.clear()
    assert all(is_whole(ray.get(ref)) for ref in refs)
    del refs, others
    everything_is_free()


# --- children -------------------------------------------------------------------------------------


class Child:
    """A forked process with models. When asked, it says whether they are whole.

    With `orphan`, its parent has ended.
    """

    def __init__(self, models, behave=lambda models: None, orphan=False):
        self.pipe, self._answers = FORK.Pipe()
        self.process = self._fork(self._bear if orphan else self._answer, models, behave)
        if orphan:
            self.process.join()  # with a timeout it waits for a pipe that its child has, too

    @staticmethod
    def _fork(target, *args):
        process = FORK.Process(target=target, args=args)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            process.start()
        return process

    def _bear(self, models, behave):
        self._fork(self._answer, models, behave)
        os._exit(0)

    def _answer(self, models, behave):
        behave(models)
        while self._answers.recv() != "end":
            self._answers.send(all(map(is_whole, models)))

    def is_whole(self):
        self.pipe.send("whole?")
        assert self.pipe.poll(SOON_S)
        return self.pipe.recv()

    def end(self):
        self.pipe.send("end")
        self.process.join(SOON_S)
        assert self.process.exitcode == 0


def child_lets_go():
    models = loaded()
    child = Child(models, behave=lambda models: (models.clear(), gc.collect()))
    assert child.is_whole()  # it has dropped its models
    fill()
    assert all(map(is_whole, models))
    child.end()
    fill()
    assert all(map(is_whole, models))
    models.clear()
    everything_is_free()


def parent_lets_go():
    models = loaded()
    kept = list(models)
    children = [Child(models), Child(models)]
    models.clear()
    kept.clear()
    gc.collect()
    fill()
    assert all(child.is_whole() for child in children)
    children[0].end()
    fill()
    assert children[1].is_whole()
    children[1].end()
    everything_is_free()


def child_of_a_child_that_has_ended():
    models = loaded()
    child = Child(models, orphan=True)
    models.clear()
    fill()
    assert child.is_whole()
    child.end()
    everything_is_free()


def many_forks():
    """No descriptor is left over."""
    models = loaded()
    before = psutil.Process().num_fds()
    for _ in range(30):
        Child(models).end()
    Child(models).end()
    assert psutil.Process().num_fds() <= before + 2
    models.clear()
    everything_is_free()


def child_outlives_the_connection():
    models = loaded()
    child = Child(models)
    models.clear()
    ray.shutdown()
    connect()
    fill()
    assert child.is_whole()
    child.end()
    everything_is_free()


def threads_fork_and_let_go():
    """In every order, no child ever sees other data."""
    wrong, end_s = [], time.monotonic() + 5

    def put_others():
        other = {name: part * 0 for name, part in MODEL.items()}
        while time.monotonic() < end_s:
            rzc.get(rzc.put(other))

    def fork():
        while time.monotonic() < end_s:
            models = [rzc.get(rzc.put(MODEL))]
            child = Child(models)
            models.clear()
            if not child.is_whole():
                wrong.append(child)
            child.end()

    threads = [threading.Thread(target=target) for target in (put_others, fork, fork)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    everything_is_free()


# --- the raylet -----------------------------------------------------------------------------------


def raylet_killed():
    """A driver ends with its raylet. A forked child continues, and sees the same models."""

    @run
    def lose():
        import multiprocessing
        import os
        import signal
        import time

        import psutil
        import ray
        import ray_zerocopy as rzc
        import torch

        fork = multiprocessing.get_context("fork")
        answers, answer = fork.Pipe(duplex=False)

        def driver():
            torch.set_num_threads(1)
            ray.init("local", num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
            children = psutil.Process().children(recursive=True)
            (raylet,) = (child for child in children if child.name() == "raylet")
            model = torch.randn(2**22)
            held = [rzc.get(rzc.put(model))]

            def child():
                while raylet.is_running() and raylet.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.1)
                time.sleep(2)
                answer.send(torch.equal(held[0], model))

            fork.Process(target=child).start()
            held.clear()
            os.kill(raylet.pid, signal.SIGKILL)
            os._exit(0)  # as Ray ends it

        fork.Process(target=driver).start()
        assert answers.poll(60)
        assert answers.recv()


ROWS = {
    row.__name__: row
    for row in (
        shut_down,
        shut_down_with_models_of_two_connections,
        shut_down_while_an_object_is_written,
        no_connection_is_found,
        spilled,
        child_lets_go,
        parent_lets_go,
        child_of_a_child_that_has_ended,
        many_forks,
        child_outlives_the_connection,
        threads_fork_and_let_go,
        raylet_killed,
    )
}


if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False},
    )
    connect()
    tell(ROWS, sys.argv[1:] or ROWS)
    ray.shutdown()
    cluster.shutdown()
