"""From files into the store: `python benches/bench_disk.py` prints the page "From disk".

Warm turns read from the page cache. Before a cold turn, the files are dropped from it.
"""

import gc
import itertools
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import median

import numpy as np
import ray
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import ray_zerocopy as rzc  # noqa: E402
import subjects  # noqa: E402
from duel import MIN_ROUNDS, nothing, session, settle, silence, timed, touch_store  # noqa: E402
from footprint import resident_memory, trim, with_peak  # noqa: E402
from page import GIB, bold, mib, ms, section, table, times  # noqa: E402

CHUNK = 4 << 20
CHECKPOINT, TIED, TORCH, NUMPY = "checkpoint", "tied", "model.pt", "array.npy"
SNAPSHOT = "model.rzc"
FLOAT32, MIXTRAL = "float32", "mixtral"


# --- the files ------------------------------------------------------------------------------------


def save(folder):
    """Write a checkpoint in three shards, the same tied, its snapshot and `torch.save`; two that a
    loader converts (float32, experts), and each of these with one layer; and an array.
    """
    from safetensors.torch import load_file

    for name, tied in ((CHECKPOINT, False), (TIED, True)):
        model = subjects.llama(layers=9, tied=tied)
        model.save_pretrained(folder / name, max_shard_size="300MB")
        if not tied:
            rzc.save(model, folder / SNAPSHOT)
            model.float().save_pretrained(folder / FLOAT32, max_shard_size="600MB")
    subjects.mixtral().save_pretrained(folder / MIXTRAL, max_shard_size="300MB")
    subjects.llama(layers=1).float().save_pretrained(folder / like(FLOAT32))
    subjects.mixtral(layers=1).save_pretrained(folder / like(MIXTRAL))
    shards = [load_file(path) for path in files(folder / CHECKPOINT)]
    torch.save({name: tensor for shard in shards for name, tensor in shard.items()}, folder / TORCH)
    np.save(folder / NUMPY, np.random.default_rng(0).random(40_000_000))


def like(name):
    """The small checkpoint with the same architecture."""
    return f"{name}-like"


def files(path):
    """The files that hold a subject's weights."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def evict(paths):
    """Drop files from the page cache. Waits first: a virtual disk has a budget of bytes."""
    time.sleep(2)
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Floor:
    """Threads that only read the same bytes into memory that was written to before.

    The memory has huge pages. Into small, scattered ones a disk may take two to three times longer.
    """

    def __init__(self, paths):
        self.sizes = {path: path.stat().st_size for path in paths}
        nbytes = sum(self.sizes.values()) + len(paths) * CHUNK
        self.target = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.target.madvise(mmap.MADV_HUGEPAGE)
        self.target[:] = bytes(nbytes)

    def read(self, threads, flags=0):
        """Read all files; return the seconds."""
        opened = {path: os.open(path, os.O_RDONLY | flags) for path in self.sizes}
        parts = [
            (file, offset)
            for path, file in opened.items()
            for offset in range(0, self.sizes[path], CHUNK)
        ]
        places = zip(itertools.count(0, CHUNK), parts, strict=False)
        lock = threading.Lock()

        def work(target):
            while True:
                with lock:
                    at, part = next(places, (None, None))
                if part is None:
                    return
                os.preadv(part[0], [target[at : at + CHUNK]], part[1])

        with memoryview(self.target) as target:
            team = [threading.Thread(target=work, args=(target,)) for _ in range(threads)]
            elapsed, _ = timed(lambda: ([t.start() for t in team], [t.join() for t in team]))
        for file in opened.values():
            os.close(file)
        return elapsed

    def warm(self):
        return self.read(threads=2)

    def cold(self):
        """Seconds through the page cache, and past it."""
        buffered = self.read(threads=8)
        evict(self.sizes)
        return buffered, self.read(threads=8, flags=os.O_DIRECT)


# --- the ways -------------------------------------------------------------------------------------


def from_pretrained(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def safetensors(path):
    from safetensors.torch import load_file

    return [load_file(file) for file in files(path)]


def fastsafetensors(path):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [str(file) for file in files(path)]})
    buffer = loader.copy_files_to_device()
    tensors = {name: buffer.get_tensor(name) for name in loader.get_keys()}
    # each is a view of a whole file, and pickle would write the whole file for each
    return {name: tensor.clone() for name, tensor in tensors.items()}


def torch_load(path):
    return torch.load(path, mmap=True)


def numpy_load(path):
    return np.load(path, mmap_mode="r")


@dataclass
class Way:
    """Loads a file or folder and puts it, in two timed steps."""

    name: str
    path: str
    load: Callable
    put: Callable = rzc.put


OURS = [
    Way("from_pretrained, sharded", CHECKPOINT, from_pretrained),
    Way("from_pretrained, tied", TIED, from_pretrained),
    Way("torch.load(mmap=True)", TORCH, torch_load),
    Way('np.load(mmap_mode="r")', NUMPY, numpy_load),
    Way("rzc.restore", SNAPSHOT, Path, rzc.restore),
]

RIVALS = [
    Way("ray_zerocopy: from_pretrained + put", CHECKPOINT, from_pretrained),
    Way("from_pretrained + ray.put", CHECKPOINT, from_pretrained, ray.put),
    Way("safetensors load_file + ray.put", CHECKPOINT, safetensors, ray.put),
    Way("torch.load(mmap=True) + ray.put", TORCH, torch_load, ray.put),
    Way("fastsafetensors + ray.put", CHECKPOINT, fastsafetensors, ray.put),
]


@dataclass
class Turn:
    """Seconds to publish once from files."""

    load: float
    put: float

    @property
    def total(self):
        return self.load + self.put


def take(way, folder, between=nothing):
    """Load and put. `between` runs in between, off the clock."""
    load, loaded = timed(way.load, folder / way.path)
    between()
    put, ref = timed(way.put, loaded)
    del ref, loaded
    gc.collect()
    settle()
    return Turn(load, put)


def race(ways, folder, warm, cold, between=nothing):
    """Time ways and floors in turns: {way: ([Turn], [Turn])}, {path: ([s], [(s, s)])}.

    Runs `warm` and `cold` rounds. A cold floor is read through the page cache and past it. Also
    returns the private memory of each way. In a cold turn the files are dropped from the page cache
    before the load, and those given to `between` again before the put.
    """
    floors = {path: Floor(files(folder / path)) for path in {way.path for way in ways}}
    turns = {way.name: ([], []) for way in ways}
    read = {path: ([], []) for path in floors}
    contenders = [*((None, path) for path in floors), *((way, way.path) for way in ways)]
    private = {}
    for way in ways:
        take(way, folder)  # imports are not counted
        evict(files(folder / way.path))
        _, private[way.name] = with_peak(partial(take, way, folder))

    def in_turns(rounds):
        for count in range(rounds):
            for way, path in random.Random(count).sample(contenders, len(contenders)):
                yield way, path, floors[path]

    for way, path, floor in in_turns(warm):
        floor.warm()
        if way is None:
            read[path][0].append(floor.warm())
        else:
            turns[way.name][0].append(take(way, folder))
    for way, path, floor in in_turns(cold):
        evict(floor.sizes)
        if way is None:
            read[path][1].append(floor.cold())
        else:
            turns[way.name][1].append(take(way, folder, partial(between, floor.sizes)))
    return turns, read, private


BUILDS = {"float32 files, cast to bfloat16": FLOAT32, "Mixtral, experts merged": MIXTRAL}
# A virtual machine that gives free memory back to its host pays to get it again. Then its free
# memory is small pages that it has kept; shared ones cost 1.7 times as much as private ones.
MEMORY = {"had before": lambda: np.ones(3 * GIB, np.uint8), "as found": partial(time.sleep, 3)}
ACTS = {
    "loaded": from_pretrained,
    "put": lambda path: rzc.put(from_pretrained(path)),
    "built": partial(rzc.build, from_pretrained),
}


@ray.remote(num_cpus=0)
class Builder:
    """A process with all imports done, as a publisher loads a model only once."""

    def __init__(self, path, small):
        self.path = path
        with silence():
            rzc.build(from_pretrained, small)
        trim()

    def seconds(self, act):
        return timed(ACTS[act], self.path)[0]

    def shares(self):
        """Peak memory of `build` as a share of the block: private, and all besides the block."""
        ref, private = with_peak(partial(rzc.build, from_pretrained, self.path))
        nbytes = rzc.inspect(ref).nbytes
        del ref
        trim()
        # resident memory includes the block, which this process maps to write
        _, resident = with_peak(partial(rzc.build, from_pretrained, self.path), resident_memory)
        return private / nbytes, resident / nbytes - 1


def builds(folder, rounds):
    """Table rows: one for each build and kind of free memory, each measured in new processes."""
    for (name, path), (kind, make_free) in itertools.product(BUILDS.items(), MEMORY.items()):
        new = partial(Builder.remote, folder / path, folder / like(path))
        seconds = {act: [] for act in ACTS}
        for count in range(rounds):
            builders = {act: new() for act in ACTS}
            ray.get([builder.__ray_ready__.remote() for builder in builders.values()])
            settle()
            for act in random.Random(count).sample([*ACTS], len(ACTS)):
                make_free()
                seconds[act].append(ray.get(builders[act].seconds.remote(act)))
                ray.kill(builders[act])
        private, beside = ray.get(new().shares.remote())
        loaded, put, built = (median(seconds[act]) for act in ACTS)
        yield [
            *(name, kind),
            *(ms(loaded), ms(put), ms(built), times(built / loaded)),
            *(f"{100 * share:.0f} %" for share in (private, beside)),
        ]


@contextmanager
def saved():
    """Write the files to the repository's disk."""
    (ROOT / "target").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "target") as folder, silence():
        from transformers import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        save(Path(folder))
        yield Path(folder)


# --- the page -------------------------------------------------------------------------------------


def from_disk():
    with saved() as folder:
        ours = [*rows(OURS, folder, attrgetter("put"), MIN_ROUNDS, 5, evict)]
        able, refusals = enlist(RIVALS, folder)
        rivals = [*rows(able, folder, attrgetter("total"), 3, 3)]
        rivals += [[name, reason, *[""] * 4] for name, reason in refusals.items()]
        built = [*builds(folder, rounds=5)]
    header = ["", "warm, ms", "x pread", "cold, ms", "x best", "private memory"]
    return section(
        "From disk",
        "Files on a disk, read into pages of the store that were written to before. *Warm*: the "
        "files are in the page cache. *Cold*: they were evicted from it. *pread*: two threads read "
        "them into huge pages and do nothing else. *best*: eight threads do, buffered or direct, "
        "whichever is faster. *Private memory*: the peak growth of RssAnon in the process.",
        "`put` and `restore` alone. Cold, the files are evicted again after the loader, which "
        "reads a part of them:",
        table(header, ours),
        "Loader and put together, for a Llama in bfloat16, 755 MiB in three files:",
        table(header, rivals),
        "Loaders that convert, warm, each time in a new process: `rzc.build(from_pretrained, "
        "path)`, compared with the loader alone, and with the loader followed by `rzc.put`. Memory "
        "*had before* and *as found*: see the first section. The last two columns are the peak "
        "memory of `build` as a share of the model: private memory, and all memory of the node "
        "next to the block.",
        table(
            [
                "",
                "memory",
                "loader, ms",
                "loader + put, ms",
                "build, ms",
                "x loader",
                "private",
                "node",
            ],
            built,
        ),
    )


def enlist(ways, folder):
    """The ways that work, and why the others do not."""
    able, refusals = [], {}
    for way in ways:
        try:
            take(way, folder)
            able.append(way)
        except Exception as error:  # any error of a rival is a row of the table
            refusals[way.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return able, refusals


def rows(ways, folder, part, *how):
    """Table rows: one for each way. `part` takes a part of a `Turn`, the rest goes to `race`."""
    turns, read, private = race(ways, folder, *how)
    for way in ways:
        warm, cold = (median(map(part, each)) for each in turns[way.name])
        pread, best = read[way.path]
        best = min(median(seconds) for seconds in zip(*best, strict=True))
        nbytes = sum(path.stat().st_size for path in files(folder / way.path))
        yield [
            bold(way.name),
            *(ms(warm), times(warm / median(pread)), ms(cold), times(cold / best)),
            f"{mib(private[way.name])} MiB, {100 * private[way.name] / nbytes:.0f} %",
        ]


if __name__ == "__main__":
    with session(2 * GIB):
        touch_store()
        print(from_disk())
