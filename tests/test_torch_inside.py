"""What is private to torch is named in one file alone."""

import re
from pathlib import Path

import pytest
import ray_zerocopy

PACKAGE = Path(ray_zerocopy.__file__).parent
PRIVATE = re.compile(
    r"\b(torch|parametrize|Tensor)(\.\w+)*\._[a-zA-Z]\w*|_internal=|from torch\S*\._\w+"
)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_only_torch_inside_knows_it(path):
    named = [match[0] for match in PRIVATE.finditer(path.read_text())]
    assert bool(named) == (path.name == "torch_inside.py"), named
