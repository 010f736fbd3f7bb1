"""Folders are layers: a file imports only from folders before its own, by pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray_zerocopy

PACKAGE = Path(ray_zerocopy.__file__).parent
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lint(package):
    """Run import-linter on the package in this folder; True where all contracts are kept."""
    command = "from importlinter.cli import lint_imports as l; import sys; "
    command += f"sys.exit(l({str(PYPROJECT)!r}, no_cache=True, no_logo=True))"
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts" in done.stdout, done.stderr
    return done.returncode == 0


def test_no_file_imports_from_a_later_layer():
    assert lint(PACKAGE)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("objects/arrays.py", "from ray_zerocopy.store import references"),
        ("store/envelope.py", "from ray_zerocopy.store.references import put"),
        ("calls/cache.py", "def later():\n    from ray_zerocopy.registry import owner"),
        ("added.py", "from ray_zerocopy import errors"),
    ],
)
def test_a_file_that_does_is_seen(path, line, tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "ray_zerocopy", ignore=shutil.ignore_patterns("__pycache__")
    )
    with open(tmp_path / "ray_zerocopy" / path, "a") as file:
        file.write(f"\n{line}\n")
    assert not lint(tmp_path / "ray_zerocopy")


def test_a_layer_imports_modules_and_not_what_the_package_offers():
    """The package exports names of every layer; only `operate` may import the package."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    offers = re.compile(r"^ *(?:import ray_zerocopy\b()|from ray_zerocopy import (\w+))", re.M)
    for path in PACKAGE.glob("**/*.py"):
        if path.parent.name != "operate" and path != PACKAGE / "__init__.py":
            assert set(re.findall(offers, path.read_text())) <= {("", name) for name in modules}
