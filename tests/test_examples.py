"""Each example runs in the suite's Ray, and one runs alone, as the page says."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray import serve

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_it_runs(path, cluster, capsys):
    runpy.run_path(str(path))["main"]()
    assert ray.is_initialized()
    assert not serve.status().proxies  # the next example's Serve has another port
    assert capsys.readouterr().out


def test_one_runs_by_itself():
    path = EXAMPLES / "actors.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"RAY_ADDRESS": "local"},  # not the cluster of a concurrent test
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("of memory of its own") == 2
