"""A view is a tensor over the block, by each way to make views."""

import gc
import re
import weakref

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from ray_zerocopy import _core
from ray_zerocopy.objects import tensors
from test_core import gather, laid_out
from ways import made_by


class Teller:
    def tell(self, refs, way):
        with made_by(way):
            return rzc.inspect(refs[0]).ways


def test_inspect_tells_how_views_are_made(way, start, cluster):
    ref = rzc.put(torch.ones(3))
    (teller,) = start(Teller)
    told = [rzc.inspect(ref).ways, ray.get(teller.tell.remote([ref], way))]
    assert [ways["views"] for ways in told] == [way, way]
    assert f"views by {way}" in str(rzc.inspect(ref))


def test_a_view_is_over_the_block_and_keeps_it(way):
    array = np.arange(2**18, dtype=np.float32)
    gathered = gather(array)
    block = _core.Block(gathered.table, laid_out(gathered.segments()), "private")
    address, died = np.frombuffer(block, np.uint8).ctypes.data, weakref.ref(array)
    (tensor,) = tensors.over(block, [])
    assert tensor.data_ptr() == address + block.spans[0][0]
    expected = array.tobytes()
    del array, gathered, block
    gc.collect()
    assert died() is None
    assert tensor.numpy().tobytes() == expected


def test_a_dtype_of_a_newer_torch_is_refused_with_the_versions(monkeypatch, way):
    sources = _core.Sources(None)
    sources.take(torch.empty(3, dtype=torch.uint7))
    gathered = _core.Gather(sources)
    block = _core.Block(gathered.table, laid_out(gathered.segments()), "shared")
    tensors._dtypes.cache_clear()
    monkeypatch.delattr(torch, "uint7")
    message = re.escape(f"uses torch.uint7, which torch {torch.__version__} lacks")
    with pytest.raises(rzc.VersionError, match=message):
        tensors.over(block, [])
