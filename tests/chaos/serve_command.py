"""Models that `serve deploy` and `serve run` deploy stay exactly as long as they are deployed.

`make chaos` runs this, because the command starts many processes, one after the other.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import ray
import ray_zerocopy as rzc
import yaml
from rays import free_port
from test_serve import post, until


def main(folder):
    nbytes = 2**24
    for name, value in {"one": 1.0, "two": 2.0}.items():
        lines = [
            "import ray_zerocopy as rzc, torch",
            "model = torch.nn.Linear(4, 2**20, bias=False)",
            f"torch.nn.init.constant_(model.weight, {value})",
            "options = {'ray_actor_options': {'num_cpus': 0.1}}",
            "application = rzc.serve.app(model, postprocess=lambda y: y[:, :1], **options)",
        ]
        (folder / f"{name}.py").write_text("\n".join(lines))

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "120"}
    address = ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200_000_000,
        dashboard_port=(dashboard := free_port()),
        log_to_driver=False,
    ).address_info["gcs_address"]
    os.environ["RAY_ADDRESS"] = address
    os.environ["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    url = f"http://127.0.0.1:{(port := free_port())}"

    def serve(*arguments):
        command = [str(Path(sys.executable).parent / "serve"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def used():
        total, free = ray.cluster_resources(), ray.available_resources()
        return total["object_store_memory"] - free["object_store_memory"]

    def answers(value):
        try:
            return post(f"{url}/app1", {"x": [[1.0] * 4]})["output"] == [[4 * value]]
        except OSError:
            return False

    def deploy(name):
        """By a config that `serve build` made."""
        serve("build", f"{name}:application", "-o", "built.yaml")
        config = yaml.safe_load((folder / "built.yaml").read_text())
        config |= {"http_options": {"host": "127.0.0.1", "port": port}}
        config["proxy_location"] = "HeadOnly"
        config["applications"][0]["route_prefix"] = "/app1"
        (folder / "config.yaml").write_text(yaml.dump(config))
        serve("deploy", "config.yaml")

    def kept():
        return [name for name in rzc.published() if name.startswith("serve/")]

    def replicas():
        names = ray.util.list_named_actors(all_namespaces=True)
        return [each for each in names if "REPLICA" in each["name"]]

    def keeps(models):
        until(lambda: len(kept()) == models, 240)
        until(lambda: abs(used() - models * nbytes) < nbytes / 4, 240)

    # The processes that built it are gone.
    deploy("one")
    until(lambda: answers(1.0), 240)
    keeps(1)

    # Another replica takes the place of one that died.
    (replica,) = replicas()
    ray.kill(ray.get_actor(replica["name"], replica["namespace"]))
    until(lambda: replicas() not in ([], [replica]), 240)
    until(lambda: answers(1.0), 240)

    # New weights take the place of old ones.
    deploy("two")
    until(lambda: answers(2.0), 240)
    keeps(1)

    serve("shutdown", "--yes")
    keeps(0)

    # `serve run` deploys from its own process, and undeploys when that is interrupted.
    serve("start", "--http-host=127.0.0.1", f"--http-port={port}")
    command = [str(Path(sys.executable).parent / "serve"), "run", "one:application"]
    running = subprocess.Popen([*command, "--route-prefix=/app1"], cwd=folder)
    until(lambda: answers(1.0), 240)
    keeps(1)
    running.send_signal(signal.SIGINT)
    running.wait(120)
    keeps(0)
    ray.shutdown()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        os.environ["PYTHONPATH"] = os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])
        main(Path(name))
