"""A running model: on a shared block, against copies in the worker's own memory."""

import copy
import mmap
from statistics import median

import ray
import torch
from duel import silence, take_turns
from rivals import Ours, Rival

THREADS = (1, 2)
HUGE_NBYTES = 2 << 20


class Copy(Rival):
    """A copy in pages of 4 KiB, because most machines make huge pages only on `madvise`."""

    name = "a private copy"

    def load(self, handle):
        return copy.deepcopy(ray.get(handle))


class HugeCopy(Copy):
    """A copy in huge pages, as with THP_MEM_ALLOC_ENABLE=1 in torch."""

    name = "a private copy, huge pages"

    def load(self, handle):
        model = super().load(handle)
        tensors = [*model.parameters(), *model.buffers()]
        self.arena = huge_pages(sum(t.nbytes + -t.nbytes % 64 for t in tensors))
        free = self.arena
        for tensor in tensors:
            place, free = free[: tensor.nbytes], free[tensor.nbytes + -tensor.nbytes % 64 :]
            tensor.data = place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return model


def huge_pages(nbytes):
    memory = mmap.mmap(-1, nbytes + HUGE_NBYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat[-flat.data_ptr() % HUGE_NBYTES :]


RUNNERS = (Copy(), HugeCopy(), Ours())


class Encoding:
    """One sequence through a model, again and again."""

    unit = "forwards"

    def __init__(self, model, kwargs):
        self.model, self.kwargs = model, kwargs

    def step(self):
        self.model(**self.kwargs)


class Decoding:
    """One token after another, with a cache of all before."""

    unit = "tokens"

    def __init__(self, model, _):
        self.model, self.cache, self.token = model, None, torch.tensor([[1]])

    def step(self):
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)


@ray.remote(num_cpus=0)
class Runner:
    """A process with the same model three times. They run in turns."""

    def time_steps(self, entries, way, kwargs, seconds):
        """{threads: {runner: median seconds of a step}}."""
        with silence():
            models = [(runner, runner.load(handle)) for runner, handle in entries]
        with torch.inference_mode():
            return {each: time_steps(models, way, kwargs, each, seconds) for each in THREADS}


def time_steps(models, way, kwargs, threads, seconds):
    """{runner: median seconds of a step}."""
    torch.set_num_threads(threads)
    entries = [(runner, way(model, kwargs)) for runner, model in models]
    for _, running in entries:
        running.step()  # faults, thread pools, and one-time work of oneDNN
    times = take_turns(entries, lambda _, running: running.step(), seconds)
    return {name: median(samples) for name, samples in times.items()}
