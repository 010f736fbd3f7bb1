"""With huge or small pages, filled in or not, the object is the same, and writes stay private."""

import time

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from fresh import run
from ray_zerocopy import _core
from torch import nn

HUGE = 2 * 2**20


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)), nn.Embedding(1000, 700))


def by_ray(source):
    """Written by Ray, like a task's return value."""
    return ray.put(rzc.Shared(source))


def inner_nbytes(info):
    """The bytes in whole 2 MiB units of the store's file."""
    start, end = -(-info.offset // HUGE) * HUGE, (info.offset + info.nbytes) // HUGE * HUGE
    return max(0, end - start)


def wait_until_huge(ref):
    deadline = time.monotonic() + 60
    while (info := rzc.inspect(ref)).huge_nbytes < inner_nbytes(info):
        assert time.monotonic() < deadline, info
        time.sleep(0.05)
    assert inner_nbytes(info) > 5 * HUGE
    assert f"{info.huge_nbytes:,} bytes in huge pages" in str(info)


def test_pages_can_be_huge_here():
    assert _core.huge_pages_obstacle() is None


def test_what_put_writes_lies_in_huge_pages(cluster):
    """At the latest when it is used: the store may have had small pages there."""
    ref = rzc.put(model())
    loaded = ray.get(ref)
    wait_until_huge(ref)
    assert_exact(model(), loaded)


def test_what_ray_writes_is_made_huge_while_it_is_used(cluster):
    source = model()
    ref = by_ray(source)
    loaded, written = ray.get(ref), ray.get(ref)
    with torch.no_grad():
        written[0].weight[3, 5] = 7
    wait_until_huge(ref)
    assert_exact(source, loaded)
    expected = source[0].weight.detach().clone()
    expected[3, 5] = 7
    assert torch.equal(written[0].weight, expected)
    assert_exact(source, ray.get(ref))


def test_a_write_into_huge_pages_stays_with_its_object(cluster):
    source = model()
    ref = rzc.put(source)
    used = ray.get(ref)
    wait_until_huge(ref)
    one, other = ray.get(ref), ray.get(ref)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    assert_exact(source, other)
    assert_exact(source, used)
    assert_exact(source, ray.get(ref))
    assert torch.equal(one[0].bias, source[0].bias + 1)


@pytest.mark.parametrize("put", [rzc.put, by_ray])
@pytest.mark.parametrize("prefault", [True, False])
@pytest.mark.parametrize("isolation", ["private", "shared", "copy"])
def test_every_way_of_loading_gives_the_object(cluster, put, prefault, isolation):
    assert_exact(model(), rzc.get(put(model()), prefault=prefault, isolation=isolation))


def test_threads_end_with_the_pages_and_small_blocks_have_none():
    """Runs in a new store, whose pages nobody has made huge yet."""

    @run
    def in_a_new_store():
        import time

        import ray
        import ray_zerocopy as rzc
        import rays
        import torch
        from footprint import threads_named

        def threads():
            return threads_named("rzc.prefault")

        rays.connect(num_cpus=1, object_store_memory=200 * 2**20)
        small = rzc.put(torch.zeros(2**19 - 1000))
        kept = [ray.get(small) for _ in range(10)]
        assert threads() == 0
        put, deadline = rzc.put(torch.zeros(5 * 2**20)), time.monotonic() + 60
        while not rzc.inspect(put).huge_nbytes:
            assert time.monotonic() < deadline
        large = ray.put(rzc.Shared(torch.zeros(5 * 2**20)))
        loaded = ray.get(large)
        while threads() == 0:  # a thread names itself once it runs
            assert time.monotonic() < deadline
        assert threads() == 1
        del loaded
        while threads():
            assert time.monotonic() < deadline
        del kept
        ray.shutdown()


def test_who_drops_a_model_waits_for_no_thread():
    """A page in a pipe cannot become huge, and the thread sleeps before it tries again."""

    @run
    def in_a_new_store():
        import contextlib
        import os
        import time
        from pathlib import Path

        import ray
        import ray_zerocopy as rzc
        import rays
        import torch
        from footprint import threads_named

        def is_at_work():
            return threads_named("rzc.prefault") > 0

        @contextlib.contextmanager
        def in_a_pipe(address):
            for line in Path("/proc/self/maps").read_text().splitlines():
                span, _, offset, *_ = line.split()
                start, end = (int(bound, 16) for bound in span.split("-"))
                if start <= address < end:
                    break
            file = os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDONLY)
            pipe = os.pipe()
            os.splice(file, pipe[1], 4096, offset_src=int(offset, 16) + address - start)
            yield
            for each in (file, *pipe):
                os.close(each)

        rays.connect(num_cpus=1, object_store_memory=2**30)
        outlived = []
        for turn in range(12):
            ref = ray.put(rzc.Shared(torch.full((10 * 2**20,), float(turn))))
            loaded = [rzc.get(ref)]
            with in_a_pipe(loaded[0].data_ptr() + 2**22):
                time.sleep(1.05 + 0.007 * turn)
                loaded.clear()
                outlived.append(is_at_work())
        assert any(outlived)
        deadline = time.monotonic() + 60
        while is_at_work():
            assert time.monotonic() < deadline
        ray.shutdown()


def test_where_the_kernel_refuses_all_is_as_before():
    """As on kernels before Linux 6.1."""

    @run
    def without_huge_pages():
        import ctypes

        import ray
        import ray_zerocopy as rzc
        import rays
        import torch
        from ray_zerocopy import _core

        set_thp_disable = 41
        assert ctypes.CDLL(None).prctl(set_thp_disable, 1, 0, 0, 0) == 0
        assert "PR_SET_THP_DISABLE" in _core.huge_pages_obstacle()
        rays.connect(num_cpus=1, object_store_memory=200 * 2**20)
        source = torch.arange(5 * 2**20)
        for ref in (rzc.put(source), ray.put(rzc.Shared(source))):
            info = rzc.inspect(ref)
            assert (info.huge_nbytes, info.held) == (0, "private")
            for prefault in (True, False):
                one, other = (rzc.get(ref, prefault=prefault) for _ in range(2))
                one[5] = 7
                assert torch.equal(other, source)
            assert torch.equal(rzc.get(ref, isolation="shared"), source)
        ray.shutdown()
