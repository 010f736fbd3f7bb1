"""Tensors in mapped files are read from the files, exactly, whatever happens to the files."""

import os
import re
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from footprint import anonymous_memory, mapped_memory, small_pages, trim, with_peak
from safetensors.torch import load_file, save_file

MIB = 1 << 20
ROWS, COLUMNS = 24, MIB // 4  # of float32: 24 MiB


def content(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator)


def rows(tensor):
    """Tensors in another order than in the file; some are small."""
    return {
        "last": tensor[ROWS // 2 :],
        "first": tensor[: ROWS // 2],
        "column": tensor[:, 3],
        "few": tensor[5, 7:20],
    }


def save_safetensors(path):
    save_file({f"{index:02}": row.contiguous() for index, row in enumerate(content())}, path)


def save_torch(path):
    torch.save([*content()], path)


def save_numpy(path):
    np.save(path, content().numpy())


def save_raw(path):
    content().numpy().tofile(path)


def open_numpy(path, mode):
    array = np.lib.format.open_memmap(path, mode=mode)
    with warnings.catch_warnings(action="ignore"):  # about a read-only array
        return rows(torch.from_numpy(array))


def open_raw(path, shared):
    storage = torch.UntypedStorage.from_file(str(path), shared, 4 * ROWS * COLUMNS)
    return rows(torch.tensor([]).set_(storage).view(ROWS, COLUMNS))


OPENED = {
    "safetensors": (save_safetensors, load_file),
    "torch.load": (save_torch, lambda path: torch.load(path, mmap=True)),
    "memmap-r": (save_numpy, lambda path: open_numpy(path, "r")),
    "memmap-r+": (save_numpy, lambda path: open_numpy(path, "r+")),
    "memmap-c": (save_numpy, lambda path: open_numpy(path, "c")),
    "from_file-shared": (save_raw, lambda path: open_raw(path, shared=True)),
    "from_file-private": (save_raw, lambda path: open_raw(path, shared=False)),
}


def evict(path):
    """Drop a file from the page cache. Mapped pages stay."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


@pytest.fixture(scope="module")
def store(cluster):
    """A cluster with one object, so that imports are not counted."""
    ray.get(rzc.put(torch.ones(1000)))


@pytest.fixture(params=OPENED, scope="module")
def opened(request, tmp_path_factory):
    """A path, and a function that opens its tensors."""
    save, load = OPENED[request.param]
    path = tmp_path_factory.mktemp("files") / "weights.npy"
    save(path)
    return path, load


@pytest.mark.parametrize("state", ["warm", "cold"])
def test_a_file_is_read_to_the_bit_and_not_through_its_mapping(store, opened, state):
    path, load = opened
    tensors = load(path)
    if state == "cold":
        evict(path)
    before = mapped_memory(path)
    with small_pages() if state == "warm" else nullcontext():
        ref, peak = with_peak(lambda: rzc.put(tensors))
    assert mapped_memory(path) - before < MIB
    assert peak < (14 * MIB if state == "cold" else 4 * MIB)  # the read buffers
    assert_exact(load(path), ray.get(ref))


def test_what_was_written_since_wins_over_the_file(store, tmp_path):
    save_safetensors(tmp_path / "weights")
    tensors = load_file(tmp_path / "weights")
    tensors["03"][1000:3000] = 7
    tensors["04"].zero_()
    before = mapped_memory(tmp_path / "weights")
    loaded = ray.get(rzc.put(tensors))
    assert mapped_memory(tmp_path / "weights") - before < MIB
    assert_exact(tensors, loaded)
    assert not torch.equal(loaded["03"], load_file(tmp_path / "weights")["03"])


def test_what_was_written_through_a_shared_mapping_is_in_the_file(store, tmp_path):
    save_raw(tmp_path / "weights")
    tensors = open_raw(tmp_path / "weights", shared=True)
    tensors["first"][3] = 7
    assert_exact(tensors, ray.get(rzc.put(tensors)))


@pytest.mark.parametrize("event", ["removed", "replaced"])
def test_a_file_that_is_gone_is_read_as_it_was_mapped(store, tmp_path, event):
    save_safetensors(tmp_path / "weights")
    tensors = load_file(tmp_path / "weights")
    if event == "removed":
        (tmp_path / "weights").unlink()
    else:
        save_file({"00": torch.zeros(ROWS * COLUMNS)}, tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "weights")
    loaded = ray.get(rzc.put(tensors))
    assert torch.equal(torch.stack([loaded[f"{row:02}"] for row in range(ROWS)]), content())


def test_a_file_that_shrank_is_an_error_and_leaves_nothing(store, tmp_path):
    """An error, not a SIGBUS as from a read of the mapping."""
    path = tmp_path / "weights"
    save_safetensors(path)
    tensors = load_file(path)
    os.truncate(path, 10 * MIB)
    evict(path)
    before = anonymous_memory()
    for _ in range(40):  # 960 MB: more than the store has room for
        with pytest.raises(rzc.PublishError) as raised:
            rzc.put(tensors)
    message = r"bytes [0-9]+ to [0-9]+ cannot be read: it has 10485760 bytes now"
    assert re.search(f"{re.escape(str(path))}: {message}", str(raised.value))
    trim()
    assert anonymous_memory() - before < 20 * MIB
    assert ray.get(rzc.put(torch.ones(3))).tolist() == [1, 1, 1]


ARRAYS = {
    "memmap": lambda path: np.load(path, mmap_mode="r"),
    "memmap, part": lambda path: np.load(path, mmap_mode="c")[3:9],
    "matrix": lambda path: np.load(path).view(np.matrix),
    "records": lambda path: np.load(path).view([("a", "f4"), ("b", "i4")]).view(np.recarray),
    "array": np.load,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_of_any_class_is_a_view_on_the_block(store, tmp_path, kind):
    save_numpy(tmp_path / "array.npy")
    array = ARRAYS[kind](tmp_path / "array.npy")
    with small_pages():
        ref, put_peak = with_peak(lambda: rzc.put([array]))
        (loaded,), get_peak = with_peak(lambda: ray.get(ref))
    assert max(put_peak, get_peak) < 8 * MIB  # of 24
    assert rzc.inspect(ref).skeleton_nbytes < MIB
    assert type(loaded) is type(array)
    assert loaded.dtype == array.dtype
    assert loaded.strides == array.strides
    assert loaded.tobytes() == array.tobytes()
