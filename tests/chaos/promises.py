"""The promises of `publish`, tested in a cluster of one node whose owner is killed.

`test_promises.py` runs this in a separate interpreter. It reports each row as soon as it is done.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
import ray_zerocopy as rzc
import rays
import torch
from fresh import tell
from ray_zerocopy.errors import BlockError
from ray_zerocopy.registry import catalog, publication
from torch import nn

SOON_S = 90  # the longest wait, on a busy machine
FOLDER = Path(tempfile.mkdtemp())


def filled(value, size=64):
    model = nn.Linear(size, size).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(value))
    return model


def value_of(model):
    (value,) = {value for p in model.parameters() for value in p.unique().tolist()}
    return int(value)


def until(condition, seconds=SOON_S):
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "this takes too long"
        time.sleep(0.1)


def actor(name):
    return ray.get_actor(name, catalog.NAMESPACE)


def kill(name):
    """Kill the catalog or the owner. Ray restarts it."""
    pid = ray.get(actor(name).__ray_call__.remote(lambda _: os.getpid()), timeout=SOON_S)
    os.kill(pid, signal.SIGKILL)


def is_lost(name):
    """Whether the cluster has noticed that a current version has no block."""
    try:
        return publication.find(name, wait_s=0.1).ref is None
    except rzc.LostVersionError:
        return True


def generations(name):
    return {v.number: v.generation for v in rzc.versions(name) if v.state == "live"}


# --- make runs outside of every job ---------------------------------------------------------------

JOB = """
import json, os, sys
import ray, torch, ray_zerocopy as rzc
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
def variable(): return {"who": os.environ.get("WHO"), "weight": torch.ones(4)}
def module():
    import recipe
    return {"who": recipe.WHO, "weight": torch.ones(4)}
def told(name, make):
    try:
        rzc.publish(name, make=make)
        return rzc.load(name)["who"]
    except rzc.RayZeroCopyError as error:
        return type(error).__name__
print(json.dumps([told(sys.argv[2] + "-v", variable), told(sys.argv[2] + "-m", module)]))
"""


def job(address, who):
    """The results of two makes in a job with its own variable and module, as if submitted."""
    folder = Path(tempfile.mkdtemp())
    (folder / "recipe.py").write_text(f"WHO = {who!r}\n")
    runtime_env = {"env_vars": {"WHO": who}, "working_dir": str(folder)}
    config = json.dumps({"runtime_env": runtime_env, "metadata": {}})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOB, address, who],
        capture_output=True,
        text=True,
        timeout=3 * SOON_S,
        env=os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": config},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def make_runs_outside_of_every_job():
    """The first job to publish starts the catalog."""
    address = ray.get_runtime_context().gcs_address
    for who in ("a", "b"):
        assert job(address, who) == [None, "PublishError"]
        rzc.retire(f"{who}-v")


# --- healing versions are made again --------------------------------------------------------------


def buffers():
    model = filled(1)
    for name in ("alpha", "beta", "gamma"):
        model.register_buffer(name, torch.ones(3), persistent=False)
    return model


def tagged():
    model = filled(2)
    model.tags = {"alpha", "beta", "gamma", "delta"}
    return model


def of_a_class_of_its_own():
    class Net(nn.Linear):
        pass

    model = Net(8, 8)
    model.load_state_dict(filled(3, 8).state_dict())
    return model


def hooked():
    torch.manual_seed(0)
    return nn.utils.spectral_norm(nn.Linear(8, 8))


def script():
    return torch.jit.script(nn.Sequential(filled(4), nn.ReLU(), filled(4)))


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1}
    return BertModel(BertConfig(**config, num_attention_heads=2, intermediate_size=37)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2)).eval()


def of_all_kinds():
    makes = (buffers, tagged, of_a_class_of_its_own, hooked, script, bert, gpt2)
    return {make.__name__: make() for make in makes}


def what_heals_is_made_again():
    """Twice, because a hash seed orders two names the same way in half of all processes."""
    assert rzc.publish("kinds", make=of_all_kinds).heals
    for generation in (1, 2):
        kill("owner")
        until(lambda now=generation: generations("kinds") == {1: now})
        assert value_of(rzc.load("kinds", timeout=SOON_S)["tagged"]) == 2
    rzc.retire("kinds")


def what_a_make_gives_anew_heals_no_more():
    """And the version says so, once this was observed."""
    assert rzc.publish("random", make=lambda: torch.seed() and nn.Linear(600, 600)).heals
    kill("owner")
    until(lambda: not rzc.versions("random")[0].heals)
    with pytest.raises(rzc.LostVersionError, match="another model"):
        rzc.load("random", timeout=SOON_S)
    rzc.retire("random")


def a_name_is_retired_once():
    """Also if the catalog dies after it has written this, and before it answers."""

    def die_after_the_write(catalog):
        kept = catalog._manifest._kept
        put = kept.put

        def put_and_die(key, value):
            put(key, value)
            os._exit(1)

        kept.put = put_and_die

    rzc.publish("retired", filled(1))
    ray.get(actor("catalog").__ray_call__.remote(die_after_the_write), timeout=SOON_S)
    rzc.retire("retired")
    assert "retired" not in rzc.published()
    with pytest.raises(rzc.UnknownVersionError):
        rzc.retire("retired")


def one_snapshot_path():
    """Several versions, two names, a failed publication: each version heals if it says so."""
    want = {}

    def publish(name, value, path, **how):
        version = rzc.publish(name, filled(value), snapshot=FOLDER / path, **how)
        want[name, version.number] = value

    publish("own", 9, "own")
    publish("policy", 1, "policy")
    publish("policy", 2, "policy")
    publish("here", 3, "both")
    publish("there", 4, "both")
    publish("failed", 5, "failed")
    with pytest.raises(rzc.CatalogError):
        publish("failed", 6, "failed", timeout=0)
    rzc.publish("by-path", path=FOLDER / "own")
    want["by-path", 1] = 9
    assert sorted(path.name for path in FOLDER.iterdir()) == ["both", "failed", "own", "policy"]
    heals = {(name, v.number): v.heals for name, _ in want for v in rzc.versions(name)}
    assert {key for key in heals if not heals[key]} == {("policy", 1), ("here", 1)}
    kill("owner")
    for (name, number), value in want.items():
        if heals[name, number]:
            assert value_of(rzc.load(name, version=number, timeout=SOON_S)) == value
    assert rzc.restore(FOLDER / "policy") is not None
    for name in {name for name, _ in want}:
        rzc.retire(name)


# --- a make that hangs delays nobody --------------------------------------------------------------

HANGS = FOLDER.parent / f"{FOLDER.name}-hangs"


def hanging():
    while HANGS.exists():
        time.sleep(1)
    return filled(1)


def forever():
    time.sleep(10_000)


def making():
    """The workers that make a block."""
    found = psutil.process_iter(["pid", "cmdline"])
    return {each.pid for each in found if "_build" in " ".join(each.info["cmdline"] or [])}


def a_make_that_hangs():
    """It is given up at its timeout, and when it is retired. Meanwhile others are made again."""
    before = making()
    start_s = time.monotonic()
    with pytest.raises(rzc.CatalogError, match="not published in 5 s"):
        rzc.publish("hangs", make=forever, timeout=5)
    assert time.monotonic() - start_s < 5 + SOON_S / 9
    until(lambda: making() <= before)
    assert "hangs" not in rzc.published()

    for index in range(5):  # more than start at a time
        rzc.publish(f"hanging/{index}", make=hanging)
    rzc.publish("well", make=lambda: filled(7))
    until(lambda: making() <= before)
    HANGS.touch()
    kill("owner")
    until(lambda: generations("well") == {1: 1})
    assert value_of(rzc.load("well", timeout=SOON_S)) == 7
    with pytest.raises(rzc.LostVersionError, match=r"not loaded in 3 s: .* not rebuilt yet"):
        rzc.load("hanging/0", timeout=3)
    kill("owner")
    assert value_of(rzc.load("well", timeout=SOON_S)) == 7
    for index in range(5):
        rzc.retire(f"hanging/{index}")
    until(lambda: making() <= before)
    HANGS.unlink()
    rzc.retire("well")


def crashing():
    os._exit(1)


def a_make_whose_process_dies():
    """Ray starts a task that died again and again: the third death is the last."""
    with pytest.raises(rzc.CatalogError, match="each of 3 processes that made it died"):
        rzc.publish("dies", make=crashing, timeout=SOON_S)
    assert "dies" not in rzc.published()


# --- a limit of one process is no damage ----------------------------------------------------------


def at_a_limit(name):
    loaded = rzc.load(name)  # all imports and connections are done
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), limits[1]))
    try:
        rzc.load(name, isolation="copy", timeout=SOON_S)
    except rzc.RayZeroCopyError as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        del loaded  # not earlier: to unmap it makes room


def of_other_bytes(name):
    """A process that reads wrong bytes, while others read the right ones."""
    from ray_zerocopy.store import envelope

    def damaged(*args):
        raise BlockError("bytes are wrong, for this process")

    real, envelope.open_block = envelope.open_block, damaged
    try:
        rzc.load(name, timeout=SOON_S)
    except rzc.RayZeroCopyError as error:
        return type(error).__name__, str(error)
    finally:
        envelope.open_block = real


def altered_bytes_are_no_copy():
    """A process has written to the pages of the store: its copy is not the version any more."""
    rzc.publish("altered", filled(1, size=512))
    writer = rzc.load("altered", isolation="shared")
    writer.weight += 1
    kill("owner")
    until(lambda: is_lost("altered"))
    with pytest.raises(rzc.LostVersionError, match="no node has a copy"):
        rzc.load("altered", timeout=SOON_S)
    del writer
    rzc.retire("altered")


def a_load_that_waits_takes_what_is_current_then():
    rzc.publish("waits", make=hanging)
    HANGS.touch()
    kill("owner")
    until(lambda: is_lost("waits"))
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(rzc.load, "waits", timeout=SOON_S)
        time.sleep(4)  # it waits for the make
        assert not loading.done()
        rzc.publish("waits", filled(2), keep=1)
        assert value_of(loading.result()) == 2
    HANGS.unlink()
    rzc.retire("waits")


def a_limit_of_one_process():
    """The error names the limit, and nothing is made again for the others."""

    def seeded():
        torch.manual_seed(0)
        return nn.Linear(2048, 2048)

    for kind, how in {"make": {"make": seeded}, "object": {"obj": seeded()}}.items():
        name = f"limit-{kind}"
        rzc.publish(name, **how)
        before = sum(publication.state()["rebuilds"].values())
        for told, task in {"ulimit -v": at_a_limit, "wrong, for this": of_other_bytes}.items():
            run = ray.remote(num_cpus=0, max_retries=0)(task)
            error, message = ray.get(run.remote(name), timeout=2 * SOON_S)
            assert told in message
            assert error in ("ResourceError", "BlockError")
        assert generations(name) == {1: 0}
        assert sum(publication.state()["rebuilds"].values()) == before
        assert rzc.load(name).weight.shape == (2048, 2048)
        rzc.retire(name)


def damage_that_others_see():
    """A byte has changed in the store: the version is made again."""
    rzc.publish("damaged", make=lambda: filled(5, 600))
    ray.get(flip.remote([rzc.versions("damaged")[0].ref]))
    with pytest.raises(rzc.BlockError):
        rzc.inspect(rzc.versions("damaged")[0].ref, verify=True)
    node = ray.get_runtime_context().get_node_id()
    version = rzc.versions("damaged")[0].handle
    until(lambda: ray.get(actor("catalog").broken.remote(version, node, 2.0)))
    assert value_of(rzc.load("damaged", timeout=SOON_S)) == 5
    assert generations("damaged") == {1: 1}
    rzc.retire("damaged")


@ray.remote(num_cpus=0)
def flip(refs):
    rzc.get(refs[0], isolation="shared").weight.data[3, 3] += 1


def no_copy_anywhere():
    """The error comes as soon as all nodes have been asked."""
    rzc.publish("lost", filled(1, 600))
    kill("owner")
    until(lambda: rzc.versions("lost")[0].ref is None)
    with pytest.raises(rzc.LostVersionError, match=r"cannot rebuild it.*publish it again"):
        rzc.load("lost", timeout=SOON_S)
    rzc.retire("lost")


def with_head():
    return nn.Sequential(filled(7, 600), filled(8))


def head_only():
    return nn.Sequential(filled(9, 600), filled(8))


def what_variants_do_without_their_base():
    """The base is made again first. Without it, a variant that heals is whole, others are lost."""
    rzc.publish("base", make=lambda: filled(7, 600))
    rzc.publish("base/lost", filled(9, 600))
    healing = {
        "by-make": rzc.publish("by-make", make=with_head, base="base"),
        "by-file": rzc.publish("by-file", with_head(), base="base", snapshot=FOLDER / "variant"),
        "whole": rzc.publish("whole", make=head_only, base="base/lost"),
    }
    assert all(version.heals for version in healing.values())
    lost = rzc.publish("no-plan", with_head(), base="base")
    assert not lost.heals
    shared = {name: rzc.inspect(v.ref).base_nbytes for name, v in healing.items()}
    assert all(shared.values())
    assert rzc.inspect(lost.ref).base_nbytes
    del lost, healing
    kill("owner")
    until(lambda: all(generations(name) == {1: 1} for name in ("base", *shared)))
    for name, first in {"by-make": 7, "by-file": 7, "whole": 9}.items():
        model = rzc.load(name, timeout=SOON_S)
        assert (float(model[0].weight[0, 0]), float(model[1].weight[0, 0])) == (first, 8)
        now = rzc.inspect(rzc.versions(name)[-1].ref, verify=True).base_nbytes
        assert now == (0 if name == "whole" else shared[name])
    with pytest.raises(rzc.LostVersionError, match="publish it again"):
        rzc.load("no-plan", timeout=SOON_S)
    rzc.retire("no-plan")
    assert rzc.versions("base")[-1].variants == 2
    for name in ("base", "base/lost", *shared):
        rzc.retire(name)


def a_version_that_shares_is_copied_whole():
    """Its own block and its base's are copied from a process that has it mapped."""
    model = nn.Sequential(filled(1, 600), filled(2, 600))
    publication._SHARED_NBYTES, usual = 0, publication._SHARED_NBYTES
    try:
        rzc.publish("shares", model)
        nn.init.constant_(model[1].weight, 3.0)
        version = rzc.publish("shares", model)
    finally:
        publication._SHARED_NBYTES = usual
    assert rzc.inspect(version.ref).base_nbytes > 0
    rzc.retire("shares", 1)
    held = rzc.load("shares")
    kill("owner")
    until(lambda: generations("shares") == {2: 1})
    assert float(held[0].weight[0, 0]) == 1
    loaded = rzc.load("shares", timeout=SOON_S)
    assert (float(loaded[0].weight[0, 0]), float(loaded[1].weight[0, 0])) == (1, 3)
    assert rzc.inspect(rzc.versions("shares")[-1].ref).base_nbytes == 0
    rzc.retire("shares")


ROWS = {
    row.__name__: row
    for row in (
        make_runs_outside_of_every_job,
        what_heals_is_made_again,
        what_a_make_gives_anew_heals_no_more,
        a_name_is_retired_once,
        one_snapshot_path,
        a_make_that_hangs,
        a_make_whose_process_dies,
        altered_bytes_are_no_copy,
        a_load_that_waits_takes_what_is_current_then,
        a_limit_of_one_process,
        damage_that_others_see,
        no_copy_anywhere,
        a_version_that_shares_is_copied_whole,
        what_variants_do_without_their_base,
    )
}


def main(names):
    rays.connect(num_cpus=2, object_store_memory=400 << 20)
    tell(ROWS, names or ROWS)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
