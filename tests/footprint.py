"""Measures of a process's own memory, in bytes, for the tests and the benches."""

import contextlib
import ctypes
import gc
import threading
from pathlib import Path


def trim():
    """Collect garbage and give free memory back to the kernel, so that no growth hides in it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def small_pages():
    """Let this process get no huge pages meanwhile.

    Allocators, numpy's and pyarrow's among them, ask for such, and give back what is in them: the
    next few bytes that they take there would be 2 MiB more of memory.
    """
    thp_disable = 41  # PR_SET_THP_DISABLE, linux/prctl.h
    assert ctypes.CDLL(None).prctl(thp_disable, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert ctypes.CDLL(None).prctl(thp_disable, 0, 0, 0, 0) == 0


def inode_beneath(address: int) -> int | None:
    """The inode of the file that is mapped at an address; None for other memory."""
    with Path("/proc/self/maps").open() as lines:
        for line in lines:
            addresses, _, _, _, inode, *_ = line.split()
            start, end = (int(number, 16) for number in addresses.split("-"))
            if start <= address < end:
                return int(inode) or None
    return None


def unique_set_size() -> int:
    """The memory that would be freed if this process ended.

    Of files in shared memory that is what it has written to private pages: the rest stays in the
    store, even where no other process has it mapped now.

    Read line by line: a list of all mappings would itself be megabytes of the process.
    """
    trim()
    unique, in_store = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            field, *rest = line.split(maxsplit=5)
            if not field.endswith(":"):
                in_store = rest[-1].startswith("/dev/shm/")
            elif field in (("Anonymous:",) if in_store else ("Private_Clean:", "Private_Dirty:")):
                unique += int(rest[0]) * 1024
    return unique


def anonymous_memory() -> int:
    """RssAnon of this process: its private memory, without what is mapped from files."""
    return _status("RssAnon")


def resident_memory() -> int:
    """RssAnon and RssShmem: private memory, and the shared memory that this process has mapped.

    Both from one read: weights move from the one to the other meanwhile, and would count twice.
    """
    return _status("RssAnon", "RssShmem")


def page_table_nbytes() -> int:
    """VmPTE of this process: the size of its page table."""
    return _status("VmPTE")


def _status(*fields):
    status = Path("/proc/self/status").read_text()
    return sum(int(status.split(f"{field}:")[1].split()[0]) * 1024 for field in fields)


def with_peak(act, measure=anonymous_memory):
    """The result of `act()`, and the peak growth of a measure during it."""
    trim()
    before = peak = measure()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, measure())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = act()
    finally:
        done.set()
        watcher.join()
    return result, peak - before


def threads_named(name) -> int:
    """How many threads of this process have a name; they may end meanwhile."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            count += (task / "comm").read_text() == f"{name}\n"
    return count


def mapped_memory(path) -> int:
    """Bytes of a file that are in this process's page table."""
    resident, is_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0]:
            is_it = fields[-1] == str(path)
        elif is_it and fields[0] == "Rss:":
            resident += int(fields[1]) * 1024
    return resident
