"""A process or node reaches each of its limits: a load is exact by another way, or is refused.

`test_limits.py` runs this in a separate interpreter, with its own mounts and limits.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import resource
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from fresh import tell
from ray_zerocopy import metrics
from ray_zerocopy.operate import doctor

MIB = 2**20
LIBC = ctypes.CDLL(None, use_errno=True)
MODEL = torch.arange(MIB, dtype=torch.float32)
LARGE = torch.arange(16 * MIB, dtype=torch.float32)
TAKEN = Path("/dev/shm/taken")


def start(store_nbytes):
    """Start a Ray as users do. Its workers inherit the limits of this process."""
    ray.init(
        "local",
        num_cpus=1,
        object_store_memory=store_nbytes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


@functools.cache
def restart_without_privileges_and_disk():
    """Drop, for good, the capabilities that let root open the kernel's links to mapped files."""
    ray.shutdown()
    drop_privileges()
    os.environ["RAY_local_fs_capacity_threshold"] = "0.0001"  # noqa: SIM112
    start(100 * MIB)


def drop_privileges():
    sys_admin, checkpoint_restore, drop_from_bounding_set, version = 21, 40, 24, 0x20080522
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    assert LIBC.capget(header, sets) == 0
    for capability in (sys_admin, checkpoint_restore):
        assert LIBC.prctl(drop_from_bounding_set, capability, 0, 0, 0) == 0
        for index in range(3):  # effective, permitted, inheritable; then their upper halves
            sets[index + 3 * (capability // 32)] &= ~(1 << capability % 32)
    assert LIBC.capset(header, sets) == 0


def assert_whole(ref, held="private", model=MODEL):
    assert rzc.inspect(ref).held == held
    assert torch.equal(ray.get(ref), model)


def loads_shared_and_says(ref, match):
    with pytest.warns(rzc.IsolationWarning, match=match):
        loaded = rzc.get(ref)
    assert torch.equal(loaded, MODEL)


@contextlib.contextmanager
def limited(what, most):
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def address_space_for(nbytes):
    """Limit the address space to this much more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    return limited(resource.RLIMIT_AS, used + nbytes)


@contextlib.contextmanager
def charged_at_most(nbytes):
    """This process is in a cgroup that allows it this many more bytes.

    If no cgroup can be made, the address space is limited instead.
    """
    group = Path(f"/sys/fs/cgroup/memory/rzc-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        with address_space_for(LARGE.nbytes + nbytes):
            yield
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@contextlib.contextmanager
def no_file_left():
    held = []
    with limited(resource.RLIMIT_NOFILE, 1024):
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            yield
        finally:
            for descriptor in held:
                os.close(descriptor)


@contextlib.contextmanager
def mounts_of_its_own():
    """For this thread and its children, until the end."""
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        unshared_mounts()
        yield
    finally:
        own_folder = 0x200  # setns fails if a newer thread shares it
        assert LIBC.unshare(own_folder) == 0
        assert LIBC.setns(before, 0) == 0, os.strerror(ctypes.get_errno())
        os.close(before)


def unshared_mounts():
    new_namespace, private, recursive = 0x20000, 1 << 18, 1 << 14
    assert LIBC.unshare(new_namespace) == 0, "only root may have mounts of its own"
    mount(b"none", b"/", None, private | recursive)


def mount(*arguments, options=None):
    assert LIBC.mount(*arguments, options) == 0, os.strerror(ctypes.get_errno())


# --- a process ------------------------------------------------------------------------------------


def no_file_descriptor():
    first, second = rzc.put(MODEL), rzc.put(MODEL)
    with no_file_left():
        for use in (rzc.get, rzc.put):
            with pytest.raises(rzc.ResourceError, match=r"connection.*Too many .*ulimit -n"):
                use(first if use is rzc.get else MODEL)
    held = rzc.get(first)  # this also keeps the connection to the store
    with tempfile.TemporaryDirectory() as folder, no_file_left():
        loads_shared_and_says(first, r"Too many open files .*ulimit -n")
        loads_shared_and_says(second, "Too many open files .*ulimit -n")
        third = rzc.put(MODEL)
        with pytest.raises(rzc.SaveError, match="Too many open files"):
            rzc.save(first, f"{folder}/model.rzc")
        with pytest.raises(rzc.ResourceError, match=r"Too many open files .*ulimit -n"):
            rzc.build(torch.nn.Linear, 10, 10)
    for ref in (first, second, third):
        assert_whole(ref)
    assert torch.equal(held, MODEL)


def thousands_of_loads_held():
    """Each needs a mapping, and a process may have 65,530."""
    ref = rzc.put(MODEL)
    held = [rzc.get(ref, prefault=False) for _ in range(30_000)]
    assert len({loaded.data_ptr() for loaded in held}) == 30_000
    assert all(torch.equal(loaded, MODEL) for loaded in held[::300])


def no_room_for_what_was_dropped():
    """A load that finds no room waits for the thread that unmaps dropped models."""
    ref = rzc.put(LARGE)
    kinds = itertools.cycle([("private", True), ("copy", False), ("private", False)])
    with address_space_for(3 * LARGE.nbytes):
        for (isolation, prefault), _ in zip(kinds, range(150), strict=False):
            loaded = rzc.get(ref, isolation=isolation, prefault=prefault)
            loaded[::1024] = 7
            del loaded
    assert_whole(ref, model=LARGE)


def no_address_space():
    ref = rzc.put(MODEL)
    with address_space_for(MIB):
        with pytest.raises(rzc.ResourceError, match=r"copy of 4\d{6} bytes: .*ulimit -v"):
            rzc.get(ref, isolation="copy")
        loads_shared_and_says(ref, "Cannot allocate memory .*ulimit -v")
    assert_whole(ref)


@contextlib.contextmanager
def no_thread_left():
    """This process is in a cgroup that allows no further thread."""
    group = Path(f"/sys/fs/cgroup/pids/rzc-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:  # no cgroup can be made: leave no address space for a stack
        with limited(resource.RLIMIT_STACK, 2**46):
            yield
        return
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        with pytest.raises(RuntimeError):
            threading.Thread(target=int).start()
        yield
    finally:
        (group / "pids.max").write_text("max")
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        time.sleep(0.2)
        group.rmdir()


def no_thread():
    """All code works with fewer threads. Metrics wait for a thread, in a bounded queue."""
    ref, model = rzc.put(LARGE), LARGE.clone()
    with tempfile.TemporaryDirectory() as folder:
        rzc.save(ref, f"{folder}/model.rzc")
        time.sleep(2)  # the thread of metrics has ended
        with no_thread_left():
            other = rzc.put(model)
            for isolation in ("private", "shared", "copy"):
                assert torch.equal(rzc.get(other, isolation=isolation), LARGE)
            rzc.inspect(other, verify=True)
            rzc.save(other, f"{folder}/other.rzc")
            restored = rzc.restore(f"{folder}/model.rzc")
            built = rzc.build(torch.nn.Linear, 1000, 1000)
            for _ in range(2 * metrics._KEPT):
                metrics.record("rzc_published_bytes", 0)
            deadline_s = time.monotonic() + 30
            while len(metrics._recorded) > metrics._KEPT:  # a thread could start after all
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
        assert_whole(rzc.restore(f"{folder}/other.rzc"), model=LARGE)
    for whole in (ref, other, restored):
        assert_whole(whole, model=LARGE)
    assert ray.get(built).weight.shape == (1000, 1000)
    deadline_s = time.monotonic() + 30
    while metrics._recorded:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def no_memory_for_huge_pages():
    """The kernel charges huge pages to the process. It refuses them, and the small ones stay."""
    ref = ray.put(rzc.Shared(LARGE))
    with charged_at_most(16 * MIB):
        loaded = rzc.get(ref)
        time.sleep(1.5)  # the thread that makes huge pages waits a second
        assert torch.equal(loaded, LARGE)
        loaded[0] = 7
        assert_whole(ref, model=LARGE)
    assert loaded[0] == 7
    assert_whole(ref, model=LARGE)


def another_user():
    """A process that may open neither the kernel's link nor the raylet's files."""
    ref, nobody = rzc.put(MODEL), 65534
    os.seteuid(nobody)
    try:
        loads_shared_and_says(ref, "nor the raylet.s descriptors open .* Operation not permitted")
        assert torch.equal(rzc.get(ref, isolation="copy"), MODEL)
    finally:
        os.seteuid(0)
    assert_whole(ref)


def no_proc():
    ref = rzc.put(MODEL)
    with mounts_of_its_own():
        mount(b"none", b"/proc", b"tmpfs", 0)
        loads_shared_and_says(ref, "the mappings of this process: No such file")
        assert torch.equal(rzc.get(rzc.put(MODEL), isolation="copy"), MODEL)
    assert_whole(ref)


def shared_memory_is_read_only():
    ref = rzc.put(MODEL)
    with mounts_of_its_own():
        read_only, remount, bind = 1, 32, 4096
        mount(b"none", b"/dev/shm", None, read_only | remount | bind)
        with pytest.raises(OSError, match="Read-only"):
            TAKEN.touch()
        assert_whole(ref)
        assert_whole(rzc.put(MODEL))


# --- a node ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def little_shared_memory_left():
    """The raylet writes a few pages of its own next to each object, and dies if there are none."""
    free = os.statvfs("/dev/shm")
    try:
        with TAKEN.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 16 * MIB)
        yield
    finally:
        TAKEN.unlink()


def shared_memory_is_full():
    """Ray's own `put` dies of SIGBUS here."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.rzc"
        rzc.save(LARGE, path)
        with little_shared_memory_left():
            for put in (lambda: rzc.put(LARGE), lambda: rzc.restore(path)):
                with pytest.raises(rzc.StoreFullError, match=r"no room for 67,?\d{3},?\d{3} bytes"):
                    put()
        assert_whole(rzc.put(LARGE), model=LARGE)
        assert_whole(rzc.restore(path), model=LARGE)


def spilled_in_the_middle_of_loads():
    """Four threads load objects, the store has room for two, and another thread puts more."""
    models = [torch.full((8 * MIB,), float(value)) for value in range(6)]
    refs = [rzc.put(model) for model in models]

    def load(thread):
        for turn in range(6):
            at = (thread + turn) % len(refs)
            assert torch.equal(rzc.get(refs[at]), models[at])

    with ThreadPoolExecutor(5) as pool:
        loading = [pool.submit(load, thread) for thread in range(4)]
        more = pool.submit(lambda: [rzc.put(models[0]) for _ in range(8)])
        for each in (*loading, more):
            each.result()
    for ref, model in zip(refs, models, strict=True):
        assert torch.equal(ray.get(ref), model)


def shared_memory_is_smaller_than_the_store():
    """Then Ray keeps its store on disk."""
    ray.shutdown()
    start(400 * MIB)
    refs = [rzc.put(LARGE) for _ in range(3)]
    for ref in refs:
        assert_whole(ref, model=LARGE)
        assert rzc.inspect(ref).where == "disk"


# --- a Ray without privileges and disk ------------------------------------------------------------


def no_privileges():
    """Pages are private through the raylet's descriptors; a mapped file is read from memory."""
    with tempfile.NamedTemporaryFile() as file:  # without a name, only the kernel's link opens it
        MODEL.numpy().tofile(file.name)
        storage = torch.UntypedStorage.from_file(file.name, False, MODEL.nbytes)
    restart_without_privileges_and_disk()
    start, end = storage.data_ptr(), storage.data_ptr() + MODEL.nbytes
    with pytest.raises(PermissionError):
        os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDONLY)
    assert torch.equal(ray.get(rzc.put(torch.tensor([]).set_(storage))), MODEL)

    @ray.remote
    def written(refs):
        ray.get(refs[0]).zero_()
        return rzc.inspect(refs[0]).held

    ref = rzc.put(MODEL)
    assert ray.get(written.remote([ref])) == "private"
    ray.get(ref).zero_()
    assert_whole(ref)


def store_too_small():
    restart_without_privileges_and_disk()
    with pytest.raises(rzc.StoreFullError, match=r"419,4\d\d,\d\d\d bytes.*object_store_memory"):
        rzc.put(torch.zeros(100, MIB))
    assert_whole(rzc.put(MODEL))


def store_full_of_what_is_used():
    """The doctor reports it, and advises a larger one."""
    restart_without_privileges_and_disk()
    held = ray.get(ray.put(np.ones(70 * MIB, np.uint8)))
    (finding,) = (each for each in doctor._round_trip() if each.check == "store")
    assert not finding.good
    assert "larger" in finding.mend
    assert len(held) == 70 * MIB  # in use: it cannot be spilled


ROWS = {
    row.__name__: row
    for row in (
        no_file_descriptor,
        thousands_of_loads_held,
        no_address_space,
        another_user,
        no_proc,
        shared_memory_is_read_only,
        shared_memory_is_full,  # before another row fills the store as far
        no_room_for_what_was_dropped,
        no_thread,
        no_memory_for_huge_pages,
        spilled_in_the_middle_of_loads,
        shared_memory_is_smaller_than_the_store,
        no_privileges,
        store_too_small,
        store_full_of_what_is_used,
    )
}


if __name__ == "__main__":
    unshared_mounts()
    mount(b"none", b"/dev/shm", b"tmpfs", 0, options=b"size=200m")
    start(150 * MIB)
    tell(ROWS, sys.argv[1:] or ROWS)
    ray.shutdown()
