"""Snapshots: `restore` returns exactly the saved object, or fails."""

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from fresh import execute
from models import DIFFICULT
from ray_zerocopy import _core
from ray_zerocopy.store import ray_inside

_HARD = (
    *("tied_weights", "lstm", "spectral_norm", "numpy_attributes", "shared_storage_views"),
    *("slotted_pipeline", "class_by_value", "reference_cycle", "channels_last", "hooks"),
)


@pytest.mark.parametrize("name", _HARD)
def test_what_was_saved_is_restored(cluster, tmp_path, name):
    model = DIFFICULT[name]().model
    for saved in (model, rzc.put(model)):
        rzc.save(saved, tmp_path / "model.rzc")
        ref = rzc.restore(tmp_path / "model.rzc")
        assert_exact(model, ray.get(ref))
        assert rzc.inspect(ref, verify=True).held == "private"
    assert os.listdir(tmp_path) == ["model.rzc"]


@pytest.fixture(scope="module")
def model():
    numbers = torch.Generator().manual_seed(0)
    names = {"a": (10,), "b": (300, 40), "empty": (0,), "long": (700, 1000)}
    made = {name: torch.randn(shape, generator=numbers) for name, shape in names.items()}
    return made | {"array": np.arange(5000)}


@pytest.fixture
def path(cluster, model, tmp_path):
    rzc.save(model, tmp_path / "model.rzc")
    return tmp_path / "model.rzc"


def test_restored_in_another_process_and_store(cluster, model, path):
    code = """
        import sys, ray, ray_zerocopy as rzc, rays, torch
        rays.connect(num_cpus=1, object_store_memory=100_000_000)
        print(ray.get(rzc.restore(sys.argv[1]))["long"].view(torch.int32).sum().item())
        ray.shutdown()
    """
    done = execute(code, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == model["long"].view(torch.int32).sum().item()


def test_a_snapshot_is_inspected_without_unpickling(cluster, model, path):
    info, stored = rzc.inspect(path, verify=True), rzc.inspect(rzc.put(model))
    assert (info.where, info.held, info.verified) == ("file", "not at all", True)
    assert (info.spans, info.tensors) == (stored.spans, stored.tensors)
    assert info.checksums == stored.checksums
    assert f"in file: {path} at byte {info.offset:,}" in str(info)
    assert info.offset % 4096 == 0


def damaged(path, at, change=1):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ change]))


def test_every_byte_of_the_head_and_of_the_checksums_is_checked(path):
    """Tested with `inspect`, which shares its checks with `restore`."""
    info = rzc.inspect(path)
    head = path.read_bytes()[: info.offset]
    snapshot = _core.Snapshot(head, path.stat().st_size)
    used = 64 + len(snapshot.skeleton) + len(snapshot.table) + 4 * len(snapshot.buffers)
    start = 64 + 8 * len(info.spans)
    for at in (*range(used), *range(info.offset, info.offset + start)):
        damaged(path, at)
        with pytest.raises(rzc.BlockError):
            rzc.inspect(path)
        damaged(path, at)
    rzc.inspect(path, verify=True)


def test_damage_in_a_span_is_refused_and_named(path):
    info, numbers = rzc.inspect(path), random.Random(0)
    for span, (offset, nbytes) in enumerate(info.spans):
        for start in numbers.sample(range(nbytes), min(nbytes, 5)):
            at, change = info.offset + offset + start, numbers.randrange(1, 256)
            damaged(path, at, change)
            with pytest.raises(rzc.BlockError, match=rf"span {span} \(tensor {span}, .*damaged"):
                rzc.restore(path)
            with pytest.raises(rzc.BlockError, match=rf"span {span} \(tensor {span}, .*damaged"):
                rzc.inspect(path, verify=True)
            damaged(path, at, change)
    assert rzc.inspect(path, verify=True).verified


def test_every_truncation_and_foreign_files_are_refused(path):
    whole, numbers = path.read_bytes(), random.Random(0)
    cuts = {0, 1, 4, 63, 64, 65, 4095, 4096, 4097, len(whole) - 1}
    for cut in cuts | {numbers.randrange(len(whole)) for _ in range(30)}:
        path.write_bytes(whole[:cut])
        with pytest.raises(rzc.BlockError):
            rzc.restore(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(rzc.BlockError, match=rf"should have {len(whole)} bytes"):
        rzc.restore(path)
    path.write_bytes(b"PK\3\4" + whole)
    with pytest.raises(rzc.BlockError, match=rf"{path.name}: not a snapshot"):
        rzc.restore(path)


def test_what_was_refused_leaves_nothing(path):
    info = rzc.inspect(path)
    damaged(path, info.offset + info.nbytes - 1)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(300):  # 840 MB through a store of 700
        with pytest.raises(rzc.BlockError):
            rzc.restore(path)
    assert len(os.listdir("/proc/self/fd")) == files


def test_references_are_refused_and_named(cluster, tmp_path):
    model = {"net": [torch.ones(3), {"deep": ray.put(1)}]}
    for saved in (model, rzc.put(model)):
        with pytest.raises(rzc.PublishError, match=r"\['net'\]\[1\]\['deep'\] \(ObjectRef\)"):
            rzc.save(saved, tmp_path / "model.rzc")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(cluster, model, tmp_path):
    rzc.save(1, tmp_path / "model.rzc")
    before = (tmp_path / "model.rzc").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(rzc.SaveError, match="cannot be written"):
            rzc.save(model, tmp_path / "model.rzc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["model.rzc"]
    assert (tmp_path / "model.rzc").read_bytes() == before


def test_a_killed_save_leaves_nothing_under_the_name(tmp_path):
    code = """
        import sys, torch, ray_zerocopy as rzc
        model = torch.zeros(64, 2**20)
        print("ready", flush=True)
        while True:
            rzc.save(model, sys.argv[1])
    """
    numbers, path = random.Random(0), tmp_path / "model.rzc"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(path)],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(numbers.random())
        process.kill()
        process.wait()
        process.stdout.close()
        if path.exists():
            assert rzc.inspect(path, verify=True).verified
            path.unlink()


class Restorer:
    def restore(self, path):
        while True:
            rzc.restore(path)


def test_a_killed_restore_leaves_the_store_as_it_was(cluster, tmp_path):
    rzc.save(torch.zeros(150, 2**18), tmp_path / "model.rzc")
    numbers = random.Random(0)
    for _ in range(4):  # 630 MB through a store of 700 that must have room for 500 at the end
        restorer = ray.remote(Restorer).options(num_cpus=0).remote()
        ray.get(restorer.__ray_ready__.remote())
        restorer.restore.remote(tmp_path / "model.rzc")
        time.sleep(0.2 + numbers.random())
        ray.kill(restorer)
    time.sleep(2)
    assert rzc.inspect(rzc.put(torch.zeros(500, 2**18))).where == "store"


@pytest.mark.parametrize("url", ["memory://rzc/model.rzc", "file://{folder}/model.rzc"])
def test_urls(cluster, model, tmp_path, url):
    url = url.format(folder=tmp_path)
    rzc.save(rzc.put(model), url)
    loaded = ray.get(rzc.restore(url))
    assert_exact(model, loaded)
    assert rzc.inspect(url, verify=True).verified


@pytest.mark.parametrize("second", [2.0, torch.full((1500, 1500), 2.0), torch.full((50, 5), 2.0)])
def test_a_path_that_is_saved_anew_meanwhile_gives_one_object(
    cluster, tmp_path, monkeypatch, second
):
    """Head, checksums and block come from one file, even if the name moves to another one."""
    path = tmp_path / "model.rzc"
    second = torch.full((700, 1000), second) if isinstance(second, float) else second
    rzc.save({"step": 1, "weights": torch.full((700, 1000), 1.0)}, path)
    put = ray_inside.put

    def put_slowly(*args):
        placed = put(*args)
        rzc.save({"step": 2, "weights": second}, path)
        return placed

    monkeypatch.setattr(ray_inside, "put", put_slowly)
    loaded = ray.get(rzc.restore(path))
    assert set(loaded["weights"].unique().tolist()) == {loaded["step"]} == {1}


def test_a_link_stays_one_and_its_target_is_written(tmp_path, model):
    (tmp_path / "versions").mkdir()
    link, target = tmp_path / "latest.rzc", tmp_path / "versions" / "7.rzc"
    link.symlink_to("versions/7.rzc")
    for _ in range(2):  # a link to nothing, and one to a file
        rzc.save(model, link)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert_exact(model, rzc.open(target))
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["7.rzc"]


def test_a_snapshot_has_the_rights_of_any_new_file(tmp_path, monkeypatch):
    """The umask belongs to the process: reading it sets it, which other threads see."""
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", None)
    rzc.save(torch.ones(3), tmp_path / "model.rzc")
    monkeypatch.undo()
    assert os.umask(before) == 0o027
    assert os.stat(tmp_path / "model.rzc").st_mode & 0o777 == 0o640
