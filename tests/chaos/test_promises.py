"""A version keeps its promises: it heals as it says, and delays nobody.

The rows are in `promises.py`; all share one cluster.
"""

import sys
from pathlib import Path

import pytest
from fresh import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from promises import ROWS


@pytest.fixture(scope="module")
def rows():
    return rows_of(Path(__file__).with_name("promises.py"), timeout=900)


@pytest.mark.parametrize("name", ROWS)
def test_a_promise(rows, name):
    assert rows[name] == "stands"
