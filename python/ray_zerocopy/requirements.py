"""The oldest supported torch and Ray. Newer versions are always allowed."""

from __future__ import annotations

import ray
import torch

from ray_zerocopy.errors import VersionError

FLOORS = {"torch": "2.6", "ray": "2.43"}
# Before 2.46 a raylet crashes when a detached actor starts beside another job
# (ray-project/ray#52090).
PUBLISHING = {"ray": "2.46"}
NEWEST = {"torch": "2.15", "ray": "2.60"}  # tested


def check(floors: dict[str, str], versions: dict[str, str], what: str = "ray_zerocopy") -> None:
    """Raise `VersionError` if one of these packages is older than its floor."""
    for name, floor in floors.items():
        if numbers(versions[name]) < numbers(floor):
            raise VersionError(
                f"{what} needs {name} {floor} or newer, found {name} {versions[name]}: "
                f"pip install '{name}>={floor}'"
            )


def numbers(version: str) -> list[int]:
    """Return major and minor, without suffixes such as in 2.6.0a0+cpu."""
    return [int(number) for number in version.split(".")[:2]]


VERSIONS = {"torch": torch.__version__, "ray": ray.__version__}

check(FLOORS, VERSIONS)
