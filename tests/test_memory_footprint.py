"""A model costs no worker any memory, however many there are. `pytest -s` shows the figures.

Workers are measured by unique set size, the memory that would be freed if they ended; publishers by
RssAnon, which excludes the store's pages. Before each reading, garbage is collected and the
allocator gives free memory back, so that no growth hides in it. Activations are only kilobytes.
Before it is measured, each worker runs a forward of a private layer of the same shape, because a
first forward costs any process threads and scratch memory.
"""

from pathlib import Path

import pytest
import ray
import ray_zerocopy as rzc
import torch
from footprint import anonymous_memory, trim, unique_set_size, with_peak
from models import large, simple
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

MODEL_NBYTES = sum(parameter.nbytes for parameter in large().model.parameters())
WORKERS = (1, 2, 4)


def mappings():
    """(start, end, offset in the file, device, inode) of every mapping of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode, *_ = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        yield start, end, int(offset, 16), device, int(inode)


def place_in_file(address) -> tuple[str, int, int]:
    """(device, inode, offset in bytes) of the file that is mapped at an address."""
    start, _, offset, device, inode = next(m for m in mappings() if m[0] <= address < m[1])
    return device, inode, offset + address - start


def count_mapped_files() -> int:
    return sum(inode != 0 for *_, inode in mappings())


def print_table(title, heads, rows):
    """Bytes as MiB and as share of the model."""
    print(f"\n\n{title}; the model is of {MODEL_NBYTES / 2**20:.0f} MiB")
    print(f"{'':34}" + "".join(f"{head:>20}" for head in heads))
    for name, values in rows.items():
        cells = (f"{value / 2**20:.2f} MiB {value / MODEL_NBYTES:7.2%}" for value in values)
        print(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells))


class Growing:
    """A mixin for classes that load a model: the growth of the process since before the load."""

    def __init__(self, model):
        case = large()
        case.run(case.model[:2])
        case.model = None
        super().__init__(rzc.put(simple().model))
        self.before = unique_set_size()
        super().__init__(model)
        self.loaded = self.grown()

    def grown(self):
        return unique_set_size() - self.before


class Worker:
    """Loads a model and calls it, and measures the growth of its process."""

    def __init__(self):
        self.case, self.model, self.before = large(), None, 0
        self.case.run(self.case.model[:2])
        self.case.model = None

    def load(self, refs):
        self.before = unique_set_size()
        self.model = ray.get(refs[0])

    def forward(self):
        self.case.run(self.model)

    def growth(self):
        return unique_set_size() - self.before

    def drop(self):
        self.model = None

    def repeat(self, refs, rounds):
        """Load and call repeatedly. Returns the growth of memory and of the mappings."""
        mapped, self.before = count_mapped_files(), unique_set_size()
        for _ in range(rounds):
            self.load_and_call(refs)
        return self.growth(), count_mapped_files() - mapped

    def load_and_call(self, refs):
        self.case.run(ray.get(refs[0]))

    def places(self, refs):
        self.model = ray.get(refs[0])
        return places(self.model)

    def publish(self, put):
        """The peak private memory of a publish, and the private memory that stays."""
        model = large().model
        trim()
        before = anonymous_memory()
        ref, peak = with_peak(lambda: put(model))
        trim()
        stays = anonymous_memory() - before
        del ref
        return peak, stays


@pytest.fixture(scope="module")
def workers(start):
    """Four workers that have loaded a small model in each way, so that all code is loaded."""
    workers, small = start(Worker, max(WORKERS)), simple().model
    for put in PUTS.values():
        ref = put(small)
        ray.get([worker.load.remote([ref]) for worker in workers])
    ray.get([worker.drop.remote() for worker in workers])
    return workers


PUTS = {"ray.put": ray.put, "rzc.put": rzc.put}


def footprint(workers, ref):
    """The growth of each worker after all have loaded, and after all have called the model."""

    def ask(method, *args):
        return ray.get([getattr(worker, method).remote(*args) for worker in workers])

    ask("load", [ref])
    loaded = ask("growth")
    ask("forward")
    called = ask("growth")
    ask("drop")
    return loaded, called


def assert_costs_nothing(loaded, called):
    assert max(loaded) < 0.02 * MODEL_NBYTES
    assert max(called) < 0.05 * MODEL_NBYTES


def assert_each_costs_nothing(kind, event, growths):
    """Print and bound the growth of N processes, {N: (on load, after the first call)}."""
    heads = ["worst load", f"worst {event}", "sum after calls"]
    table = {
        f"{count} {kind}{'s' * (count > 1)}": [max(loaded), max(called), sum(called)]
        for count, (loaded, called) in growths.items()
    }
    print_table(f"Unique set size of each {kind} grows by", heads, table)
    for count, (loaded, called) in growths.items():
        assert_costs_nothing(loaded, called)
        assert sum(called) < 0.05 * MODEL_NBYTES * count


def assert_costs_a_model_each(loaded):
    assert min(loaded) > 0.9 * MODEL_NBYTES


def test_memory_footprint_single_worker(workers):
    model = large().model
    rows = {way: footprint(workers[:1], put(model)) for way, put in PUTS.items()}
    heads = ["after loading", "after a forward"]
    print_table("Unique set size of one worker grows by", heads, flat(rows))
    assert_costs_nothing(*rows["rzc.put"])
    assert_costs_a_model_each(rows["ray.put"][0])


def flat(rows):
    return {name: [max(growths) for growths in row] for name, row in rows.items()}


def test_memory_footprint_multiple_workers(workers):
    refs = {way: put(large().model) for way, put in PUTS.items()}
    found = {
        (way, count): footprint(workers[:count], ref)
        for way, ref in refs.items()
        for count in WORKERS
    }
    heads = ["worst load", "worst forward", "sum after forward"]
    rows = {
        f"{way}, {count} worker{'s' * (count > 1)}": [max(loaded), max(called), sum(called)]
        for (way, count), (loaded, called) in found.items()
    }
    print_table("Unique set size of each worker grows by", heads, rows)
    for count in WORKERS:
        assert_costs_nothing(*found["rzc.put", count])
        assert_costs_a_model_each(found["ray.put", count][0])
    assert sum(found["rzc.put", max(WORKERS)][1]) < 0.05 * MODEL_NBYTES


def test_memory_footprint_sequential_calls(workers):
    worker, ref = workers[0], rzc.put(large().model)
    ray.get(worker.repeat.remote([ref], 3))
    grown, mapped = ray.get(worker.repeat.remote([ref], 20))
    print_table("Unique set size grows by", ["20 loads and calls"], {"rzc.put": [grown]})
    assert grown < 0.01 * MODEL_NBYTES
    assert mapped == 0, "loads leave mappings behind"


def places(model):
    return [place_in_file(parameter.data_ptr()) for parameter in model.parameters()]


def test_object_store_sharing(workers):
    """Weights lie at one place of one file in every process: the same physical pages."""
    ref = rzc.put(large().model)
    here = places(ray.get(ref))
    assert all(inode != 0 for _, inode, _ in here), "anonymous memory is a copy"
    assert len(set(here)) == len(here)
    assert ray.get([worker.places.remote([ref]) for worker in workers[:2]]) == [here, here]

    plain = ray.get(ray.put(large().model))
    assert all(inode == 0 for _, inode, _ in places(plain))


class Trainer:
    """Trains a head on a shared base with DDP, in a group of one process."""

    def __init__(self, store):
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        self.train(large().model[:2], nn.Linear(2048, 1), whole=False)  # so that all code is loaded

    def train(self, base, head, whole):
        """Return the growth in three steps, with the base inside DDP or not."""
        before = unique_set_size()
        base.requires_grad_(False)
        if whole:
            model = DistributedDataParallel(nn.Sequential(base, head))
        else:
            model = nn.Sequential(base, DistributedDataParallel(head))
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 2048)).sum().backward()
            optimizer.step()
        return unique_set_size() - before

    def growth(self, refs, whole):
        return self.train(ray.get(refs[0]), nn.Linear(2048, 1), whole)


def test_data_parallel_training_of_a_head_leaves_the_base_shared(cluster, tmp_path):
    """DDP copies the parameters of rank 0 into those of all ranks, also into the base."""
    trainer = ray.remote(Trainer).options(num_cpus=0).remote(tmp_path / "group")
    ref = rzc.put(large().model)
    found = {
        name: ray.get(trainer.growth.remote([ref], name == "DDP(all)"))
        for name in ("DDP(head)", "DDP(all)")
    }
    ray.kill(trainer)
    rows = {name: [grown] for name, grown in found.items()}
    print_table("Unique set size of a trainer grows by", ["three steps"], rows)
    assert found["DDP(head)"] < 0.02 * MODEL_NBYTES
    assert found["DDP(all)"] > 0.9 * MODEL_NBYTES


def test_publishing_private_memory(start):
    (publisher,), found = start(Worker), {}
    for way, put in PUTS.items():
        ray.get(publisher.publish.remote(put))
        found[way] = ray.get(publisher.publish.remote(put))
    print_table("Private memory of a publisher grows by", ["at most", "in the end"], found)
    assert max(found["rzc.put"]) < 0.05 * MODEL_NBYTES
    assert found["ray.put"][0] > 0.9 * MODEL_NBYTES, "the sampler sees no peak at all"
