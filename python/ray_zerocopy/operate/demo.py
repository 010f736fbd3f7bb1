"""Share BERT-base among four workers and compare with plain Ray: `python -m ray_zerocopy.demo`."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

import ray_zerocopy as rzc

WORKERS = 4
STORE_NBYTES = 1_200_000_000
MIB = 1 << 20


class Visit(NamedTuple):
    """One worker's measurements: seconds, and growth of private memory in bytes."""

    load: float
    answer: float
    growth: int
    output: torch.Tensor


class Worker:
    """A warm process that will load the model: its libraries are imported and have run once."""

    def __init__(self) -> None:
        model = bert(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        infer(model, torch.zeros(1, 32, dtype=torch.long))

    def ready(self) -> None:
        """Return once the warm-up is over."""

    def visit(self, refs: list[Any], tokens: torch.Tensor) -> Visit:
        """Load the model, run it once, and keep it."""
        before = private_nbytes()
        start = time.perf_counter()
        self.model = ray.get(refs[0])
        loaded = time.perf_counter()
        output = infer(self.model, tokens)
        answered = time.perf_counter()
        return Visit(loaded - start, answered - start, private_nbytes() - before, output)

    def forget(self) -> None:
        """Drop the model."""
        del self.model


def main() -> dict[str, Any]:
    """Share BERT-base both ways, print the measurements, and return them in seconds and bytes."""
    print(f"\nray_zerocopy {rzc.__version__}: one BERT-base, {WORKERS} workers, one machine\n")
    try:
        with step("build BERT-base from its configuration, random weights"):
            torch.manual_seed(0)
            model = bert()
    except ImportError as error:
        raise SystemExit(f"\n\n{error}\nThe demo needs it: pip install transformers") from error
    tokens = torch.randint(0, 30_000, (1, 32))
    torch.set_num_threads(1)  # as in the workers, so that outputs can be compared to the bit
    expected = infer(model, tokens)

    with step("start Ray on this machine"):
        ray.init(
            address="local",
            num_cpus=WORKERS,
            object_store_memory=STORE_NBYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    try:
        with step(f"start {WORKERS} workers, each with torch and transformers"):
            workers = [ray.remote(num_cpus=1)(Worker).remote() for _ in range(WORKERS)]
            ray.get([worker.ready.remote() for worker in workers])
        # Ours goes first, and so pays any one-time costs.
        ours = share("ref = rzc.put(model)", rzc.put, model, workers, tokens)
        plain = share("ref = ray.put(model)", ray.put, model, workers, tokens)
    finally:
        ray.shutdown()
    return report(model, ours, plain, expected)


def share(
    line: str, put: Callable[[object], Any], model: object, workers: list[Any], tokens: torch.Tensor
) -> list[Visit]:
    """Store the model, let each worker in turn load and run it, and drop it."""
    print()
    with step(line):
        ref = put(model)
    visits = []
    for number, worker in enumerate(workers, 1):
        with step(f"worker {number}: model = ray.get(ref); model(tokens)"):
            visits.append(ray.get(worker.visit.remote([ref], tokens)))
    ray.get([worker.forget.remote() for worker in workers])
    return visits


def report(
    model: torch.nn.Module, ours: list[Visit], plain: list[Visit], expected: torch.Tensor
) -> dict[str, Any]:
    """Print the table, whether all outputs are exact, and the savings; return the figures."""
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    print(f"\n{'':18}{'load':>12}{'first inference':>20}{'private memory':>20}")
    for name, visits in (("ray_zerocopy", ours), ("plain Ray", plain)):
        print(name)
        for number, visit in enumerate(visits, 1):
            print(
                f"  {f'worker {number}':16}{1e3 * visit.load:9,.1f} ms"
                f"{1e3 * visit.answer:17,.0f} ms{visit.growth / MIB:+16,.1f} MiB"
            )
    exact = all(torch.equal(visit.output, expected) for visit in ours + plain)
    mine, theirs = (sum(visit.growth for visit in visits) for visits in (ours, plain))
    faster = median_load(plain) / median_load(ours)
    print(
        f"\nFirst inference: from the load of the model to its first output. Private memory: the\n"
        f"growth of a worker's own memory until then. Size of the model: {nbytes / MIB:,.0f} MiB.\n"
        f"Outputs: {'identical to the source model, to the bit' if exact else 'NOT IDENTICAL'}.\n\n"
        f"ray_zerocopy saves {(theirs - mine) / MIB:,.0f} MiB in {WORKERS} workers "
        f"({mine / MIB:,.0f} MiB instead of {theirs / MIB:,.0f}) and loads {faster:,.0f} x as fast."
    )
    told = {name: [figures(v) for v in visits] for name, visits in (("ours", ours), ("ray", plain))}
    return {"nbytes": nbytes, "exact": exact, **told}


def figures(visit: Visit) -> dict[str, float]:
    """Return a worker's measurements without its output."""
    return {"load": visit.load, "answer": visit.answer, "growth": visit.growth}


def median_load(visits: list[Visit]) -> float:
    """Return the median load time in seconds."""
    return statistics.median(visit.load for visit in visits)


def bert(**config: int) -> torch.nn.Module:
    """Build a BERT with random weights; by default BERT-base."""
    from transformers import BertConfig, BertModel  # noqa: PLC0415 - not a dependency

    return BertModel(BertConfig(**config)).eval()


def infer(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Run the model once."""
    with torch.inference_mode():
        output: torch.Tensor = model(tokens).last_hidden_state
    return output


def private_nbytes() -> int:
    """Return the private memory (RssAnon): without mapped files, such as the store.

    Returns free heap to the kernel first, in favour of plain Ray: its load leaves 110 MiB of it.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print a step, and its duration when it is done."""
    print(f"  {text} ".ljust(66, "."), end=" ", flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:6.2f} s", flush=True)
