"""A process is killed while it publishes or loads: the store and its objects stay intact.

A few kills; `kills.py` makes a hundred at random moments (`make chaos`).
"""

import sys
from pathlib import Path

import pytest
from fresh import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from kills import SHORT


@pytest.fixture(scope="module")
def rows():
    return rows_of(Path(__file__).with_name("kills.py"))


@pytest.mark.parametrize("name", SHORT)
def test_after_a_kill(rows, name):
    assert rows[name] == "stands"
