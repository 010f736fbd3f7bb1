"""Functions and classes that travel by value, as those of a notebook: they are of one Python."""

from __future__ import annotations

import sys
import types
from typing import Any

from ray import cloudpickle

from ray_zerocopy.errors import VersionError
from ray_zerocopy.pickled import named

# The Python whose bytecode this process writes and runs.
_PYTHON = sys.version_info[:2]


def reduce_code(whole: types.CodeType) -> Any:
    """Reduce bytecode as cloudpickle does, with the Python that it is of."""
    _, parts = cloudpickle.CloudPickler.dispatch[types.CodeType](whole)
    return code, (_PYTHON, *parts)


@named
def code(python: tuple[int, int], *parts: Any) -> types.CodeType:
    """Unpickle bytecode; another Python's ends this process with SIGSEGV when it is run."""
    if python != _PYTHON:
        there, here = (".".join(map(str, version)) for version in (python, _PYTHON))
        raise VersionError(
            f"a function or class of this object was stored by value, by Python {there}, and this "
            f"is Python {here}: define it in a module that both can import, and store it again"
        )
    return types.CodeType(*parts)
