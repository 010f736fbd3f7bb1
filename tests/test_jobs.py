"""A model's classes must be importable where it is loaded, whichever job stored it.

Two drivers of one cluster, each with its own modules, like jobs with a `working_dir`.
"""

import fresh
import pytest
import ray_zerocopy as rzc

STORES = """
    import sys

    sys.path.insert(0, sys.argv[2])
    import ray, ray_zerocopy as rzc, torch
    import mine, by_value

    class Main(torch.nn.Linear):
        pass

    ray.init(sys.argv[1], log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(by_value)
    for name, net in {"main": Main, "mine": mine.Net, "by_value": by_value.Net}.items():
        rzc.publish(f"jobs/{name}", net(4, 4))
"""

LOADS = """
    import sys
    import ray, ray_zerocopy as rzc

    ray.init(sys.argv[1], log_to_driver=False)
    try:
        print(rzc.load(sys.argv[2]).weight.shape)
    except ModuleNotFoundError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def load(cluster, tmp_path_factory):
    """Load a model in a job without the modules of the job that stored it. Returns the output."""
    folder = tmp_path_factory.mktemp("working_dir")
    for name in ("mine", "by_value"):
        (folder / f"{name}.py").write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
    stored = fresh.execute(STORES, cluster, folder)
    assert stored.returncode == 0, stored.stderr[-4000:]
    yield lambda name: fresh.execute(LOADS, cluster, f"jobs/{name}").stdout
    for name in ("main", "mine", "by_value"):
        rzc.retire(f"jobs/{name}")


@pytest.mark.parametrize("name", ["main", "by_value"])
def test_a_class_that_is_stored_with_the_model_loads_anywhere(load, name):
    assert load(name) == "torch.Size([4, 4])\n"


def test_a_class_of_another_jobs_files_is_named_with_the_way_out(load):
    told = load("mine")
    assert "No module named 'mine'" in told
    assert "runtime_env" in told
    assert "register_pickle_by_value" in told
