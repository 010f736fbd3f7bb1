"""New weights for workers, repeatedly: `publish` and `follow`, `put`, and the usual way.

    PYTHONPATH=tests python benches/publishing.py [FOLLOWERS] [ROUNDS]

The usual way: `ray.put(model.state_dict())`, and in each worker `ray.get` and `load_state_dict`.
All run in the same workers, in turn in each round. Prints medians, and medians of the ratios.

If TorchRL is installed, its shared memory runs too, with as many processes of its own. A send
overwrites the weights in place, also while a worker uses them.
"""

import contextlib
import copy
import importlib.util
import math
import sys
import threading
import time
from statistics import median

import psutil
import ray
import ray_zerocopy as rzc
import torch
import torch.multiprocessing
from ray_zerocopy.registry import catalog, follower
from subjects import linears  # it needs `tests` on PYTHONPATH

MIB = 2**20
SIZES = {"4 MiB": (104, 100), "400 MiB": (100, 1024)}
PATIENCE_S = 120
WORKERS = (2, 4, 8, 20)
TORCHRL_WORKERS = 8  # at most: each takes 0.8 GB
TORCHRL = "TorchRL's shared memory"


@ray.remote(num_cpus=0)
class Worker:
    """Follows a name, and has its own copy of the model for the usual way."""

    def __init__(self, shape):
        torch.set_num_threads(1)
        self.shape, self.mine = shape, None
        self.seen_s = {}
        self.changed = threading.Condition()
        swap = follower.Live._swap

        def noted(live, version):
            swap(live, version)
            with self.changed:
                self.seen_s[live.name, version.number] = time.monotonic()
                self.changed.notify_all()

        follower.Live._swap = noted

    def follow(self, name):
        self.live = rzc.follow(name)

    def when(self, name, number):
        """When this worker had the version."""
        with self.changed:
            assert self.changed.wait_for(lambda: (name, number) in self.seen_s, PATIENCE_S)
        return self.seen_s[name, number]

    def pull(self, refs):
        if self.mine is None:
            self.mine = linears(*self.shape)
        self.mine.load_state_dict(ray.get(refs[0]))
        return time.monotonic()


@contextlib.contextmanager
def torchrls(model, shape, workers):
    """A function that sends a model's weights to processes by TorchRL, and waits for them all."""
    there = importlib.util.find_spec("torchrl") is not None
    if not there or workers > TORCHRL_WORKERS or not fits(model, workers):
        yield None
        return
    from torchrl.weight_update import SharedMemWeightSyncScheme

    spawn, scheme = torch.multiprocessing.get_context("spawn"), SharedMemWeightSyncScheme()
    scheme.init_on_sender(
        model=copy.deepcopy(model), devices=[torch.device("cpu")] * workers, ctx=spawn
    )
    ends = spawn.Event()
    started = [spawn.Process(target=_receive, args=(scheme, shape, index, ends))
               for index in range(workers)]  # fmt: skip
    for each in started:
        each.start()
    scheme.connect()
    try:
        yield lambda: scheme.send(model)  # copied: the weights of the copy are shared memory
    finally:
        ends.set()
        for each in started:
            each.join()


def _receive(scheme, shape, index, ends):
    torch.set_num_threads(1)
    scheme.init_on_receiver(model_id="policy", model=linears(*shape), worker_idx=index)
    scheme.connect(worker_idx=index)
    ends.wait()


def times(size, followers, rounds):
    """Seconds in each round: put, publish, until the last worker has it, the usual way, TorchRL."""
    shape, name = SIZES[size], f"weights/{size.replace(' ', '')}"
    model = linears(*shape)
    rzc.publish(name, model, keep=1)
    workers = [Worker.remote(shape) for _ in range(followers)]
    ray.get([worker.follow.remote(name) for worker in workers])
    found, cpu_s = [], []
    with torchrls(model, shape, followers) as torchrl:
        for value in range(1, rounds + 2):
            with torch.no_grad():
                next(model.parameters()).fill_(value)
            time.sleep(1)

            start_s = time.monotonic()
            ref = rzc.put(model)
            put_s = time.monotonic() - start_s
            del ref
            time.sleep(1)

            before_s = busy_s()
            start_s = time.monotonic()
            version = rzc.publish(name, model, keep=1)
            publish_s = time.monotonic() - start_s
            time.sleep(1)  # a call to a worker now would take its time
            seen_s = ray.get([worker.when.remote(name, version.number) for worker in workers])
            last_s = max(seen_s) - start_s
            cpu_s.append(busy_s() - before_s)
            time.sleep(1)

            users_s = torchrl_s = math.nan
            if fits(model, followers):
                start_s = time.monotonic()
                ref = ray.put(model.state_dict())
                users_s = max(ray.get([worker.pull.remote([ref]) for worker in workers])) - start_s
                del ref
            if torchrl is not None:
                time.sleep(1)
                start_s = time.monotonic()
                torchrl()
                torchrl_s = time.monotonic() - start_s
            found.append((put_s, publish_s, last_s, users_s, torchrl_s))
    for worker in workers:
        ray.kill(worker)
    rzc.retire(name)
    return found[1:], median(cpu_s)


def fits(model, copies):
    """Whether so many private copies of a model fit into memory."""
    return copies * sum(parameter.nbytes for parameter in model.parameters()) <= 2**32


def busy_s():
    """CPU seconds of the catalog."""
    handle = ray.get_actor("catalog", catalog.NAMESPACE)
    pid = ray.get(handle.__ray_call__.remote(lambda _: __import__("os").getpid()))
    return sum(psutil.Process(pid).cpu_times()[:2])


def main(followers=4, rounds=8, sizes=tuple(SIZES)):
    ray.init("local", num_cpus=4, object_store_memory=3 << 30, include_dashboard=False,
             log_to_driver=False, logging_level="ERROR")  # fmt: skip
    for size in sizes:
        found, cpu_s = times(size, followers, rounds)
        put, publish, last, users, torchrl = (
            1e3 * median(column) for column in zip(*found, strict=True)
        )
        print(f"{size}, {followers} followers, medians of {rounds}: put {put:.1f} ms, publish "
              f"{publish:.1f}, the last has it {last:.1f}, users {users:.1f}, "
              f"TorchRL {torchrl:.1f}; catalog {1e3 * cpu_s:.1f} ms of CPU")  # fmt: skip
        for what, top, bottom in (("publish / put", 1, 0), ("last / publish", 2, 1),
                                  ("last / users", 2, 3), ("last / TorchRL", 2, 4)):  # fmt: skip
            print(f"  {what}: {median(row[top] / row[bottom] for row in found):.2f}")
    ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *([sys.argv[3:]] if sys.argv[3:] else []))
