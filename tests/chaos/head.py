"""Lose the head node and restart it with its state in Redis: names survive, healing models load.

    head        Redis, catalog, owner ─ raylet and GCS killed, another head started
    other       stays, and finds the new head

`python tests/chaos/head.py` needs `redis-server` (Debian's package), and takes two minutes.
"""

import os
import subprocess
import sys
import tempfile

import psutil
import pytest
import ray
import ray_zerocopy as rzc
import torch
from losses import runs_on
from ray_zerocopy.registry import catalog
from rays import free_port

SOON_S = 180
# Ray refuses a second head on a machine that runs a raylet of the cluster (the other node's).
START = """
from ray._private import services
from ray.scripts.scripts import main
services.find_gcs_addresses = type("Nobody", (), {
    "__call__": lambda self: set(), "cache_clear": lambda self: None})()
main()"""


def start(*options):
    small = ("--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats")
    command = [sys.executable, "-c", START, "start", *small, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=SOON_S)


def processes(name, folder):
    """This cluster's processes of that name, oldest first."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "create_time"]):
        if name in process.info["name"] and folder in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])


def filled(value):
    model = torch.nn.Linear(500, 500)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def before():
    rzc.publish("heals", make=lambda: filled(1))
    rzc.publish("object", filled(2))


def after():
    assert rzc.published() == ["heals", "object"]
    assert rzc.load("heals", timeout=SOON_S).weight[0, 0] == 1
    with pytest.raises(rzc.LostVersionError, match="publish it again"):
        rzc.load("object", timeout=SOON_S)
    assert rzc.publish("heals", make=lambda: filled(3)).number == 2
    assert rzc.load("heals").weight[0, 0] == 3
    (head,) = (
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" in node["Resources"]
    )
    for name in ("catalog", "owner"):
        assert runs_on(ray.get_actor(name, catalog.NAMESPACE)) == head


def drive(act, address):
    """Runs in a new driver, because the previous one is lost with its node."""
    subprocess.run([sys.executable, "-W", "ignore", __file__, act, address], check=True)


def main():
    os.environ["RAY_AUTH_MODE"] = "token"
    redis, address = free_port(), f"127.0.0.1:{free_port()}"
    os.environ["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{redis}"
    head = ("--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false")
    serve = ["redis-server", "--port", str(redis), "--save", ""]
    with (
        tempfile.TemporaryDirectory(prefix="rzc-head-") as folder,
        subprocess.Popen(serve, cwd=folder, stdout=subprocess.DEVNULL) as server,
    ):
        try:
            start(*head, f"--temp-dir={folder}/ray")
            start(f"--address={address}")
            drive("before", address)
            for name in ("raylet", "gcs_server"):
                processes(name, folder)[0].kill()
            start(*head, f"--temp-dir={folder}/ray")
            drive("after", address)
            print("the head was lost: names stand, what heals loads, the rest says that it is lost")
        finally:
            for process in processes("", folder):
                process.kill()
            server.kill()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ray.init(sys.argv[2], log_to_driver=False, logging_level="ERROR")
        {"before": before, "after": after}[sys.argv[1]]()
    else:
        main()
