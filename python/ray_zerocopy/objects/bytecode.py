"""Functions and classes pickled by value, such as those of a notebook, need the same Python."""

from __future__ import annotations

import sys
import types
from typing import Any

from ray import cloudpickle

from ray_zerocopy.errors import VersionError
from ray_zerocopy.pickled import named

# The Python version of this process's bytecode.
_PYTHON = sys.version_info[:2]


def reduce_code(whole: types.CodeType) -> Any:
    """Reduce bytecode as cloudpickle does, and add its Python version."""
    _, parts = cloudpickle.CloudPickler.dispatch[types.CodeType](whole)
    return code, (_PYTHON, *parts)


@named
def code(python: tuple[int, int], *parts: Any) -> types.CodeType:
    """Unpickle bytecode; running bytecode of another Python would end this process with SIGSEGV."""
    if python != _PYTHON:
        there, here = (".".join(map(str, version)) for version in (python, _PYTHON))
        raise VersionError(
            f"a function or class of this object was pickled by value in Python {there}, and this "
            f"is Python {here}: define it in a module that both can import, and store it again"
        )
    return types.CodeType(*parts)
