"""Check machines for causes of slow loads, wasted memory and lost models, and suggest fixes.

examine ── each check ─▶ a finding: good, or its cost and the fix
examine_cluster ── a task per node ─▶ examine
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_zerocopy import _core, requirements
from ray_zerocopy.errors import RayZeroCopyError
from ray_zerocopy.store.description import Info, ways
from ray_zerocopy.store.inspection import inspect
from ray_zerocopy.store.references import get, put

_SHM = Path("/dev/shm")
_ROUND_TRIP_NBYTES = 64 << 20
_MAPS = 65_530  # the kernel's default of vm.max_map_count
_FILES = 4096
_ANSWER_S = 120.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """The result of one check on one machine."""

    check: str
    """The name of the check."""
    good: bool
    """Whether it passed."""
    found: str
    """The value found."""
    mend: str = ""
    """The cost of a problem and its fix; empty for a check that passed."""


def examine() -> list[Finding]:
    """Check this machine; this process is connected to a Ray on it."""
    findings = [finding for check in _CHECKS for finding in check()]
    return findings + list(_round_trip())


def examine_cluster(timeout: float = _ANSWER_S) -> dict[str, list[Finding]]:
    """Check every node of the cluster by a task on it; returns the findings by node address.

    A node that does not answer within `timeout` seconds gets one finding, which says so.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(examine)
    asked = {
        node["NodeManagerAddress"] + f" ({node['NodeID'][:8]})": task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout)
    return {address: _answer(answer, timeout) for address, answer in asked.items()}


def _answer(answer: ray.ObjectRef, timeout: float) -> list[Finding]:
    try:
        findings: list[Finding] = ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        mend = "workers do not start on this node: check `ray status` and its logs"
        return [Finding("answer", False, f"no answer within {timeout:g} s", mend)]
    except ray.exceptions.RayError as error:
        mend = "install ray-zerocopy there in the versions of the other nodes, or check its logs"
        return [Finding("answer", False, str(error).strip().splitlines()[-1], mend)]
    return findings


# --- the checks -----------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    names = ("torch", "ray", "numpy")
    found = {name: version(name) for name in names}
    told = ", ".join(f"{name} {number}" for name, number in found.items())
    told += f", Python {sys.version_info.major}.{sys.version_info.minor}"
    newer = [
        f"{name} {found[name]} is newer than {newest}"
        for name, newest in requirements.NEWEST.items()
        if requirements.numbers(found[name]) > requirements.numbers(newest)
    ]
    mend = f"{', '.join(newer)}, the newest tested version: run the tests with it"
    yield Finding("versions", not newer, told, mend if newer else "")


def _ways() -> Iterator[Finding]:
    fast = {"views": "dlpack", "put": "room"}
    cost = {
        "views": "loads take up to three times as long: install torch 2.10 or later",
        "put": "puts take two to three times as long: this version of Ray is unknown",
    }
    taken = ways()
    for way, best in fast.items():
        good = taken[way] == best
        yield Finding(way, good, taken[way], "" if good else cost[way])
    yield Finding("enable", True, taken["enable"])


def _huge_pages() -> Iterator[Finding]:
    obstacle = _core.huge_pages_obstacle()
    mend = "page faults slow down first inferences by up to 10 %: use Linux 6.1 or later"
    yield Finding("huge pages", obstacle is None, obstacle or "yes", mend if obstacle else "")


def _shm() -> Iterator[Finding]:
    """Ray accepts a store larger than `/dev/shm`, and dies with SIGBUS when `/dev/shm` is full."""
    if not _SHM.is_dir():
        yield Finding(
            "/dev/shm", False, "none", "the object store lies on disk: mount a tmpfs on /dev/shm"
        )
        return
    whole, store_nbytes = shutil.disk_usage(_SHM).total, _store_nbytes()
    told = f"{whole / _MIB:,.0f} MiB; object store {store_nbytes / _MIB:,.0f} MiB"
    good = whole >= store_nbytes
    mend = (
        f"the object store lies on disk or dies with SIGBUS: mount -o remount,size={store_nbytes} "
        f"/dev/shm, or docker run --shm-size={store_nbytes}"
    )
    yield Finding("/dev/shm", good, told, "" if good else mend)


def _store_nbytes() -> int:
    own = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return int(resources.get("object_store_memory", 0))


def _overcommit() -> Iterator[Finding]:
    mode = _number("/proc/sys/vm/overcommit_memory")
    mend = "each load is charged with the size of the model: sysctl vm.overcommit_memory=0"
    yield Finding("overcommit", mode != 2, f"mode {mode}", mend if mode == 2 else "")


def _maps() -> Iterator[Finding]:
    most = _number("/proc/sys/vm/max_map_count")
    good = most is None or most >= _MAPS
    mend = f"limits the models that a process can hold: sysctl vm.max_map_count={_MAPS}"
    yield Finding("memory maps", good, f"{most:,} a process", "" if good else mend)


def _niceness() -> Iterator[Finding]:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    mend = "workers yield to all other processes: start Ray with RAY_worker_niceness=0"
    yield Finding("niceness", nice <= 0, f"{nice}", mend if nice > 0 else "")


def _limits() -> Iterator[Finding]:
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    good = space == resource.RLIM_INFINITY
    told = "no limit" if good else f"{space / _MIB:,.0f} MiB"
    mend = "" if good else "mapped models count against this limit: ulimit -v unlimited"
    yield Finding("address space", good, told, mend)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = files == resource.RLIM_INFINITY or files >= _FILES
    mend = "" if good else "Ray with many workers needs more: ulimit -n 65536"
    yield Finding("open files", good, f"{files:,} a process", mend)


def _spill() -> Iterator[Finding]:
    """Ray spills into the session's directory unless told otherwise."""
    context = ray.get_runtime_context()
    directory = Path(context.get_temp_dir(), context.get_session_name())
    if not directory.is_dir():
        yield Finding(
            "spill", False, f"no directory {directory}", "Ray cannot spill objects: restart Ray"
        )
        return
    disk = shutil.disk_usage(directory)
    store_nbytes = _store_nbytes()
    told = f"{directory}, {disk.free / _MIB:,.0f} MiB free of {disk.total / _MIB:,.0f}"
    good = disk.free >= store_nbytes and disk.free / disk.total > 0.05
    mend = "Ray cannot spill a full store, and stops at 95 % of the disk: free disk space"
    yield Finding("spill", good, told, "" if good else mend)


def _round_trip() -> Iterator[Finding]:
    """Put and get 64 MiB: their place, isolation and speed."""
    block = np.ones(_ROUND_TRIP_NBYTES, np.uint8)
    try:
        seconds, copy, info = _fastest(block)
    except (RayZeroCopyError, ray.exceptions.RayError) as error:
        mend = "the store has no room: start Ray with a larger object_store_memory"
        yield Finding("store", False, str(error).splitlines()[0], mend)
        return
    good = info.where == "store"
    mend = "the store is full and loads read from disk: drop references or start a larger store"
    yield Finding("store", good, f"64 MiB stored in {info.where}", "" if good else mend)
    good = info.held == "private"
    mend = (
        f"loads are not copy-on-write ({info.fallback}): a write changes the weights in every "
        "process on the node; run as the raylet's user"
    )
    yield Finding("private pages", good, info.held, "" if good else mend)
    speed = _ROUND_TRIP_NBYTES / seconds / (1 << 30)
    told = f"{speed:.1f} GiB/s, {copy / seconds:.2f} of the speed of memcpy"
    good = seconds < 4 * copy
    mend = "the machine is busy: check its load and its host"
    yield Finding("put and get speed", good, told, "" if good else mend)


def _fastest(block: np.ndarray) -> tuple[float, float, Info]:
    """Time three round trips and three copies, interleaved; return the best of each in seconds."""
    target = block.copy()
    seconds = copy = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        ref = put(block)
        loaded = get(ref, prefault=False)
        seconds = min(seconds, time.perf_counter() - start)
        info = inspect(ref)
        del loaded, ref
        start = time.perf_counter()
        np.copyto(target, block)
        copy = min(copy, time.perf_counter() - start)
    return seconds, copy, info


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(_versions, _ways, _huge_pages, _shm, _overcommit, _maps, _niceness, _limits, _spill),
)


def as_dict(findings: dict[str, list[Finding]]) -> dict[str, list[dict[str, Any]]]:
    """Return findings as plain values."""
    return {node: [vars(finding) for finding in found] for node, found in findings.items()}
