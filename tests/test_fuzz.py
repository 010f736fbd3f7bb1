"""Random tables give a `BlockError`, or a tensor for each view, by each way to make views.

A few thousand here. `make fuzz` tries CASES of them from SEED on, after the Rust core's own.
`FOUND` has tables that once were accepted.
"""

import os
import random
import struct

import numpy as np
import pytest
import ray_zerocopy as rzc
import torch
from ray_zerocopy import _core
from ray_zerocopy.objects import tensors
from test_core import DTYPES, Guarded
from ways import WAYS, made_by

CASES, SEED = int(os.environ.get("CASES", 3000)), int(os.environ.get("SEED", 0))

# Near these, sums and products of 64 bits overflow.
EDGES = [2**bits + more for bits in (31, 32, 58, 62, 63) for more in (-1, 0)] + [2**64 - 1]


class Tables(random.Random):
    """Tables with a few spans and views. Most numbers are small."""

    def number(self):
        return self.choice(EDGES) if self.random() < 0.01 else self.randrange(4)

    def view(self, spans):
        dims = self.choice([0, 1, 1, 2, 2, 3, 4, 33, 65])  # numpy 1 has 32, numpy 2 has 64
        many = dims > 4
        shape = [1 if many and self.random() < 0.99 else self.number() for _ in range(dims)]
        flags = self.choice([0, 0, 2, 2, 8, self.randrange(17)])
        span, dtype = self.randrange(spans), self.randrange(len(DTYPES))
        return span, dtype, flags, self.number(), shape, [self.number() for _ in shape]

    def table(self):
        sizes = [self.choice([0, 16, 4096, 4096]) for _ in range(self.randint(1, 3))]
        return encode(sizes, [self.view(len(sizes)) for _ in range(self.randint(1, 4))])


def encode(sizes, over):
    """A table, and the bytes of its block."""
    start = -(-(64 + 8 * len(sizes)) // 64) * 64  # after the header and the checksums
    offsets = [
        start + sum(-(-nbytes // 64) * 64 for nbytes in sizes[:i]) for i in range(len(sizes))
    ]
    nbytes = offsets[-1] + sizes[-1]
    table = b"RZCT" + struct.pack("<HHQII", 2, 0, nbytes, len(sizes), len(over))
    for span in zip(offsets, sizes, strict=True):
        table += struct.pack("<QQ", *span)
    for span, dtype, flags, offset, shape, stride in over:
        table += struct.pack("<IBBHQ", span, dtype, flags, len(shape), offset)
        table += struct.pack(f"<{2 * len(shape)}Q", *shape, *stride)
    return table, nbytes


@pytest.fixture(scope="module")
def room():
    memory = np.zeros(2**15, np.uint8)
    return memory[-memory.ctypes.data % 64 :]


def header(table, nbytes):
    fingerprint = _core.snapshot_head(b"", table, [])[40:48]  # it contains the table's XXH3
    return (struct.pack("<4sIQ", b"RZCB", 2, nbytes) + fingerprint).ljust(64, b"\0")


def opened(table, nbytes, room):
    room[:64] = np.frombuffer(header(table, nbytes), np.uint8)
    return _core.Block(table, [room[:nbytes]], "shared")


def assert_is(view, tensor, block):
    span, name, flags, offset, shape, stride = view
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (getattr(torch, name), shape, stride)
    assert tensor.requires_grad == bool(flags & _core.REQUIRES_GRAD)
    assert isinstance(tensor, torch.nn.Parameter) == bool(flags & _core.PARAMETER)
    assert (tensor.is_conj(), tensor.is_neg()) == (bool(flags & 4), bool(flags & 8))
    if 0 not in shape:
        start = np.frombuffer(block, np.uint8).ctypes.data + block.spans[span][0]
        assert tensor.data_ptr() == start + offset * tensor.itemsize


@pytest.mark.filterwarnings("ignore:.* experimental:UserWarning", "ignore:.*quantize_per_tensor")
def test_a_table_is_refused_or_each_of_its_views_is_a_tensor(room):
    tables, made = Tables(SEED), 0
    for _ in range(CASES):
        table, nbytes = tables.table()
        try:
            block = opened(table, nbytes, room)
        except rzc.BlockError:
            continue
        for way in WAYS:
            with made_by(way):
                made_of_it = tensors.over(block, [])
            for view, tensor in zip(block.views, made_of_it, strict=True):
                assert_is(view, tensor, block)
        made += 1
    assert CASES / 5 < made < CASES
    print(f"{CASES:,} tables, {made:,} of them made")


@pytest.mark.parametrize("isolation", ["private", "shared", "copy"])
def test_an_anchored_block_ends_before_its_memory_or_is_refused(isolation):
    """The memory ends at a guard page: a block that reaches beyond gives SIGSEGV."""
    tables, guarded, made = Tables(SEED), Guarded(2**16), 0
    for _ in range(CASES):
        table, nbytes = tables.table()
        if tables.random() < 0.2:  # a table that does not match the block
            table = table[:8] + struct.pack("<Q", tables.choice([*EDGES, nbytes - 64])) + table[16:]
        there = tables.choice([64, nbytes, tables.randrange(64, nbytes + 1), nbytes + 4096])
        head = header(table, nbytes)
        anchor = guarded.at_the_end(head + bytes(there - 64))[:64]
        try:
            block = _core.Block(table, [anchor], isolation, anchored=True)
        except rzc.BlockError:
            continue
        whole = np.frombuffer(block, np.uint8)
        assert whole[:64].tobytes() == head
        if isolation == "shared":
            assert whole.ctypes.data == anchor.ctypes.data
            assert len(whole) <= guarded.memory.ctypes.data + guarded.end - anchor.ctypes.data
        assert not whole[64:].any()
        for view, tensor in zip(block.views, tensors.over(block, []), strict=True):
            assert_is(view, tensor, block)
        made += 1
    assert CASES / 6 < made < CASES
    print(f"{CASES:,} anchored blocks, {made:,} of them made")


# What torch refused with errors of its own: dtype, flags, offset, shape, stride.
FOUND = {
    "a negative dimension": (25, 2, 3, [1, 2**64 - 1, 1], [2, 0, 2]),
    "too many elements": (4, 2, 1, [2, 2**63 - 1], [0, 0]),
    "too many elements before a zero": (5, 1, 1, [1, 2**62, 5, 0], [3, 3, 0, 2]),
    "a dimension beyond 63 bits": (23, 2, 3, [2, 0, 2**63, 1], [1, 0, 2, 2]),
    "a stride beyond 63 bits": (26, 2, 2, [3, 1, 1], [3, 3, 2**64 - 1]),
    "an offset beyond 63 bits": (34, 0, 2**63, [3, 2, 0], [0, 2, 3]),
    "a gradient of integers": (21, 3, 0, [], []),
    "a conjugate of reals": (13, 5, 2, [0, 3], [3, 1]),
    "a flag of nobody": (6, 16, 0, [], []),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_no_tensor_to_torch_is_refused(name, room):
    table, nbytes = encode([4096], [(0, *FOUND[name])])
    with pytest.raises(rzc.BlockError, match="torch has no tensor of"):
        opened(table, nbytes, room)


# Tensors to torch, but no arrays to numpy: dtype, offset, shape, stride.
BEYOND_NUMPY = {
    "65 dimensions": (6, 0, [1] * 65, [1] * 65),
    "a stride of one element": (4, 0, [2, 1], [1, 2**62]),
    "elements repeated": (4, 0, [2**62], [0]),
}


@pytest.mark.parametrize("name", BEYOND_NUMPY)
def test_what_numpy_cannot_express_is_a_tensor(name, way, room):
    dtype, *geometry = BEYOND_NUMPY[name]
    block = opened(*encode([4096], [(0, dtype, 0, *geometry)]), room)
    assert_is(block.views[0], *tensors.over(block, []), block)


def test_a_snapshots_head_is_refused_or_tells_what_was_written():
    """With valid checksums, like a malicious table."""
    tables = Tables(SEED)
    for _ in range(CASES):
        (table, nbytes), skeleton = tables.table(), tables.randbytes(tables.randrange(20))
        damaged = bytearray(table)
        damaged[tables.randrange(len(table))] = tables.randrange(256)
        buffers = [tables.randrange(2**32) for _ in range(tables.randrange(3))]
        head = _core.snapshot_head(skeleton, bytes(damaged), buffers)
        cut = tables.choice([len(head), tables.randrange(len(head))])
        try:
            read = _core.Snapshot(head[:cut], len(head) + nbytes)
        except (rzc.BlockError, rzc.VersionError):
            continue
        assert (read.skeleton, read.table, read.buffers) == (skeleton, damaged, buffers)
        assert read.offset + read.nbytes == len(head) + nbytes
