"""What a model and its `make` need must not depend on which job came first.

The jobs are submitted to a cluster of their own, as users do: `ray job submit`.
"""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import rays
from ray.cluster_utils import Cluster

TELL = """
    import json, sys
    import ray, ray_zerocopy as rzc, torch

    def tell(**attempts):
        ray.init(log_to_driver=False)
        told = {}
        for name, attempt in attempts.items():
            try:
                told[name] = attempt()
            except (ModuleNotFoundError, rzc.RayZeroCopyError) as error:
                told[name] = f"{type(error).__name__}: {error}"
        print("told", json.dumps(told))
"""

STORES = """
    from tell import ray, rzc, torch, tell
    import by_value, mine, recipe

    class Main(torch.nn.Linear):
        pass

    def variable():
        import os
        return {"who": os.environ.get("WHO"), "weight": torch.ones(4)}

    def store():
        ray.cloudpickle.register_pickle_by_value(by_value)
        for name, net in {"main": Main, "mine": mine.Net, "by_value": by_value.Net}.items():
            rzc.publish(name, net(4, 4))
        rzc.publish("variable", make=variable)
        return rzc.load("variable")["who"]

    tell(store=store, make=lambda: rzc.publish("recipe", make=recipe.make).number)
"""

LOADS = """
    import sys
    from tell import rzc, tell

    def load(name):
        return lambda: list(rzc.load(name).weight.shape)

    tell(**{name: load(name) for name in ("main", "mine", "by_value")})
"""

NET = "import torch\nclass Net(torch.nn.Linear): pass\n"
MODULES = {"tell": TELL, "stores": STORES, "loads": LOADS, "mine": NET, "by_value": NET}
MODULES["recipe"] = "import torch\ndef make(): return {'weight': torch.ones(4)}\n"


def written(folder, *modules):
    folder.mkdir()
    for name in modules:
        (folder / f"{name}.py").write_text(textwrap.dedent(MODULES[name]))
    return folder


@pytest.fixture(scope="module")
def submit():
    """Submit a job that runs a script of its working directory. Returns what it told."""
    port = rays.free_port()
    node = rays.node(
        num_cpus=2,
        object_store_memory=200 << 20,
        include_dashboard=True,
        include_log_monitor=True,
        dashboard_port=port,
        dashboard_agent_listen_port=rays.free_port(),
    )
    cluster = Cluster(initialize_head=True, head_node_args=node)

    def submit(script, folder, **runtime_env):
        command = [
            Path(sysconfig.get_path("scripts")) / "ray",
            *("job", "submit", "--address", f"http://127.0.0.1:{port}"),
            *("--working-dir", folder, "--runtime-env-json", json.dumps(runtime_env)),
            *("--", sys.executable, f"{script}.py"),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )
        told = [line[5:] for line in done.stdout.splitlines() if line.startswith("told ")]
        assert told, done.stdout[-4000:] + done.stderr[-2000:]
        return json.loads(told[0])

    yield submit
    cluster.shutdown()


@pytest.fixture(scope="module")
def stored(submit, tmp_path_factory):
    """The first job: it starts the catalog, and stores models of four kinds of classes."""
    folder = written(
        tmp_path_factory.mktemp("jobs") / "first", "tell", "stores", "mine", "by_value", "recipe"
    )
    return submit("stores", folder, env_vars={"WHO": "the first job"})


def test_a_make_runs_outside_of_the_job_that_publishes(stored):
    """It sees none of the job's variables, and is refused if it needs the job's files."""
    assert stored["store"] is None
    assert "PublishError" in stored["make"]
    assert "recipe" in stored["make"]


def test_another_job_loads_what_needs_no_files_of_the_first(submit, stored, tmp_path):
    told = submit("loads", written(tmp_path / "second", "tell", "loads"))
    assert told["main"] == told["by_value"] == [4, 4]
    assert "No module named 'mine'" in told["mine"]
    assert "runtime_env" in told["mine"]
    assert "register_pickle_by_value" in told["mine"]


def test_a_job_with_the_same_modules_loads_everything(submit, stored, tmp_path):
    folder = written(tmp_path / "third", "tell", "loads")
    package = written(tmp_path / "mine")
    (package / "__init__.py").write_text(NET)
    told = submit("loads", folder, py_modules=[str(package)])
    assert told == {name: [4, 4] for name in ("main", "mine", "by_value")}
