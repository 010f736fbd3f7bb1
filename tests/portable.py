"""The behaviour on systems other than Linux, from an extension with the feature `portable`.

`make test` runs it on Linux. The laws of put, get and snapshots hold. Features that only Linux has
are refused, or give a warning.
"""

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from models import DIFFICULT, LAYOUTS
from ray_zerocopy import _core

pytestmark = pytest.mark.filterwarnings("ignore::ray_zerocopy.IsolationWarning")

HARD = ("tied_weights", "spectral_norm", "numpy_attributes", "shared_storage_views")


def test_this_extension_is_the_portable_one():
    assert "only Linux" in _core.huge_pages_obstacle()


@pytest.mark.parametrize("isolation", ["private", "shared", "copy"])
@pytest.mark.parametrize("name", HARD)
def test_what_was_put_comes_back(cluster, name, isolation):
    model = DIFFICULT[name]().model
    assert_exact(model, rzc.get(rzc.put(model), isolation=isolation))


def test_every_layout_comes_back(cluster):
    layouts = {name: make() for name, make in LAYOUTS.items()}
    assert_exact(layouts, ray.get(rzc.put(layouts)))


def test_what_lies_in_a_mapped_file_is_put_from_memory(cluster, tmp_path):
    np.save(tmp_path / "array.npy", np.arange(5 << 20))
    mapped = np.load(tmp_path / "array.npy", mmap_mode="c")
    mapped[1] = 7  # makes a private copy of the page
    assert_exact(np.asarray(mapped), ray.get(rzc.put(np.asarray(mapped))))


class Worker:
    def load(self, refs, isolation):
        self.loaded = rzc.get(refs[0], isolation=isolation)

    def write(self):
        self.loaded.fill_(7)

    def see(self):
        return self.loaded.sum().item()


def test_others_see_a_write_except_into_a_copy(start):
    writer, reader = start(Worker, 2)
    for isolation, seen in [("private", 7), ("shared", 7), ("copy", 1)]:
        ref = rzc.put(torch.ones(100_000))
        ray.get([worker.load.remote([ref], isolation) for worker in (writer, reader)])
        ray.get(writer.write.remote())
        assert ray.get(reader.see.remote()) == seen * 100_000


@pytest.mark.filterwarnings("default")
def test_shared_pages_in_place_of_private_ones_are_warned_of(cluster):
    ref = rzc.put(torch.ones(100_000))
    with pytest.warns(rzc.IsolationWarning, match="only Linux .* changes"):
        rzc.get(ref)
    info = rzc.inspect(ref)
    assert info.held == "shared"
    assert "only Linux" in info.fallback
    assert info.huge_nbytes is None


def test_a_snapshot_is_restored_or_refused(cluster, tmp_path):
    path, model = tmp_path / "model.rzc", {"a": torch.randn(300_000), "b": np.arange(9)}
    rzc.save(model, path)
    ref = rzc.restore(path)
    assert_exact(model, ray.get(ref))
    rzc.inspect(ref, verify=True)
    data = bytearray(path.read_bytes())
    data[-1_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(rzc.BlockError, match="damaged"):
        rzc.restore(path)


def test_a_loader_is_not_followed(cluster):
    with pytest.raises(rzc.RayZeroCopyError, match="only Linux"):
        rzc.build(lambda: torch.nn.Linear(64, 64))
