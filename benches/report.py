"""The whole comparison: `python benches/report.py` writes BENCHMARKS.md and its plots.

`--only fresh_worker ...` writes the sections of these functions and keeps the others. `--quick`
prints the ratios for BERT-base and writes nothing. The bars are for people: no test asserts a time.
"""

import argparse
import gc
import math
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import subjects  # noqa: E402
from automatic import LEFT_ALONE, time_puts  # noqa: E402
from bench_call import CALL, HOME, TASK, time_calls  # noqa: E402
from bench_disk import MEMORY, from_disk  # noqa: E402
from duel import (  # noqa: E402
    MIN_ROUNDS,
    Worker,
    enlist,
    publish_growth,
    session,
    settle,
    shared,
    timed,
    touch_store,
)
from fidelity import TRAITS, obeys  # noqa: E402
from followers import message_nbytes, time_live, time_updates  # noqa: E402
from newcomer import AtHome, time_firsts  # noqa: E402
from page import GIB, bars, bold, heading, mib, ms, plot, section, table, times  # noqa: E402
from prefetching import NBYTES, time_sending  # noqa: E402
from publishing import SIZES, TORCHRL, WORKERS  # noqa: E402
from publishing import times as time_weights  # noqa: E402
from rivals import (  # noqa: E402
    CONTENDERS,
    Enabled,
    Floor,
    NotPrefaulted,
    Opened,
    Ours,
    PlainRay,
    PlainWay,
    RayFlag,
    Safetensors,
    TorchMmap,
)
from running import RUNNERS, Copy, Decoding, Encoding, Runner  # noqa: E402
from variants import COUNTS, memory_of_node, times_of_variant  # noqa: E402

PAGE = ROOT / "BENCHMARKS.md"
FLOOR, OURS = Floor.name, Ours.name


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="BERT-base only, to the terminal")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="write these sections anew")
    arguments = parser.parse_args()
    if arguments.quick:
        quick()
    elif arguments.only:
        parts = re.split("^(?=## )", PAGE.read_text(), flags=re.M)
        page = {part.partition("\n")[0]: part for part in parts}  # by title
        for part in sections(arguments.only):
            page[part.partition("\n")[0]] = part
            PAGE.write_text("\n".join(part.strip() + "\n" for part in page.values()))
    else:
        written = [*sections()]
        PAGE.write_text("\n".join((heading(), *written)))


# --- the terminal ---------------------------------------------------------------------------------


def quick():
    with session(4 * GIB):
        touch_store()
        race = Race(Worker.remote(), "BERT-base", load_seconds=15, publish_seconds=25)
        calls = time_calls(seconds=30)
    print_times("load", race.load, {FLOOR: 2.0, "zerocopy": 0.8, "Ray's flag": 0.6})
    print_times("publish", race.publish, {FLOOR: 1.4})
    print_calls(calls)
    for name, reason in race.refusals.items():
        print(f"{name} cannot: {reason}")


def print_times(verb, seconds, bars):
    print(f"\n{verb:18} {'median ms':>10} {'x floor':>8} {'p10 to p90 ms':>15} {'rounds':>7}")
    for name, samples in seconds.items():
        low, high = 1e3 * np.quantile(samples, (0.1, 0.9))
        print(
            f"{name:18} {1e3 * median(samples):10.2f} {ratio(seconds, name):8.2f} "
            f"{f'{low:.1f} to {high:.1f}':>15} {len(samples):7}"
        )
    for rival, bar in bars.items():
        print(f"→ {ratio(seconds, OURS, rival):.2f} x {rival}; the bar is {bar}")


def print_calls(seconds):
    print(f"\n{'call':32} {'median ms':>10} {'x parts':>8}")
    for name, samples in seconds.items():
        print(f"{name:32} {1e3 * median(samples):10.2f} {to_parts(seconds, name):8.2f}")
    print(f"→ {to_parts(seconds, CALL.name):.2f} x an empty task and a forward; the bar is 1.1")


def to_parts(seconds, name):
    """The ratio of a call to the sum of an empty task and a forward in the caller."""
    return median(seconds[name]) / (median(seconds[TASK.name]) + median(seconds[HOME.name]))


def ratio(seconds, name, to=FLOOR):
    """The ratio of two medians that were timed in turns."""
    return median(seconds[name]) / median(seconds[to])


class Race:
    """One subject: loads in a warm worker, publishes in a new one, and the rivals that failed."""

    def __init__(self, worker, subject, load_seconds, publish_seconds):
        self.model = subjects.build(subject)
        self.load, self.refusals = race_loads(worker, self.model, load_seconds)
        able = [rival for rival in CONTENDERS if rival.name in self.load]
        self.publish = race_publishes(able, subject, publish_seconds)


def race_loads(worker, model, seconds, rivals=CONTENDERS):
    """({rival: [seconds]}, {rival: error})."""
    entries, refusals = enlist(rivals, model)
    try:
        return ray.get(worker.time_loads.remote(entries, seconds)), refusals
    finally:
        for rival, handle in entries:
            rival.withdraw(handle)


def race_publishes(rivals, subject, seconds):
    """{rival: [seconds]}, in a process that has only built the model.

    The speed depends on how storages lie in memory, which depends on earlier allocations.
    """
    worker = Worker.remote()
    try:
        return ray.get(worker.time_publishes.remote(rivals, subject, seconds))
    finally:
        ray.kill(worker)


# --- the page -------------------------------------------------------------------------------------


def sections(only=None):
    """Write the page's sections in order. All together need 15 GiB of memory and almost an hour."""
    stores = (  # sections with a new store, then with one whose pages were all written to
        (
            8 * GIB,
            [],
            [models, plain_way, automatic, over_tensors, calls, over_bytes, layouts_in_memory],
        ),
        (6 * GIB, [], [fresh_worker, without_ray, running]),
        (
            3 * GIB,
            [],
            [from_disk, publish_memory, memory, memory_over_models, variants, new_weights],
        ),
        (1 * GIB, [traits, importing, followers], []),
    )
    for nbytes, *each in stores:
        new, used = (
            [write for write in writes if only is None or write.__name__ in only] for writes in each
        )
        if new or used:
            with session(nbytes):
                yield from map(step, new)
                if used:
                    touch_store()
                yield from map(step, used)
    for write in (first_publish, eight_workers, prefetching):  # with a Ray of their own
        if only is None or write.__name__ in only:
            yield step(write)


def step(write, *arguments):
    elapsed, text = timed(write, *arguments)
    gc.collect()
    settle()
    print(f"{write.__name__:18} {elapsed:5.0f} s", file=sys.stderr, flush=True)
    return text


def figures(seconds, name):
    """Two cells: milliseconds, and the ratio to the floor."""
    return ms(median(seconds[name])), times(ratio(seconds, name))


def first_publish():
    rows = []
    for kind, make_free in MEMORY.items():
        with session(8 * GIB):
            seconds = time_first_publishes(make_free)
        rows += [[bold(name), kind, *figures(seconds, name)] for name in seconds]
    return section(
        "The first publish",
        "BERT-base into a part of the store that nobody has written to: the kernel allocates and "
        "clears the pages on the way. *Had before*: a process has just freed as much memory. *As "
        "found*: the virtual machine must get some of the memory from its host.",
        table(["", "memory", "publish, ms", "x floor"], rows),
    )


def time_first_publishes(make_free):
    """Seconds of each, {name: [seconds]}. Published objects are kept."""
    model = subjects.build("BERT-base")
    ready = [(rival, rival.prepare(model)) for rival in (Floor(), Ours(), RayFlag())]
    kept, seconds = [], {rival.name: [] for rival, _ in ready}
    for turn in range(5):
        first = turn % len(ready)
        for rival, subject in ready[first:] + ready[:first]:
            make_free()
            elapsed, handle = timed(rival.publish, subject)
            seconds[rival.name].append(elapsed)
            kept.append(handle)
    return seconds


def models():
    worker = Worker.remote()
    seconds = {
        "BERT-base": (12, 15),
        "BERT-large": (4, 4),
        "Llama-like, bf16, tied": (4, 4),
        "conv net": (3, 2),
        "160 layers": (3, 2),
    }
    return section(
        "Load and publish",
        "Load: in a warm worker. Publish: from a process that has just built the model, into pages "
        "of the store that were written to before.",
        *(step(subject_table, worker, name, *each) for name, each in seconds.items()),
    )


def layouts_in_memory():
    rivals = (Floor(), Ours(), RayFlag())
    together = race_publishes(rivals, subjects.TOGETHER, seconds=5)
    scattered = race_publishes(rivals, subjects.SCATTERED, seconds=5)
    rows = [[bold(name), *figures(together, name), *figures(scattered, name)] for name in together]
    return section(
        "Publish from memory in pieces",
        "44 storages of 9 MiB: adjacent, as in a process that has just made a model, or with gaps "
        "between them. Ray copies one large buffer faster than many small ones.",
        table(["", "together, ms", "x floor", "scattered, ms", "x floor"], rows),
    )


def plain_way():
    names = ("BERT-base", "Llama-like, bf16, tied", "160 layers")
    return section(
        "The portable path",
        "The code path for torch before 2.10, which lacks DLPack's exchange API, and for Ray "
        "versions with unknown internals: `torch.from_numpy` makes the views, and `ray.put` writes "
        "the block.",
        load_and_publish_table(names, (Floor(), Ours(), PlainWay())),
    )


def load_and_publish_table(names, rivals):
    """Loads and publishes of several subjects."""
    worker, rows = Worker.remote(), []
    for name in names:
        load, _ = race_loads(worker, subjects.build(name), 6, rivals)
        publish = race_publishes(rivals, name, 6)
        rows += [
            [name, bold(rival), *figures(load, rival), *figures(publish, rival)] for rival in load
        ]
    return table(["", "", "load, ms", "x floor", "publish, ms", "x floor"], rows)


def automatic():
    rivals = (Floor(), PlainRay(), RayFlag(), Ours(), Enabled())
    left_alone = []
    for what, obj in LEFT_ALONE.items():
        off, on = time_puts(obj)
        left_alone.append([what, f"{1e6 * off:.0f}", f"{1e6 * on:.0f}", f"{on / off:.3f} x"])
    return section(
        "Without changing a line",
        "`rzc.enable()` and then `ray.put(model)`, beside Ray's flag and `rzc.put`. A load is "
        "`ray.get` each time.",
        load_and_publish_table(("BERT-base", "160 layers"), rivals),
        "`ray.put` of objects that `enable` leaves to Ray: medians of 200, in turns.",
        table(["", "off, µs", "on, µs", "on / off"], left_alone),
    )


def subject_table(worker, name, load_seconds, publish_seconds):
    race = Race(worker, name, load_seconds, publish_seconds)
    rows = [
        [
            bold(rival.name),
            *figures(race.load, rival.name),
            *figures(race.publish, rival.name),
        ]
        if rival.name in race.load
        else [rival.name, race.refusals[rival.name], *[""] * 3]
        for rival in CONTENDERS
    ]
    size = (
        f"{mib(subjects.nbytes(race.model))} MiB, {subjects.count_tensors(race.model):,} tensors, "
        f"{len(list(race.model.modules())):,} modules"
    )
    header = ["", "load, ms", "x floor", "publish, ms", "x floor"]
    return f"### {name}: {size}\n\n{table(header, rows)}"


def over_tensors():
    worker = Worker.remote()
    counts = (250, 1000, 2500, 5000)
    halves = [count // 2 for count in counts]
    shapes = {
        "a tensor": (subjects.one_module, counts),
        "a module": (subjects.bare_modules, counts),
        "a Linear": (lambda count: subjects.linears(count, 16), halves),
    }
    curves = {unit: load_curves(worker, *shape) for unit, shape in shapes.items()}
    slopes = {
        unit: {name: 1e6 * slope(shapes[unit][1], seconds) for name, seconds in curve.items()}
        for unit, curve in curves.items()
    }
    rows = [
        [bold(rival.name), *(f"{slopes[unit][rival.name]:.2f}" for unit in shapes)]
        for rival in CONTENDERS
    ]
    straightness = [
        f"{np.corrcoef(shapes[unit][1], curve[OURS])[0, 1] ** 2:.3f}"
        for unit, curve in curves.items()
    ]
    lines = {
        name: (counts, [1e3 * seconds for seconds in curve])
        for name, curve in curves["a Linear"].items()
    }
    return section(
        "Load over tensors",
        "The load time that one more of these adds, in microseconds: a tensor in an existing "
        "module, a module without tensors, a `Linear(16, 16)` with weight and bias. Each figure is "
        f"the slope of a line through {', '.join(f'{count:,}' for count in counts)} of them, half "
        f"as many Linears. For ray_zerocopy r² is {', '.join(straightness)}: the line bends where "
        "memory of the last load went back to the kernel and page faults fetch it again.",
        table(["", *(f"{unit}, µs" for unit in shapes)], rows),
        plot(
            "load_over_tensors",
            lines,
            *("tensors in the model, two a Linear", "load, ms", "Load over tensors"),
        ),
    )


def load_curves(worker, shape, counts):
    """{rival: [median seconds at each count]}."""
    curves = {rival.name: [] for rival in CONTENDERS}
    for count in counts:
        load, _ = race_loads(worker, shape(count), seconds=2)
        for name, curve in curves.items():
            curve.append(median(load.get(name, [np.nan])))
    return curves


def slope(across, up):
    return np.polyfit(across, up, 1)[0]


def over_bytes():
    races = [race_publishes(CONTENDERS, row, seconds=2) for row in subjects.ROWS]
    curves = {rival.name: [median(race[rival.name]) for race in races] for rival in CONTENDERS}
    sizes = [4 * count for count in subjects.ROWS.values()]
    rows = [
        [bold(name), *map(ms, curve), f"{curve[-1] and sizes[-1] / 1024 / curve[-1]:.1f}"]
        for name, curve in curves.items()
    ]
    return section(
        "Publish over bytes",
        "Models of several `Linear(1024, 1024)`, 4 MiB each: milliseconds, and the speed at the "
        "largest size.",
        table(["", *subjects.ROWS, "GiB/s"], rows),
        plot(
            "publish_over_bytes",
            {name: (sizes, [1e3 * seconds for seconds in curve]) for name, curve in curves.items()},
            *("model, MiB", "publish, ms", "Publish over bytes"),
        ),
    )


def publish_memory():
    model = subjects.build("BERT-base")
    growth = {rival.name: publish_growth(rival, model) for rival in CONTENDERS}
    rows = [
        [bold(name), mib(peak), f"{100 * peak / subjects.nbytes(model):.1f} %"]
        for name, peak in growth.items()
    ]
    return section(
        "Memory while publishing",
        "BERT-base: the peak growth of private memory (RssAnon) in the publishing process.",
        table(["", "MiB", "of the model"], rows),
    )


def memory():
    counts = (1, 2, 4, 8)
    workers = [Worker.remote() for _ in range(max(counts))]
    model = subjects.linears(104, 1024)  # BERT-base's size, without eight imports of transformers
    curves = {rival.name: memory_curve(rival, model, workers, counts) for rival in CONTENDERS}
    for worker in workers:
        ray.kill(worker)
    rows = [
        [bold(name), *(mib(total / n) for n, total in zip(counts, totals, strict=True))]
        for name, totals in curves.items()
    ]
    return section(
        "Memory over workers",
        "Workers load a model of 416 MiB (104 `Linear(1024, 1024)`) and read every weight once: "
        "the growth of each worker's unique set size, in MiB. If only one worker maps a file, the "
        "file's pages are unique to it. The driver maps the store's pages, too.",
        table(["", *(f"{count} workers" if count > 1 else "1 worker" for count in counts)], rows),
        plot(
            "memory_over_workers",
            {name: (counts, [total / GIB for total in totals]) for name, totals in curves.items()},
            *("workers", "unique to the workers, GiB", "Memory of all workers"),
            log=False,
        ),
    )


def memory_over_models():
    header = ["", *subjects.SUBJECTS]
    grown = [unique_memory(name) for name in subjects.SUBJECTS]
    rows = [
        [
            bold(rival.name),
            *(mib(each[rival.name]) if rival.name in each else "cannot" for each in grown),
        ]
        for rival in CONTENDERS
    ]
    return section(
        "Memory over models",
        "Two workers load a model and read every weight: the growth of each worker's unique set "
        "size, in MiB. Each worker has its own Python objects for the modules.",
        table(header, rows),
    )


def variants():
    model = subjects.build("BERT-base")
    totals = memory_of_node(model)
    rows = [
        [bold(name), *(mib(total) for total in each)]
        for name, each in sorted(totals.items(), reverse=True)
    ]
    backbone_and = [f"{count} variants" if count > 1 else "1 variant" for count in COUNTS]
    lines = {
        name: (COUNTS, [total / GIB for total in each]) for name, each in sorted(totals.items())
    }
    seconds = times_of_variant(model)
    timed_rows = [
        [verb, *(ms(seconds[verb, how]) for how in ("whole", "over its base"))]
        for verb in ("put", "load")
    ]
    return section(
        "Variants",
        "BERT-base and variants of it that differ in the pooler, put with `base=`: their size in "
        "the store of one node, in MiB. Ray stores each variant in full.",
        table(["", *backbone_and], rows),
        plot(
            "memory_over_variants",
            lines,
            "variants",
            "memory, GiB",
            "Memory of a node over variants",
            log=False,
        ),
        "Put and load of one variant, in milliseconds. *Whole*: without `base=`.",
        table(["", "whole", "over its base"], timed_rows),
    )


def unique_memory(subject):
    """{rival: bytes unique to each of two workers}."""
    model = subjects.build(subject)
    workers = [Worker.remote() for _ in range(2)]
    grown = {}
    for rival in CONTENDERS:
        with suppress(TypeError):  # zerocopy has no bfloat16
            (total,) = memory_curve(rival, model, workers, (len(workers),))
            grown[rival.name] = total / len(workers)
    for worker in workers:
        ray.kill(worker)
    return grown


def memory_curve(rival, model, workers, counts):
    """Bytes unique to the first n workers, for each n of `counts`."""
    totals = []
    with shared(rival, model) as handle:
        for count, worker in enumerate(workers, 1):
            ray.get(worker.keep.remote((rival, handle)))
            if count in counts:
                totals.append(sum(ray.get([w.growth.remote() for w in workers[:count]])))
        ray.get([worker.drop.remote() for worker in workers])
    return totals


def fresh_worker():
    names = ("BERT-base", "Llama-like, bf16, tied")
    firsts = {name: first_outputs(name) for name in names}
    return section(
        "A fresh worker",
        "A new process loads and runs a model once: the load, the load with the first forward (7 "
        "tokens, one thread), a later forward, and the growth of the page table. Medians of "
        f"{MIN_ROUNDS} processes. In the last row the copy is loaded before the clock starts: the "
        "rest is what torch itself needs for a first forward.",
        *(f"### {name}\n\n{firsts_table(told)}" for name, told in firsts.items()),
        bars(
            "fresh_worker",
            {
                name: {
                    rival: first.output / first.warm
                    for rival, first in told.items()
                    if rival != FLOOR
                }
                for name, told in firsts.items()
            },
            *("x warm forward", "A fresh worker: reference to first output"),
            top=3,
        ),
    )


def without_ray():
    rivals, model = (Ours(), Opened(), TorchMmap(), Safetensors()), subjects.build("BERT-base")
    entries, _ = enlist(rivals, model)
    firsts = time_firsts(entries, type(model), subjects.sentence())
    workers, rows = [Worker.remote() for _ in range(4)], []
    for rival, handle in entries:
        rival.withdraw(handle)
        first = firsts[rival.name]
        (grown,) = memory_curve(rival, model, workers, (len(workers),))
        cells = ms(first.load), times(first.load / firsts[OURS].load), ms(first.output)
        rows.append([bold(rival.name), *cells, mib(grown / len(workers))])
    for worker in workers:
        ray.kill(worker)
    return section(
        "Without Ray",
        "BERT-base in a new process: `rzc.open` of a file, beside `ray.get` and other files. The "
        f"load and the first output: medians of {MIN_ROUNDS} processes. Memory: the growth of the "
        "unique set size of each of four processes that read every weight once.",
        table(["", "load, ms", "x ray_zerocopy", "first output, ms", "memory, MiB"], rows),
    )


def first_outputs(name):
    """{rival: First}."""
    model = subjects.build(name)
    entries, _ = enlist(CONTENDERS, model)
    again = {OURS: NotPrefaulted(), PlainRay.name: AtHome()}
    entries += [(again[rival.name], handle) for rival, handle in entries if rival.name in again]
    try:
        return time_firsts(entries, type(model), subjects.sentence())
    finally:
        for rival, handle in entries:
            rival.withdraw(handle)


def firsts_table(told):
    header = [
        "",
        "load, ms",
        "x floor",
        "first output, ms",
        "warm, ms",
        "x warm",
        "page table, KiB",
    ]
    rows = []
    for name, first in told.items():
        load = [ms(first.load), times(first.load / told[FLOOR].load)]
        output = [ms(first.output), ms(first.warm), times(first.output / first.warm)]
        table_kib = f"{first.page_table / 1024:,.0f}"
        rows.append(
            [
                bold(name),
                *(["", ""] if name == AtHome.name else load),
                *([""] * 4 if name == FLOOR else [*output, table_kib]),
            ]
        )
    return table(header, rows)


def running():
    ways = {"BERT-base": Encoding, "Llama-like, bf16, tied": Decoding}
    speeds = {}
    for name, way in ways.items():
        process = Runner.remote()
        with shared(Ours(), subjects.build(name)) as handle:
            entries = [(runner, handle) for runner in RUNNERS]
            steps = process.time_steps.remote(entries, way, subjects.sentence(), seconds=8)
            for threads, seconds in ray.get(steps).items():
                speeds[name, way.unit, threads] = {who: 1 / each for who, each in seconds.items()}
        ray.kill(process)
    rows = [
        [
            f"{name}, {threads} thread{'s' * (threads > 1)}, {unit} a second",
            *(f"{speed[runner.name]:.1f}" for runner in RUNNERS),
            times(speed[OURS] / speed[Copy.name]),
        ]
        for (name, unit, threads), speed in speeds.items()
    ]
    return section(
        "Running",
        "The speed of a warm model on the shared block and on private copies in the same process, "
        "in turns. Llama decodes token by token, BERT encodes 7 tokens.",
        table(["", *(runner.name for runner in RUNNERS), "x a private copy"], rows),
        bars(
            "running",
            {
                f"{name.split()[0].rstrip(',')}\n{threads} thread{'s' * (threads > 1)}": {
                    who: each / speed[Copy.name] for who, each in speed.items()
                }
                for (name, _, threads), speed in speeds.items()
            },
            *("speed, x a private copy", "Running"),
        ),
    )


def eight_workers():
    rows = []
    for rival in (Ours(), RayFlag()):
        with session(9 * GIB):
            rows.append([bold(rival.name), *eight_times(rival)])
    return section(
        "8 GiB, 8 workers",
        "A bfloat16 model in tensors of 64 MiB, in a store that was never written to. Every worker "
        "reads every byte. Load, unique memory and page table are medians over the eight workers.",
        table(
            ["", "load, ms", "unique memory, MiB", "page table, MiB", "node, GiB"],
            rows,
        ),
    )


def eight_times(rival):
    """Cells: milliseconds of a load, and the memory of a worker and of the whole node."""
    model = subjects.untouched(gib=8)
    workers = [Worker.remote() for _ in range(8)]
    ray.get([worker.__ray_ready__.remote() for worker in workers])
    free = psutil.virtual_memory().available
    handle = rival.publish(rival.prepare(model))
    loads = [ray.get(worker.keep.remote((rival, handle))) for worker in workers]
    grown = ray.get([worker.growth.remote() for worker in workers])
    page_tables = ray.get([worker.page_table_growth.remote() for worker in workers])
    node = free - psutil.virtual_memory().available
    own = [mib(median(grown)), mib(median(page_tables)), f"{node / GIB:.1f}"]
    return [ms(median(loads)), *own]


def calls():
    seconds = time_calls(seconds=25)
    ours = {CALL.name: f"**{CALL.name}**"}
    rows = [
        [ours.get(name, name), ms(median(samples)), times(to_parts(seconds, name))]
        for name, samples in seconds.items()
    ]
    return section(
        "A call as a task",
        "BERT-base, two sequences of 7 tokens, one thread. The last column compares with the sum "
        "of the two parts that every call has: an empty task, and a forward in the caller's "
        "process.",
        table(["", "ms", "x both parts"], rows),
    )


def traits():
    contenders = [rival for rival in CONTENDERS if rival.name != FLOOR]
    rows = [
        [trait, *("yes" if obeys(rival, *models_and_law) else "**no**" for rival in contenders)]
        for trait, models_and_law in TRAITS.items()
    ]
    return section(
        "What comes back unchanged",
        "Tried with one small model per row.",
        table(["", *(rival.name for rival in contenders)], rows),
        "\n".join(f"- {rival.name} loses {rival.loses}." for rival in CONTENDERS),
    )


def importing():
    program = """
import ray, torch, time
start = time.perf_counter()
import ray_zerocopy
print(time.perf_counter() - start)"""
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        )
        for _ in range(3)
    ]
    return section(
        "Import", f"`import ray_zerocopy` after ray and torch: {ms(median(seconds))} ms."
    )


def followers():
    asked, told = message_nbytes()
    rows = []
    for processes, each in ((20, 1), (20, 10)):
        half_s, all_s, cpu_s = time_updates(processes, each)
        count = processes * each
        cells = (ms(half_s), ms(all_s), f"{count / all_s:,.0f}", f"{1e6 * cpu_s / count:,.0f}")
        rows.append([f"{count} in {processes} processes", *cells])
    return section(
        "Followers",
        "A version of 32 MiB is published: the time from the return of `publish` until half of the "
        "followers, and all of them, answer with the new weights, and the catalog's CPU time for "
        f"each of them. `live()` takes {1e6 * time_live():.2f} µs while nothing changes. A "
        f"follower of one name sends {asked} bytes every 15 to 30 seconds; the message that "
        f"reports a change has {told} bytes.",
        table(["", "half, ms", "all, ms", "followers a second", "catalog, µs each"], rows),
    )


def new_weights():
    rows, lasts = [], {}
    for size in SIZES:
        for count in WORKERS:
            found, cpu_s = time_weights(size, count, rounds=10)
            put, publish, last, *others = (median(column) for column in zip(*found, strict=True))
            lasts[size, count] = last, *others
            cells = [ms(put), ms(publish), ms(last), *map(ms_if_any, others)]
            rows.append([f"{size}, {count} workers", *cells, f"{1e6 * cpu_s / count:,.0f}"])
    names = Ours.name, PlainRay.name, TORCHRL
    lines = {
        name: (WORKERS, [1e3 * lasts["4 MiB", count][at] for count in WORKERS])
        for at, name in enumerate(names)
    }
    return section(
        "New weights for workers",
        "A trainer sends its weights to workers, each a process: `publish` and `follow`, until the "
        "last worker has the new version; and `ray.put(state_dict)`, then `ray.get` and "
        "`load_state_dict` in each worker, until the last is done. Beside them `put` alone, "
        f"{TORCHRL} (it overwrites the weights in place, also while a worker uses them), and the "
        "catalog's CPU time for each worker.",
        table(
            [
                *("", "put, ms", "publish, ms", "last, ms", "Ray, last, ms"),
                *("TorchRL, last, ms", "catalog, µs"),
            ],
            rows,
        ),
        plot(
            "new_weights",
            lines,
            *("workers", "until the last has them, ms", "New weights of 4 MiB for workers"),
            log=False,
        ),
    )


def ms_if_any(seconds):
    return "does not fit" if math.isnan(seconds) else ms(seconds)


def prefetching():
    rows = [
        [way, ms(seconds), *(mib(nbytes) for nbytes in sent)]
        for way, (seconds, sent) in time_sending().items()
    ]
    return section(
        "To five nodes",
        f"A block of {mib(NBYTES)} MiB goes from one node to four others, all on this machine: the "
        "time, and the MiB that each node sends, as Ray counts them.",
        table(["", "ms", *(f"sender {place}" for place in range(1, 6))], rows),
    )


if __name__ == "__main__":
    main()
