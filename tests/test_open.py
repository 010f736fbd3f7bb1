"""`open` returns the saved object, over the file's pages, whatever happens to the file. No Ray.

A separate process, `writer`, changes the file.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact, assert_same_output
from footprint import anonymous_memory, trim
from jupyter_client.manager import KernelManager
from models import ARCHITECTURES, DIFFICULT, LAYOUTS
from ray_zerocopy import _core
from rays import free_port
from torch.utils.data import DataLoader

NBYTES = 16 << 20


@pytest.fixture(scope="module")
def workers():
    """Two processes that have opened nothing: `worker.apply(function, arguments)`."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as one, context.Pool(1) as other:
        yield one, other


@pytest.fixture(scope="module")
def writer(workers):
    return workers[1]


@pytest.fixture
def path(tmp_path):
    rzc.save(made(0), tmp_path / "model.rzc")
    return tmp_path / "model.rzc"


def made(start):
    """A model of `NBYTES`, different for each `start`."""
    return {"w": torch.arange(start, start + NBYTES // 4, dtype=torch.int32), "start": start}


def is_whole(model):
    return torch.equal(model["w"], made(model["start"])["w"])


# --- the opened object ----------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["private", "copy"])
@pytest.mark.parametrize(
    "name",
    [
        *("tied_weights", "lstm", "numpy_attributes", "shared_storage_views", "class_by_value"),
        *("reference_cycle", "channels_last", "hooks", "bert", "llama", "t5"),
    ],
)
def test_what_was_saved_is_opened(name, isolation, tmp_path):
    case = {**DIFFICULT, **ARCHITECTURES}[name]()
    rzc.save(case.model, tmp_path / "model.rzc")
    opened = rzc.open(tmp_path / "model.rzc", isolation=isolation)
    assert_exact(case.model, opened)
    assert_same_output(case, case.model, opened)


def test_tensors_of_every_layout_are_opened(tmp_path):
    source = {name: make() for name, make in LAYOUTS.items()}
    rzc.save(source, tmp_path / "layouts.rzc")
    assert_exact(source, rzc.open(tmp_path / "layouts.rzc"))


def test_a_fresh_process_opens_without_ray(path):
    code = f"""
        import ray, ray_zerocopy as rzc
        model = rzc.open({str(path)!r})
        print(model["start"], int(model["w"][-1]), ray.is_initialized())
    """
    done = python(code)
    assert done.stdout.split() == ["0", str(NBYTES // 4 - 1), "False"]
    assert not done.stderr


def python(code, *arguments, **how):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, **how)


def test_ray_running_makes_no_difference(cluster, path):
    @ray.remote
    def start(path):
        return rzc.open(path)["w"][7].item()

    assert ray.get(start.remote(path)) == rzc.open(path)["w"][7].item() == 7


# --- pages ----------------------------------------------------------------------------------------

OPENED = {}


def grown_by_open(path):
    """The sum of an opened model, and the private memory that it takes in bytes."""
    rzc.open(path, prefault=False)["w"].sum()  # torch keeps some memory after a first sum
    trim()
    before = anonymous_memory()
    OPENED["model"] = rzc.open(path, prefault=True)
    total = OPENED["model"]["w"].sum().item()
    trim()
    return total, anonymous_memory() - before


def proportional(path):
    """Bytes of a file in this process's memory. A byte that n processes map counts as 1/n."""
    nbytes, of_it = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            field, *rest = line.split()
            if not field.endswith(":"):
                of_it = rest[-1] == str(path)
            elif field == "Pss:" and of_it:
                nbytes += int(rest[0]) << 10
    return nbytes


def test_processes_share_the_pages_and_have_next_to_none_of_their_own(workers, path):
    expected = made(0)["w"].sum().item()
    for worker in workers:
        total, grown = worker.apply(grown_by_open, (path,))
        assert total == expected
        assert grown <= 2 << 20
    for worker in workers:
        assert worker.apply(proportional, (path,)) <= NBYTES * 0.55


def write_weights(path):
    model = rzc.open(path)
    model["w"][100:2000] = -1
    OPENED["written"] = model
    return model["w"][100:102].tolist()


def test_a_write_stays_in_its_process(writer, path):
    model, before = rzc.open(path), path.read_bytes()
    assert writer.apply(write_weights, (path,)) == [-1, -1]
    assert is_whole(model)
    assert is_whole(rzc.open(path))
    assert path.read_bytes() == before


# --- changes of the file --------------------------------------------------------------------------


def overwrite(path, start=5):
    """Put another model of the same length there, in place."""
    rzc.save(made(start), f"{path}.new")
    shutil.copyfile(f"{path}.new", path)  # truncates, then writes


def write_within(path):
    with open(path, "r+b") as file:
        file.seek(-NBYTES, os.SEEK_END)
        file.write(b"\xff" * NBYTES)


def map_and_write(path):
    with open(path, "r+b") as file:
        torch.from_file(str(path), shared=True, size=NBYTES, dtype=torch.uint8).fill_(1)
        file.flush()


def replace(path):
    rzc.save(made(5), path)


CHANGES = {
    "truncated": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, 10_000),
    "overwritten": overwrite,
    "written_within": write_within,
    "written_through_a_mapping": map_and_write,
    "replaced": replace,
    "unlinked": os.unlink,
    "renamed": lambda path: os.rename(path, f"{path}.old"),
}


def change(name, path):
    CHANGES[name](path)


def test_weights_stay_whatever_becomes_of_the_file(writer, workers, tmp_path):
    for name in CHANGES:
        path = tmp_path / f"{name}.rzc"
        rzc.save(made(0), path)
        model, untouched = rzc.open(path, prefault=True), rzc.open(path, prefault=False)
        model["w"][9] = -9
        writer.apply(change, (name, path))
        assert model["w"][9] == -9, name
        model["w"][9] = 9
        assert is_whole(model), name
        assert is_whole(untouched), name


def test_who_changes_the_file_may_be_this_process(path):
    model = rzc.open(path)
    overwrite(path)
    assert is_whole(model)
    assert rzc.open(path)["start"] == 5


def test_a_dropped_model_holds_nobody_up_and_leaves_no_descriptor(path):
    rzc.open(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        rzc.open(path)
    deadline_s = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > before:  # another thread unmaps and closes
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.truncate(path, 0)


def test_signals_of_python_are_left_alone(writer, path):
    heard = []
    before = signal.signal(signal.SIGIO, lambda *_: heard.append(1))
    try:
        model = rzc.open(path)
        writer.apply(change, ("truncated", path))
        assert is_whole(model)
        assert not heard
        os.kill(os.getpid(), signal.SIGIO)
        time.sleep(0)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGIO, before)


class Rows(torch.utils.data.Dataset):
    """Rows of a model opened before the fork of the workers."""

    def __init__(self, path):
        self.model = rzc.open(path)

    def __len__(self):
        return 4096

    def __getitem__(self, row):
        return self.model["w"].view(4096, -1)[row]


def test_forked_data_loader_workers_keep_their_weights_too(writer, path):
    """Each process has its own lease, because a copy in the parent does not help its children."""
    rows = Rows(path)
    loader = DataLoader(rows, 64, num_workers=2, multiprocessing_context="fork", prefetch_factor=1)
    batches = iter(loader)
    seen = [next(batches)]
    writer.apply(change, ("overwritten", path))
    seen += batches
    assert is_whole({"w": torch.cat(seen).ravel(), "start": 0})
    assert is_whole(rows.model)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_fork_at_any_moment_of_a_change(writer, path, when):
    model = rzc.open(path)
    if when == "before":
        writer.apply(change, ("truncated", path))
    changing = writer.apply_async(change, ("truncated", path)) if when == "between" else None
    child = os.fork()
    if not child:
        signal.alarm(100)
        while os.path.getsize(path) and when != "after":
            time.sleep(0.01)
        if when == "after":
            os.truncate(path, 0)
        os._exit(0 if is_whole(model) else 1)
    assert os.waitpid(child, 0)[1] == 0
    if changing:
        changing.get()
    assert is_whole(model)


def test_a_parent_that_goes_leaves_its_children_their_weights(writer, path):
    model = rzc.open(path)
    child = os.fork()
    if not child:
        signal.alarm(100)
        while os.path.getsize(path):
            time.sleep(0.01)
        os._exit(0 if is_whole(model) else 1)
    del model
    writer.apply(change, ("truncated", path))
    assert os.waitpid(child, 0)[1] == 0


# --- without a lease ------------------------------------------------------------------------------


def test_a_file_that_is_open_for_writing_is_warned_of(path):
    with open(path, "r+b"), pytest.warns(rzc.IsolationWarning, match="is open for writing"):
        model = rzc.open(path)
    assert is_whole(model)
    with open(path, "r+b"):
        assert is_whole(rzc.open(path, isolation="copy"))


def test_another_users_file_is_warned_of(path):
    for folder in list(path.parents)[: -len(Path(tempfile.gettempdir()).parts)]:
        os.chmod(folder, 0o755)
    code = """
        import os, sys, ray_zerocopy as rzc
        os.setuid(65534)
        model = rzc.open(sys.argv[1])
        print(model["w"][3].item())
    """
    done = python(code, path)
    assert done.stdout == "3\n"
    assert "must not be changed in place while it is open here" in done.stderr
    assert "belongs to another user" in done.stderr


# --- refusals -------------------------------------------------------------------------------------


def test_damaged_heads_and_truncated_files_are_refused(path):
    whole, info = path.read_bytes(), rzc.inspect(path)
    for isolation in ("private", "copy"):
        for cut in (0, 3, 63, 64, 4095, info.offset, info.offset + 64, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(rzc.BlockError, match=str(path)):
                rzc.open(path, isolation=isolation)
        for at in (0, 9, 70, info.offset - 4097, info.offset + 8, info.offset + 66):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(rzc.BlockError, match=str(path)):
                rzc.open(path, isolation=isolation)
        path.write_bytes(whole + b"\0")
        with pytest.raises(rzc.BlockError, match=rf"should have {len(whole)} bytes"):
            rzc.open(path, isolation=isolation)
    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes(damaged)
    with pytest.raises(rzc.BlockError, match="damaged"):
        rzc.open(path, isolation="copy")
    with pytest.raises(rzc.BlockError, match="damaged"):
        rzc.inspect(path, verify=True)


def test_a_newer_format_is_told_from_damage(path):
    with open(path, "rb") as file:
        head, _ = _core.open_snapshot(file.fileno(), str(path), True)
    newer = head.table[:4] + b"\x09" + head.table[5:]
    block = path.read_bytes()[head.offset :]
    path.write_bytes(_core.snapshot_head(head.skeleton, newer, head.buffers) + block)
    with pytest.raises(rzc.VersionError, match=r"has version 9.*upgrade"):
        rzc.open(path)


def test_what_cannot_be_mapped_is_refused_with_a_way_out(path, tmp_path):
    with pytest.raises(ValueError, match="into the file: use 'private' or 'copy'"):
        rzc.open(path, isolation="shared")
    with pytest.raises(ValueError, match=r"is a URL.*ray_zerocopy\.restore"):
        rzc.open("s3://bucket/model.rzc")
    with pytest.raises(FileNotFoundError, match=r"nothing\.rzc"):
        rzc.open(tmp_path / "nothing.rzc")


def test_open_is_public_but_shadows_nothing():
    assert rzc.open.__module__.startswith("ray_zerocopy")
    assert "open" not in rzc.__all__


# --- web workers ----------------------------------------------------------------------------------

APP = """
import json, os
import ray_zerocopy as rzc, torch

model = rzc.open(os.environ["MODEL"])

async def app(scope, receive, send):
    assert scope["type"] == "http"
    with torch.no_grad():
        outputs = model(torch.ones(2, 256)).sum(-1).tolist()
    body = json.dumps({"pid": os.getpid(), "outputs": outputs}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
"""


def test_uvicorn_with_four_workers(writer, tmp_path):
    model = torch.nn.Linear(256, 4096)
    path = tmp_path / "model.rzc"
    rzc.save(model, path)
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--workers", "4", "--lifespan", "off"]
    command += ["--port", str(port), "--log-level", "warning", "--timeout-worker-healthcheck", "99"]
    environment = os.environ | {"MODEL": str(path), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment)
    expected = model(torch.ones(2, 256)).sum(-1).tolist()

    def ask(_):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as answer:
                told = json.load(answer)
        except ConnectionError:
            return None
        except urllib.error.URLError:  # none has started
            return time.sleep(0.5)
        assert told["outputs"] == pytest.approx(expected, rel=1e-3)
        return told["pid"]

    try:
        with ThreadPoolExecutor(8) as threads:  # sequential requests would all go to one worker
            pids, deadline = set(), time.monotonic() + 200
            while len(pids - {None}) < 4:
                assert time.monotonic() < deadline, pids
                pids |= set(threads.map(ask, range(32)))
            writer.apply(change, ("truncated", path))
            again = set(threads.map(ask, range(200)))
            assert len(again - {None}) > 1
    finally:
        server.terminate()
        server.wait()


CELLS = (
    """
import ray_zerocopy as rzc, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(256, 256)
    def forward(self, x):
        return self.layer(x).sum().item()
model = Net().requires_grad_(False)
rzc.save(model, {path!r})
print(model(torch.ones(1, 256)))
""",
    """
import ray_zerocopy as rzc, torch
print(rzc.open({path!r})(torch.ones(1, 256)))
""",
)


def test_a_notebook_opens_after_a_restart_what_it_saved(tmp_path):
    """Also if it has defined the class."""

    def listen(message):
        if message["content"].get("name") == "stdout":
            told.append(message["content"]["text"])

    told, kernel = [], KernelManager(kernel_name="python3", transport="ipc")
    kernel.start_kernel()
    try:
        for cell in CELLS:
            code = cell.format(path=str(tmp_path / "model.rzc"))
            client = kernel.blocking_client()
            client.start_channels()
            client.wait_for_ready(timeout=120)
            client.execute_interactive(code, timeout=120, output_hook=listen)
            client.stop_channels()
            kernel.restart_kernel(now=True)
    finally:
        kernel.shutdown_kernel(now=True)
    saved, opened = map(float, "".join(told).split())
    assert saved == pytest.approx(opened, rel=1e-4)
