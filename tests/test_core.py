"""The Rust core from Python, with `bytes` as the oracle, and its stub."""

import ctypes
import gc
import mmap
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import ray_zerocopy as rzc
import torch
from ray_zerocopy import _core
from ray_zerocopy.objects import tensors
from ways import WAYS

DTYPES = sorted({repr(v)[6:] for v in vars(torch).values() if isinstance(v, torch.dtype)})


def gather(*parts):
    """A gather of these byte strings, with a dense uint8 view over each."""
    sources = _core.Sources(None)
    for part in parts:
        sources.take_buffer(part)
    return _core.Gather(sources)


def rejoined(block):
    return [bytes(memoryview(block)[start : start + n]) for start, n in block.spans]


def laid_out(segments):
    """The segments as Ray lays them out: one buffer, each part at a multiple of 64 bytes."""
    whole = bytearray()
    for segment in segments:
        whole.extend(bytes(-len(whole) % 64))
        whole.extend(segment)
    memory = np.empty(len(whole) + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][: len(whole)]
    aligned[:] = np.frombuffer(whole, np.uint8)
    starts = np.cumsum([0] + [len(memoryview(s)) + -len(memoryview(s)) % 64 for s in segments])
    ends = (start + len(memoryview(s)) for start, s in zip(starts, segments, strict=False))
    return [aligned[start:end] for start, end in zip(starts, ends, strict=False)]


def written(gathered):
    """The whole block, written into `room`."""
    room = np.zeros(gathered.nbytes + 64, np.uint8)
    room = room[-room.ctypes.data % 64 :][: gathered.nbytes]
    gathered.write(room, room)
    return room


class Guarded:
    """Memory followed by a page that may not be read, like the end of a mapping."""

    def __init__(self, nbytes, *flags):
        guard = mmap.PAGESIZE
        self.end = -(-nbytes // guard) * guard
        self.map = mmap.mmap(-1, self.end + guard, *flags)
        self.memory = np.frombuffer(self.map, np.uint8)
        guarded = ctypes.c_void_p(self.memory.ctypes.data + self.end)
        assert ctypes.CDLL(None).mprotect(guarded, ctypes.c_size_t(guard), 0) == 0

    def at_the_end(self, part):
        """Memory that starts with these bytes and ends at the guard page."""
        start = (self.end - len(part)) // 64 * 64
        memory = self.memory[start : self.end]
        memory[:] = np.frombuffer(bytes(part).ljust(len(memory), b"\0"), np.uint8)
        return memory


@pytest.mark.parametrize("seed", range(5))
def test_a_block_holds_every_byte_that_was_gathered(seed):
    numbers = random.Random(seed)
    sizes = [numbers.choice([0, 1, 63, 64, 5_000, 20_000, 2**20, 5 * 2**20]) for _ in range(9)]
    parts = [numbers.randbytes(size) for size in sizes]
    gathered = gather(*parts)
    segments = gathered.segments()
    for buffers in (laid_out(segments), [bytes(segment) for segment in segments]):
        for isolation in ("private", "shared", "copy"):
            assert rejoined(_core.Block(gathered.table, buffers, isolation)) == parts


def test_what_lies_apart_is_copied_and_says_so():
    gathered = gather(bytes(20_000), bytes(20_000))
    block = _core.Block(gathered.table, [bytes(s) for s in gathered.segments()], "shared")
    assert block.held == "copied"
    assert "3 buffers are not contiguous" in block.fallback


def test_large_storages_travel_from_where_they_are():
    array = np.zeros(2**20, np.uint8)
    segments = gather(array).segments()
    assert len(segments) == 2
    assert np.frombuffer(segments[1], np.uint8).ctypes.data == array.ctypes.data
    assert memoryview(segments[1]).readonly


def test_a_segment_keeps_its_storage_and_a_tensor_its_block():
    array = np.arange(2**18, dtype=np.uint8)
    died = weakref.ref(array)
    gathered = gather(array)
    segments = gathered.segments()
    over = tensors.over(_core.Block(gathered.table, laid_out(segments), "shared"), [])
    expected = array.copy()
    del array, gathered
    gc.collect()
    assert died() is not None
    del segments
    gc.collect()
    assert died() is None
    assert np.array_equal(over[0].numpy(), expected)


def test_a_block_is_written_whole_into_room_that_was_used_before():
    parts = [bytes(range(1, 101)), bytes([7]) * 2**20, b"", bytes([9]) * 9 * 2**20]
    gathered = gather(*parts)
    room = np.full(gathered.nbytes + 300, 255, np.uint8)
    room = room[-room.ctypes.data % 64 :]
    anchor = room[128:192]
    gathered.write(anchor, room)
    assert (room[:128] == 255).all(), "what lies before the anchor is Ray's"
    for isolation in ("private", "shared", "copy"):
        block = _core.Block(gathered.table, [anchor], isolation, anchored=True)
        assert rejoined(block) == parts
    zeros = len(room) - 128 - np.count_nonzero(room[128:])
    start = room[128 : 192 + 8 * len(parts)]  # the header and the checksums
    padding = gathered.nbytes - sum(map(len, parts)) - np.count_nonzero(start)
    assert zeros == padding + len(room) - 128 - gathered.nbytes


@pytest.mark.parametrize("isolation", ["private", "shared", "copy"])
@pytest.mark.parametrize("flags", [(mmap.MAP_SHARED,), (mmap.MAP_PRIVATE,)], ids=["file", "own"])
def test_what_follows_an_anchor_is_there_or_refused(isolation, flags):
    parts = [bytes([5]) * 300_000, bytes([6]) * 100]
    gathered = gather(*parts)
    whole = bytes(written(gathered))
    guarded = Guarded(2**20, *flags)
    for nbytes in (len(whole), _core.HEADER_NBYTES, 4096, len(whole) - 64):
        anchor = guarded.at_the_end(whole[:nbytes])[: _core.HEADER_NBYTES]
        if nbytes == len(whole):
            block = _core.Block(gathered.table, [anchor], isolation, anchored=True)
            assert rejoined(block) == parts
        else:
            with pytest.raises(rzc.BlockError, match=rf"should have {len(whole)} bytes"):
                _core.Block(gathered.table, [anchor], isolation, anchored=True)


@pytest.mark.parametrize("isolation", ["private", "shared", "copy"])
def test_what_follows_an_anchor_in_no_file_is_what_was_written(isolation):
    gathered = gather(bytes([5]) * 300_000)
    memory = written(gathered)
    memory[5000:] = 0
    with pytest.raises(rzc.BlockError, match="damaged"):
        _core.Block(gathered.table, [memory[: _core.HEADER_NBYTES]], isolation, anchored=True)


def test_no_room_no_block():
    gathered = gather(bytes(30_000))
    room = np.zeros(40_000, np.uint8)
    for anchor, memory in (
        (room[20_000:], room),
        (room, room[64:]),
        (room[-1:], room[:100]),
        (room, bytes(room)),
    ):
        with pytest.raises(BufferError, match=f"no room for a block of {gathered.nbytes} bytes"):
            gathered.write(anchor, memory)
    assert not room.any()
    room.flags.writeable = False
    with pytest.raises(BufferError, match="no room"):
        gathered.write(room, room)


def test_checksums_are_the_same_whoever_writes_the_block():
    numbers = random.Random(1)
    gathered = gather(*map(numbers.randbytes, [0, 1, 5_000, 20_000, 2**20, 5 * 2**20 + 1]))
    by_ray = _core.Block(gathered.table, laid_out(gathered.segments()), "shared")
    room = np.zeros(gathered.nbytes, np.uint8)
    gathered.write(room, room)
    by_us = _core.Block(gathered.table, [room], "shared")
    assert by_us.checksums == by_ray.checksums
    assert by_us.checksums[0] == 0x2D06800538D394C2, "the XXH3 of nothing"
    by_us.verify()


def test_damage_is_found_on_demand_and_named():
    sources = _core.Sources(None)
    for shape in ((8, 8), (500, 40)):
        sources.take(torch.ones(shape))
    gathered = _core.Gather(sources)
    room = np.zeros(gathered.nbytes, np.uint8)
    gathered.write(room, room)
    block = _core.Block(gathered.table, [room], "shared")
    offset, nbytes = block.spans[1]
    room[offset + nbytes - 1] ^= 1
    with pytest.raises(rzc.BlockError, match=r"span 1 \(tensor 1, float32 \[500, 40\]; bytes"):
        block.verify()
    room[70] ^= 1
    with pytest.raises(rzc.BlockError, match="header of the block, or its checksums"):
        block.verify()


def test_a_block_that_nobody_wrote_is_refused():
    gathered = gather(bytes(30_000))
    room = np.zeros(40_000, np.uint8)
    with pytest.raises(rzc.BlockError):
        _core.Block(gathered.table, [room[:64]], "private", anchored=True)


@pytest.mark.filterwarnings("ignore:.* experimental:UserWarning", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_every_dtype(name, way):
    dtype = getattr(torch, name)
    numbers = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    sources = _core.Sources(None)
    source = torch.empty(0, dtype=dtype)
    if source.is_quantized:
        assert sources.take(source) is None, "a scale goes with it"
        return
    source.set_(numbers.untyped_storage(), 0, (2, 3), (1, 2))
    assert sources.take(source) == 0
    gathered = _core.Gather(sources)
    block = _core.Block(gathered.table, laid_out(gathered.segments()), "shared")
    if block.tensors([]) == [None] and "dlpack" in WAYS:
        less_than_a_byte = re.fullmatch(r"u?int[1-7]", name)
        assert less_than_a_byte or name.startswith(("bits", "float4", "bcomplex"))
    (tensor,) = tensors.over(block, [])
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (dtype, source.shape, source.stride())
    assert bytes(tensor.untyped_storage()) == bytes(numbers)


def refused(match, table, buffers):
    with pytest.raises(rzc.BlockError, match=match):
        _core.Block(table, buffers, "private")


def test_a_truncated_block_is_refused_with_the_numbers():
    gathered = gather(bytes(100), bytes(30_000))
    packed, piece = map(bytes, gathered.segments())
    refused(rf"should have {gathered.nbytes} bytes, it has 2048", gathered.table, [packed])
    refused(r"should have \d+ bytes, it has \d+", gathered.table, [packed, piece[:-1]])
    refused(r"should have \d+ bytes, it has 0", gathered.table, [])


def test_a_foreign_block_is_refused():
    one, other = gather(bytes(100), bytes(30_000)), gather(bytes(120), bytes(30_000))
    assert one.nbytes == other.nbytes
    refused("another object's", one.table, [bytes(s) for s in other.segments()])
    refused("another object's", one.table, [bytes(len(bytes(s))) for s in one.segments()])


def test_a_damaged_table_is_refused():
    gathered = gather(bytes(100))
    segments = [bytes(s) for s in gathered.segments()]
    refused("not an offset table", b"nonsense", segments)
    refused("the offset table is damaged", b"RZCT\x00" + gathered.table[5:], segments)
    refused("table should have", gathered.table[:-1], segments)


def test_what_a_newer_package_wrote_is_age_and_no_damage():
    gathered = gather(bytes(100))
    (block,) = (bytes(s) for s in gathered.segments())
    newer = {
        "table": (b"RZCT\x09" + gathered.table[5:], block),
        "block": (gathered.table, b"RZCB\x09" + block[5:]),
    }
    for what, (table, buffer) in newer.items():
        with pytest.raises(rzc.VersionError, match=f"{what} has version 9, .* up to 2: upgrade"):
            _core.Block(table, [buffer], "private")


def test_module_state_is_a_fresh_module_with_the_differences():
    fresh = torch.nn.Module().__dict__
    state, other = (_core.module_state({"training": False, "extra": 1}) for _ in range(2))
    assert list(state.items()) == [*(fresh | {"training": False}).items(), ("extra", 1)]
    assert [type(value) for value in state.values()][:-1] == [type(v) for v in fresh.values()]
    containers = [name for name, value in fresh.items() if hasattr(value, "__len__")]
    assert not any(state[name] is other[name] for name in containers)


def test_what_a_module_is_reduced_to_is_the_inverse_of_module_state():
    module = torch.nn.BatchNorm1d(3).eval()
    reducer = _core.ModuleReducer(type(module), object.__new__, _core.restore_module)
    differing = reducer.reduce(module)[2]
    assert "_parameters" in differing
    assert "_forward_hooks" not in differing
    state = _core.module_state(differing)
    assert list(state.items()) == list(module.__dict__.items())
    module.__dict__ = dict(reversed(state.items()))
    assert reducer.reduce(module) is NotImplemented
    module.__dict__ = {"training": True}
    assert reducer.reduce(module) is NotImplemented


def test_the_stub_tells_the_truth(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.write_text(r"ray_zerocopy\._core\.\w+\.__buffer__")  # a slot without a name before 3.12
    check = [sys.executable, "-m", "mypy.stubtest", "ray_zerocopy._core"]
    options = ["--allowlist", allowed, "--ignore-unused-allowlist"]
    options += ["--mypy-config-file", "pyproject.toml"]
    done = subprocess.run(
        check + options, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
