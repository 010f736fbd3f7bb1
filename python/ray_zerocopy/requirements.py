"""The oldest torch and Ray that are tried; newer ones than that are never refused."""

from __future__ import annotations

import ray
import torch

from ray_zerocopy.errors import VersionError

FLOORS = {"torch": "2.6", "ray": "2.43"}
# Before, a raylet ends when a detached actor starts beside another job (ray-project/ray#52090).
PUBLISHING = {"ray": "2.46"}
NEWEST = {"torch": "2.15", "ray": "2.60"}  # that were tried


def check(floors: dict[str, str], versions: dict[str, str], what: str = "ray_zerocopy") -> None:
    """Raise `VersionError` where one of these packages is older than its floor."""
    for name, floor in floors.items():
        if numbers(versions[name]) < numbers(floor):
            raise VersionError(
                f"{what} needs {name} {floor} or newer, this is {name} {versions[name]}: "
                f"pip install '{name}>={floor}'"
            )


def numbers(version: str) -> list[int]:
    """Give major and minor; what stands behind them, as in 2.6.0a0+cpu, decides nothing."""
    return [int(number) for number in version.split(".")[:2]]


VERSIONS = {"torch": torch.__version__, "ray": ray.__version__}

check(FLOORS, VERSIONS)
