"""Views by `from_numpy`, as in a torch without DLPack's exchange API: the same laws hold of them.

The driver and its actors make them so in this whole file, which runs the laws of others again. What
an architecture adds for its views has been met in the difficult models and layouts.
"""

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
from test_isolation import *  # noqa: F403
from test_put import *  # noqa: F403
from test_put import SOURCES, Published, observe

pytestmark = pytest.mark.parametrize("way", ["from_numpy"], indirect=True, scope="module")


@pytest.fixture(scope="module", params=[name for name in SOURCES if not name.startswith("hf-")])
def published(request, cluster):
    case = SOURCES[request.param]()
    return Published(case, rzc.put(case.model), observe(case, case.model))


def test_this_file_goes_the_plain_way(start, cluster):
    class Teller:
        def tell(self, refs):
            return rzc.inspect(refs[0]).ways

    ref = rzc.put(torch.ones(3))
    (teller,) = start(Teller)
    told = [rzc.inspect(ref).ways, ray.get(teller.tell.remote([ref]))]
    assert [ways["views"] for ways in told] == ["from_numpy", "from_numpy"]
    assert "views by from_numpy" in str(rzc.inspect(ref))


def test_a_view_is_over_the_block_and_keeps_it():
    array = np.arange(2**18, dtype=np.float32)
    gathered = gather(array)
    block = _core.Block(gathered.table, laid_out(gathered.segments()), "private")
    address, died = np.frombuffer(block, np.uint8).ctypes.data, weakref.ref(array)
    (tensor,) = tensors.over(block)
    assert tensor.data_ptr() == address + block.spans[0][0]
    expected = array.tobytes()
    del array, gathered, block
    gc.collect()
    assert died() is None
    assert bytes(tensor.untyped_storage()) == expected


def test_a_dtype_of_a_newer_torch_is_refused_with_the_versions(monkeypatch):
    sources = _core.Sources(None)
    sources.take(torch.empty(3, dtype=torch.uint7))
    gathered = _core.Gather(sources)
    block = _core.Block(gathered.table, laid_out(gathered.segments()), "shared")
    tensors._dtypes.cache_clear()
    monkeypatch.delattr(torch, "uint7")
    message = re.escape(f"torch {torch.__version__} has no uint7")
    with pytest.raises(rzc.VersionError, match=message):
        tensors.over(block)
