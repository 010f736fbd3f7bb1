"""Versions below the minimum are refused in one line; newer ones than tested never are."""

import tomllib
from pathlib import Path

import pytest
import ray_zerocopy as rzc
from ray_zerocopy import requirements


@pytest.mark.parametrize(("name", "version"), [("torch", "2.5.1+cu124"), ("ray", "2.42.1")])
def test_what_is_below_the_floor_is_refused_with_the_way_out(name, version):
    with pytest.raises(rzc.VersionError) as refusal:
        requirements.check(requirements.FLOORS, requirements.VERSIONS | {name: version})
    (line,) = str(refusal.value).splitlines()
    assert f"{name} {version}" in line
    assert f"pip install '{name}>={requirements.FLOORS[name]}'" in line
    assert isinstance(refusal.value, ImportError)


@pytest.mark.parametrize("version", ["2.100.0", "3.0.0.dev1+cpu", "10.0"])
def test_what_is_newer_is_not_refused(version):
    requirements.check(requirements.FLOORS, dict.fromkeys(requirements.VERSIONS, version))
    requirements.check(requirements.FLOORS, requirements.FLOORS)


def test_a_ray_whose_raylet_would_end_publishes_nothing(cluster, monkeypatch):
    monkeypatch.setitem(requirements.VERSIONS, "ray", "2.45.0")
    with pytest.raises(rzc.VersionError, match=r"publishing needs ray 2\.46 or newer"):
        rzc.publish("too early", rzc.put([]))


def test_the_package_asks_for_the_floors():
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    asked = pyproject["project"]["dependencies"]
    assert {f"{name}>={version}" for name, version in requirements.FLOORS.items()} <= set(asked)
