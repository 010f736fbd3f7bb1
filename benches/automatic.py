"""What `enable` leaves to Ray: `ray.put` while it is off and on."""

import gc
import time
from statistics import median

import numpy as np
import pandas as pd
import ray
import ray_zerocopy as rzc

LEFT_ALONE = {
    "an int": 7,
    "a dict of 100 strings": {f"key {number}": f"value {number}" for number in range(100)},
    "an array of 1 MB": np.zeros(125_000),
    "a pandas frame of 240 KB": pd.DataFrame({name: np.arange(10_000.0) for name in "abc"}),
}


def time_puts(obj, rounds=200):
    """Median seconds of `ray.put`: (off, on). In turns, in pairs whose order alternates."""
    seconds = {rzc.disable: [], rzc.enable: []}
    gc.collect()
    for number in range(rounds + 20):
        for switch in list(seconds)[:: 1 if number % 2 else -1]:
            switch()
            start = time.perf_counter()
            ref = ray.put(obj)
            elapsed = time.perf_counter() - start
            del ref
            if number >= 20:
                seconds[switch].append(elapsed)
    rzc.disable()
    return tuple(map(median, seconds.values()))
