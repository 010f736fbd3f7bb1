"""What a process has of memory for itself, in bytes: the measures of the tests and the benches."""

import ctypes
import gc
import threading
from pathlib import Path

import psutil


def trim():
    """Collect garbage and give free memory back to the kernel: growth could hide in it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def unique_set_size() -> int:
    """The memory that would be free if this process ended."""
    trim()
    return psutil.Process().memory_full_info().uss


def anonymous_memory() -> int:
    """RssAnon of this process: its private memory, without what is mapped from files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def with_peak(act):
    """What `act()` returns, and by how much anonymous memory was up at any moment of it."""
    trim()
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = act()
    finally:
        done.set()
        watcher.join()
    return result, peak - before
