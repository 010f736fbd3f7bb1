"""Arrays lie in the block, take at most the bytes of their memory, and share memory as before.

These tests use no store: `load` opens the block from the buffers of a pickle.
"""

import itertools
import pickle
import time

import numpy as np
import pandas as pd
import pytest
import ray_zerocopy as rzc
import torch
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from ray_zerocopy import _core


def stored(obj):
    """The pickle of a stored object, and the bytes of its block."""
    shared = rzc.Shared(obj)
    made = pickle.dumps(shared, protocol=5)
    return made, shared.__reduce_ex__(5)[1][0]


def load(obj):
    return pickle.loads(pickle.dumps(rzc.Shared(obj), protocol=5))


def block_nbytes(obj):
    _, (head, *segments) = rzc.Shared(obj).__reduce_ex__(5)
    block = _core.Block(head["table"], [bytes(segment) for segment in segments], "copy")
    return sum(nbytes for _, nbytes in block.spans)


BASE = np.arange(24_000, dtype=np.float32)
SQUARE = BASE[:22_500].reshape(150, 150)
RECORDS = np.zeros(2_000, np.dtype([("a", "f8"), ("b", "i2"), ("c", "U3")], align=True))
RECORDS["a"], RECORDS["c"] = np.arange(2_000), "abc"

# Each with the bytes that it may take: those of its memory or of its elements, if fewer.
WINDOWS = {
    "broadcast": (np.broadcast_to(BASE[:100], (1000, 100)), 400),
    "a broadcast scalar": (np.broadcast_to(np.float64(3), (500, 500)), 8),
    "broadcast in the middle": (np.broadcast_to(SQUARE[:, None, :], (150, 9, 150)), 90_000),
    "sliding windows": (sliding_window_view(BASE, 64), BASE.nbytes),
    "sliding windows in two dimensions": (sliding_window_view(SQUARE, (5, 7)), SQUARE.nbytes),
    "overlapping rows": (as_strided(BASE, (1000, 30), (8, 4)), 999 * 8 + 120),
    "reversed": (BASE[::-1], BASE.nbytes),
    "reversed and transposed": (SQUARE[::-1, ::-1].T, SQUARE.nbytes),
    "windows, reversed": (sliding_window_view(BASE, 64)[::-1, ::-1], BASE.nbytes),
    "every third": (BASE[::3], BASE.nbytes // 3),
    "a column": (SQUARE[:, 7], 600),
    "a broadcast of every third": (np.broadcast_to(BASE[::3], (50, 8000)), 32_000),
    "a part": (SQUARE[20:40, 10:140], 20 * 130 * 4),
    "a field": (RECORDS["a"], 16_000),
    "a field, broadcast": (np.broadcast_to(RECORDS["b"], (30, 2_000)), 4_000),
    "records, reversed": (RECORDS[::-1], RECORDS.nbytes),
    "transposed": (SQUARE.T, SQUARE.nbytes),
    "Fortran's": (np.asfortranarray(SQUARE), SQUARE.nbytes),
    "dates": (np.arange("2020", "2050", dtype="M8[D]")[::-1], 100_000),
    "unaligned": (np.frombuffer(bytes(range(250)), "f4", 20, offset=3)[::-1], 80),
    "long doubles": (np.broadcast_to(np.ones(50, np.longdouble), (9, 50)), 800),
    "a masked one": (
        np.ma.array(np.broadcast_to(BASE[:9], (3, 9)), mask=np.eye(3, 9) > 0),
        36 + 27,
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_takes_no_more_than_it_has(name):
    source, nbytes = WINDOWS[name]
    loaded = load(source)
    assert type(loaded) is type(source)
    assert (loaded.dtype, loaded.shape) == (source.dtype, source.shape)
    assert np.array_equal(loaded, source)
    assert loaded.flags.writeable == source.flags.writeable
    assert block_nbytes(source) <= nbytes


def shares(arrays):
    return [np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2)]


def test_arrays_share_memory_as_they_did():
    base = np.arange(10_000, dtype=np.float64)
    source = [
        base[:600],
        base[500:1000],
        base[999:2000],
        base[2000:3000],
        base[9000:],
        base.view("f4")[17:40],
        base[100:300].reshape(20, 10).T,
        base[::-1][:5],
    ]
    loaded = load(source)
    assert shares(loaded) == shares(source)
    loaded[0][550] = source[0][550] = -1
    for ours, theirs in zip(loaded, source, strict=True):
        assert np.array_equal(ours, theirs)
    assert block_nbytes(source) <= (3000 + 1000 + 64) * 8, "what lies between is left out"


def test_small_arrays_and_scalars_share_too():
    base = np.arange(3.0)
    source = {"all": base, "two": base[1:], "none": base[3:], "scalar": base[2:].reshape(())}
    loaded = load(source)
    loaded["all"][2] = 7
    assert (loaded["two"][1], loaded["scalar"][()], loaded["none"].size) == (7, 7, 0)


@pytest.mark.parametrize("nbytes", [24, 80_000])
def test_an_array_and_a_tensor_share_memory_as_they_did(nbytes):
    array = np.arange(nbytes // 8, dtype=np.float64)
    tensor, other = torch.from_numpy(array[1:]), torch.arange(3.0)
    frombuffer = torch.frombuffer(array, dtype=torch.int64)
    source = {
        "array": array,
        "tensor": tensor,
        "numpy's": other.numpy(),
        "other": other,
        "frombuffer": frombuffer,
        "storage": other.untyped_storage(),
    }
    loaded = load(source)
    assert block_nbytes(source) <= nbytes + 12
    loaded["array"][2], loaded["other"][0] = -3, -5
    assert (loaded["tensor"][1], loaded["numpy's"][0]) == (-3, -5)
    assert loaded["frombuffer"].view(torch.float64)[2] == -3
    assert loaded["storage"].data_ptr() == loaded["other"].data_ptr()


def test_what_would_be_misaligned_is_apart():
    raw = np.zeros(4_000, np.uint8)
    source = [raw, torch.frombuffer(raw, dtype=torch.float32, offset=2, count=900)]
    loaded = load(source)
    assert torch.equal(loaded[1], source[1])


def test_many_arrays_load_in_a_time_that_grows_as_they_do():
    def seconds(count):
        made = stored({i: np.full(300, i) for i in range(count)})[0]
        times = []
        for _ in range(5):
            start = time.perf_counter()
            pickle.loads(made)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(16 * 500) < 64 * seconds(500), "the square of 16 is 256"


def test_many_tensors_of_one_storage_load_in_a_time_that_grows_as_they_do():
    def seconds(count):
        made = stored([t for whole in torch.zeros(count, 2, 80) for t in whole.unbind()])[0]
        times = []
        for _ in range(5):
            start = time.perf_counter()
            pickle.loads(made)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(16 * 250) < 64 * seconds(250), "the square of 16 is 256"


def test_a_write_to_a_frame_stays_out_of_others_that_showed_the_same_values(cluster):
    """As in the source, where pandas copies them before the write."""
    frame = pd.DataFrame({"x": np.zeros(5000), "y": np.zeros(5000)})
    shown = {"frame": frame, "column": frame["y"], "shallow": frame.copy(deep=False)}
    loaded = rzc.get(rzc.put(shown))
    loaded["column"].iloc[0] = 7
    loaded["shallow"].loc[1, "x"] = 8
    assert (loaded["frame"] == 0).all().all()
    alone = rzc.inspect(rzc.put(pd.DataFrame({"x": np.zeros(5000)})))
    assert alone.unshared_nbytes == 0
